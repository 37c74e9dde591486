"""Floor 3: a search space becomes trials, Ray runs them, a ledger remembers what happened.

This is the only floor that uses Ray, and it loads Ray only where trials are run: a spec can be planned without it, and
a ledger read without torch too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from altgrad.sweep.pace.schedulers import HealthScheduler
    from altgrad.sweep.record.ledger import Ledger
    from altgrad.sweep.space.spec import SweepSpec

__all__ = ["HealthScheduler", "Ledger", "SweepSpec"]

_PLACES = {"HealthScheduler": "pace.schedulers", "Ledger": "record.ledger", "SweepSpec": "space.spec"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
