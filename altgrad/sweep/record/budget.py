"""What a sweep may spend, and what it has spent, over all its runs.

Time is metered while trials hold their devices: GPU-hours are the trials at work times the GPUs of each, hours are
wall time of the driver, dollars are GPU-hours at the price given. What was spent lies in the ledger, a line per run of
the driver, so that neither a crash nor a restart forgets it. When a cap is reached all trials stop, those that are not
finished end as `budget`, and the same command with a higher cap goes on from their checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.spend import Spend

SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Budget:
    """Caps over all runs of a sweep; None for no cap. `usd_per_gpu_hour` is what dollars are reckoned by."""

    hours: float | None = None
    gpu_hours: float | None = None
    usd: float | None = None
    usd_per_gpu_hour: float | None = None

    def check(self, gpus_per_trial: float) -> None:
        """ValueError, naming the flag, for a cap of nothing or one that nothing could be counted for."""
        for name in ("hours", "gpu_hours", "usd", "usd_per_gpu_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{flag_of(name)}: {value:g} is not allowed: a number above 0 is expected")
        for name in ("gpu_hours", "usd"):
            if getattr(self, name) is not None and not gpus_per_trial:
                raise ValueError(
                    f"--{flag_of(name)}: {getattr(self, name):g} is not allowed without --gpus-per-trial: "
                    "no GPU would be counted; --max-hours caps wall time"
                )
        if self.usd is not None and self.usd_per_gpu_hour is None:
            raise ValueError(f"--max-usd: {self.usd:g} is not allowed without --usd-per-gpu-hour, the price of a GPU")

    def exceeded(self, spent: Spend) -> str | None:
        """Which cap is reached, in words, or None."""
        for name, unit in (("gpu_hours", "GPU-hours"), ("usd", "dollars"), ("hours", "hours")):
            cap, used = getattr(self, name), getattr(spent, name)
            if cap is not None and used >= cap:
                return f"{used:.3g} of {cap:g} {unit} (--{flag_of(name)}) are spent"
        return None


def flag_of(name: str) -> str:
    """The flag of a field of `Budget`, without its dashes."""
    return ("" if name.startswith("usd_per") else "max-") + name.replace("_", "-")


class Meter:
    """Counts what this run of a driver spends, on top of what the ledger already holds."""

    def __init__(
        self, budget: Budget, ledger: Ledger, gpus_per_trial: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._budget, self._ledger, self._gpus, self._clock = budget, ledger, gpus_per_trial, clock
        self._before = ledger.spent()
        self._own = Spend()
        self._started = self._last = self._saved = clock()

    @property
    def spent(self) -> Spend:
        """By all runs so far."""
        return Spend(*(getattr(self._before, f.name) + getattr(self._own, f.name) for f in fields(Spend)))

    @property
    def exceeded(self) -> str | None:
        """Which cap is reached, or None."""
        return self._budget.exceeded(self.spent)

    def tick(self, running: int) -> None:
        """So many trials have been at work since the last call."""
        now = self._clock()
        hours = max(0.0, now - self._last) / 3600
        gpu_hours = hours * running * self._gpus
        self._own = Spend(
            self._own.hours + hours,
            self._own.gpu_hours + gpu_hours,
            self._own.usd + gpu_hours * (self._budget.usd_per_gpu_hour or 0.0),
        )
        self._last = now
        if now - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Enters this run's spend in the ledger."""
        self._saved = self._clock()
        self._ledger.record_spend(self._started, self._own)
