"""Trials of several workers: each a Ray Train worker group under a small Tune driver, in the one training loop.

Tune runs a driver per trial that asks for almost nothing; the workers ask for the devices. The first worker's
results go on to Tune, so schedulers, guards and races listen to these trials as to any other. A worker's death
restarts the group from the checkpoint in the trial's folder.

A Python error that is not the trial's own (a collective that can't start) would fail each time alike: it is the trial's
ending, told by the driver.

Ray 2.60 frees the workers of a stopped driver through its State API only: the driver needs RAY_ADDRESS, and the
cluster its dashboard. Results are fetched by polling, two seconds apart unless told otherwise.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad.sweep.engine.executors import TrialRun
from altgrad.sweep.engine.faults import told
from altgrad.sweep.engine.preflight import asking_own_cluster
from altgrad.training.outcome import OutcomeKind
from altgrad.training.record import write_json
from altgrad.training.workers import Workers

POLL_SECONDS = "0.2"
DRIVER_CPUS = 0.01
GROUP = "placement_group"
"""In a result: the id of the group that the trial's workers live in."""
WORKER_CPUS = 0.9
"""Less than a core: a driver holds a little too, and a full machine must still take the group."""


@dataclass(frozen=True)
class WorkerGroup:
    """What one trial runs on: `workers` processes with `cpus` and `gpus` each, and how often a group is restarted."""

    workers: int = 1
    cpus: float = WORKER_CPUS
    gpus: float = 0.0
    retries: int = 2

    def resources(self) -> dict[str, float]:
        """Per worker, in Ray's words."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def group_trainable(group: WorkerGroup, storage: Path) -> Callable[[dict[str, Any]], None]:
    """The Tune trainable that runs a trial on a worker group; `storage` is for Ray's own files."""

    def drive(config: dict[str, Any]) -> None:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
        from ray import train
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.tune.integration.ray_train import TuneReportCallback

        request = config["trial"]
        trainer = TorchTrainer(
            work,
            train_loop_config=request,
            torch_config=TorchConfig(backend="nccl" if group.gpus >= 1 else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=group.workers,
                use_gpu=group.gpus > 0,
                resources_per_worker=group.resources(),
                accelerator_type=request.get("accelerator"),
            ),
            run_config=train.RunConfig(
                name=request["trial_id"],
                storage_path=str(storage),
                callbacks=[TuneReportCallback()],
                failure_config=train.FailureConfig(max_failures=group.retries),
            ),
        )
        try:
            with asking_own_cluster():
                trainer.fit()
        except Exception as error:  # whatever Ray Train raises, its text says what was raised in the workers
            folder = Path(request["folder"])
            ending = told("".join(traceback.format_exception(error)), 0, folder)
            if ending.kind is not OutcomeKind.BUG:
                raise
            write_json(folder / "outcome.json", ending.to_dict())

    return drive


def work(request: Mapping[str, str]) -> None:
    """What each worker of a group does."""
    import torch
    from ray import train
    from ray.util import get_current_placement_group

    torch.set_num_threads(1)
    context, group = train.get_context(), get_current_placement_group()
    run = TrialRun(request, Workers(context.get_world_rank(), context.get_world_size()))
    is_over = False
    while not is_over:
        result = run.step()
        # Tune takes "done" for its own word, and would end the group before it has ended itself.
        is_over = result.pop("done", False)
        train.report(result | ({} if group is None else {GROUP: group.id.hex()}))
