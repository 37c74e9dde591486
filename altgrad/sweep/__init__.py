"""Floor 3: a search space becomes trials, Ray runs them, a ledger remembers what happened.

This is the only floor that uses Ray, and it loads Ray only where trials are run: a spec can be planned and a
ledger read without it.
"""

from typing import TYPE_CHECKING, Any

from altgrad.sweep.ledger import Ledger
from altgrad.sweep.spec import SweepSpec

if TYPE_CHECKING:
    from altgrad.sweep.schedulers import HealthScheduler

__all__ = ["HealthScheduler", "Ledger", "SweepSpec"]


def __getattr__(name: str) -> Any:
    if name == "HealthScheduler":
        from altgrad.sweep.schedulers import HealthScheduler
        return HealthScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
