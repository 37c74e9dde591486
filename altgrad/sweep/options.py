"""How a sweep is run: where, on what, with how much at once. Nothing here can change a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from altgrad.sweep.budget import Budget
from altgrad.sweep.folder import cores
from altgrad.sweep.wandb_mirror import Mode

if TYPE_CHECKING:
    from altgrad.sweep.spec import SweepSpec

Executor = Literal["auto", "actor", "train"]


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
    gpus_per_trial: float = 0.0
    """of each worker; a fraction lets several trials share a GPU"""
    interval_timeout: float = 900.0
    """seconds after which a log interval that has not ended counts as hung; 0 for never"""
    budget: Budget = field(default_factory=Budget)
    wandb: Mode = "off"

    def check(self, spec: SweepSpec) -> None:
        """ValueError, naming the flag, where the settings can't go together, with this sweep or on this machine."""
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
        if self.executor == "actor" and self.workers_per_trial > 1:
            raise ValueError(
                f"--executor: 'actor' is not allowed with --workers-per-trial {self.workers_per_trial}: "
                "an actor is one worker; auto or train is expected"
            )
        self.budget.check(self.gpus_per_trial)
        if self.address == "local" and self.workers_per_trial > cores():
            raise ValueError(
                f"--workers-per-trial: {self.workers_per_trial} is not allowed: this machine has "
                f"{cores()} cores, one per worker is expected"
            )

        if self.address == "local" and (wanted := self.gpus_per_trial * self.workers_per_trial):
            import torch

            if wanted > (found := torch.cuda.device_count()):
                raise ValueError(
                    f"--gpus-per-trial: {self.gpus_per_trial:g} is not allowed: a trial would take "
                    f"{wanted:g} GPUs, this machine has {found}"
                )

    def chosen_executor(self, gpus: float) -> Literal["actor", "train"]:
        """What `auto` stands for on a Ray with so many GPUs."""
        if self.executor != "auto":
            return self.executor
        is_gpu_cluster = self.address != "local" and gpus > 0
        return "train" if self.workers_per_trial > 1 or is_gpu_cluster else "actor"

    def concurrent(self, cpus: float, gpus: float) -> int:
        """Trials at a time on a Ray of that size.

        A cluster that grows with demand has to see some: at least as many wait there as would be worth starting for.
        """
        if self.max_concurrent is not None:
            return self.max_concurrent
        fit = cpus / self.workers_per_trial
        if self.gpus_per_trial:
            fit = min(fit, gpus / (self.gpus_per_trial * self.workers_per_trial))
        return max(1 if self.address == "local" else GROWING, int(fit))


GROWING = 8
"""Trials that a cluster is asked for at least, whatever its size is now."""
