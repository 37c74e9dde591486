"""How a sweep is run: where, on what, with how much at once. Nothing here can change a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from altgrad.sweep.record.budget import Budget
from altgrad.sweep.record.folder import cores
from altgrad.sweep.record.wandb_mirror import Mode
from altgrad.training.devices import gpu_count

if TYPE_CHECKING:
    from altgrad.sweep.space.spec import SweepSpec

Executor = Literal["auto", "actor", "train"]
Checkpoints = Literal["all", "last", "none"]


@dataclass(frozen=True)
class RunOptions:
    """The settings of one run of a sweep."""

    out: Path
    max_concurrent: int | None = None
    address: str = "local"
    fresh: bool = False
    worker_guards: bool = True
    """without, trials are left to the scheduler's look at their guards, which comes one check later"""
    executor: Executor = "auto"
    workers_per_trial: int = 1
    gpus_per_trial: float | None = None
    """of each worker; a fraction lets several trials share a GPU; None: one each where there are any, see `settled`"""
    mix_devices: bool = False
    """whether trials of one seed, which are compared, may run on GPUs of different kinds"""
    interval_timeout: float = 900.0
    """seconds after which a log interval that has not ended counts as hung; 0 for never"""
    budget: Budget = field(default_factory=Budget)
    wandb: Mode = "off"
    keep_checkpoints: Checkpoints = "last"
    """of each trial: every one, the newest, or none once it has a result; more steps then start anew"""

    def check(self, spec: SweepSpec) -> None:
        """ValueError, naming the flag, where the settings can't go together, with this sweep or on this machine."""
        if self.gpus_per_trial is not None and self.gpus > 1 and self.gpus % 1:
            raise ValueError(
                f"--gpus-per-trial: {self.gpus:g} is not allowed: whole GPUs, or a fraction below 1, are expected"
            )
        for batch in spec.batches:
            if batch % self.workers_per_trial:
                raise ValueError(
                    f"--workers-per-trial: {self.workers_per_trial} is not allowed: data.batch={batch} "
                    "can't be shared evenly"
                )
        if spec.scheduler == "pbt" and (self.workers_per_trial > 1 or self.executor == "train"):
            many = f"--workers-per-trial: {self.workers_per_trial}"
            asked = "--executor: 'train'" if self.executor == "train" else many
            raise ValueError(f"{asked} is not allowed with --scheduler pbt: populations are of one-device trials")
        if spec.scheduler == "pbt" and self.keep_checkpoints == "none":
            raise ValueError(
                "--keep-checkpoints: 'none' is not allowed with --scheduler pbt: members take over each other's; "
                "all or last is expected"
            )
        if self.executor == "actor" and self.workers_per_trial > 1:
            raise ValueError(
                f"--executor: 'actor' is not allowed with --workers-per-trial {self.workers_per_trial}: "
                "an actor is one worker; auto or train is expected"
            )
        if self.gpus_per_trial is not None:
            self.budget.check(self.gpus)
        if self.address == "local" and self.workers_per_trial > cores():
            raise ValueError(
                f"--workers-per-trial: {self.workers_per_trial} is not allowed: this machine has "
                f"{cores()} cores, one per worker is expected"
            )

        if self.address == "local" and (wanted := self.gpus * self.workers_per_trial) > (found := gpu_count()):
            raise ValueError(
                f"--gpus-per-trial: {self.gpus:g} is not allowed: a trial would take {wanted:g} GPUs, this machine has "
                f"{found}; 0 trains on CPUs"
            )

    @property
    def gpus(self) -> float:
        """GPUs of each worker; 0 as long as that is not settled."""
        return self.gpus_per_trial or 0.0

    def settled(self, gpus: float) -> RunOptions:
        """With `gpus_per_trial` decided, on a Ray that has so many GPUs or can grow to them.

        ValueError where a cap counts GPUs and there are none.
        """
        if self.gpus_per_trial is not None:
            return self
        found = replace(self, gpus_per_trial=1.0 if gpus else 0.0)
        found.budget.check(found.gpus)
        return found

    @property
    def chosen_executor(self) -> Literal["actor", "train"]:
        """What `auto` stands for. A reused actor serves one worker, on whatever device, at a hundredth of the cost."""
        if self.executor != "auto":
            return self.executor
        return "train" if self.workers_per_trial > 1 else "actor"

    def concurrent(self, now: Mapping[str, float], most: Mapping[str, float] | None = None) -> int:
        """Trials at a time on a Ray that has the resources `now`.

        A cluster that grows with demand has to see some: as many wait there as would fit when it has grown to `most`;
        where nobody says how far it can grow, twice as many as fit now.
        """
        if self.max_concurrent is not None:
            return self.max_concurrent
        if self.address == "local":
            return max(1, self._fit(now))
        if most is None:
            return max(GROWING, 2 * self._fit(now))
        return max(1, min(MOST, max(self._fit(now), self._fit(most))))

    def _fit(self, resources: Mapping[str, float]) -> int:
        name, each = ("GPU", self.gpus) if self.gpus else ("CPU", 1.0)
        return int(resources.get(name, 0.0) / (each * self.workers_per_trial) + 1e-9)


GROWING = 8
"""Trials that a cluster is asked for at least, where its size now is all that is known."""
MOST = 1000
"""Trials at a time; where a cluster may grow without a limit, that is still one."""
