"""Ray Tune as the engine: a flat list of trials, reused actors of one device, and a callback that keeps the ledger.

Tune gets no search space to be clever about, only the trials that the ledger lacks, and keeps no record that
anyone reads: its own files stand in a scratch folder that is removed afterwards. A trial whose actor dies is
started again up to twice and resumes from its checkpoint; after that it is `node_lost` and waits for the next
run. The same error in three trials is a bug that more trials will not cure, and ends the sweep.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.engine.connection import AUTH_MODE, Connection
from altgrad.sweep.engine.executors import PAUSED, TrialActor, run_request
from altgrad.sweep.engine.faults import Breaker, fault
from altgrad.sweep.engine.groups import GroupWatch
from altgrad.sweep.engine.nodes import ClusterSize, NodeWatch, devices_text
from altgrad.sweep.engine.placement import ACCELERATOR, Placement
from altgrad.sweep.engine.preflight import check_cluster, knock, refusal
from altgrad.sweep.engine.train_executor import DRIVER_CPUS, GROUP, WorkerGroup, group_trainable
from altgrad.sweep.options import RunOptions
from altgrad.sweep.pace.growth import Growth
from altgrad.sweep.pace.pace import Pace
from altgrad.sweep.pace.queue import TrialQueue
from altgrad.sweep.pace.schedulers import HealthScheduler, trial_id_of
from altgrad.sweep.record.budget import Meter
from altgrad.sweep.record.ledger import WAITING
from altgrad.sweep.record.progress import Progress
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.record.references import references
from altgrad.sweep.record.wandb_mirror import Mirror
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome

GROWS = "KUBERAY_GEN_RAY_START_CMD"
"""What KubeRay sets in its pods; its autoscaler's configuration is in none of them."""
RETRIES = 2
KIND_SHARE = 0.001
"""Of a node's one unit of its kind of accelerator."""
LAST_WORDS_SECONDS = 5.0
"""How long an interrupted driver waits for a ledger that another program holds."""
PAUSES = 32
"""More times than a trial can pause in a race: rungs lie a factor apart."""


class Follower(tune.Callback):
    """Keeps the ledger and the display up with Tune's events."""

    def __init__(
        self,
        recorder: Recorder,
        progress: Progress,
        scheduler: HealthScheduler,
        breaker: Breaker,
        growth: Growth | None = None,
        meter: Meter | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.groups: GroupWatch | None = None
        self.nodes: NodeWatch | None = None
        self.placement: Placement | None = None
        """from when Ray is up"""
        self._growth, self._meter, self._mirror = growth, meter, mirror
        self._recorder = recorder
        self._progress = progress
        self._scheduler = scheduler
        self._breaker = breaker

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        """Tune pickles callbacks for a restore that is never used; an open ledger can't go along."""
        return tune.Callback, ()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._recorder.follow(trial_id_of(trial))
        self._progress.reached(trial_id_of(trial), int(result["step"]))
        if self.groups is not None and GROUP in result:
            self.groups.belongs(result[GROUP], trial_id_of(trial))
        if self._mirror is not None:
            self._mirror.follow(trial_id_of(trial))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._recorder.expect(trial_id_of(trial))
        if self.groups is not None:
            self.groups.started(trial_id_of(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        running = [trial for trial in trials if trial.status == "RUNNING"]
        if self._meter is not None:
            self._meter.tick(len(running))
        if self.groups is not None and self.groups.is_due():
            self._look(self.groups, {trial_id_of(trial) for trial in running})
            _forget(trial for trial in trials if trial.status in ("TERMINATED", "ERROR"))

    def _look(self, groups: GroupWatch, running: set[str]) -> None:
        ledger = self._recorder.ledger
        if self.nodes is not None and (complaint := self.nodes.look()):
            self._breaker.end(complaint)
        for group_id, line in groups.look(running).items():
            ledger.note(group_id, line)
            self._progress.note(line)
        if groups.waiting != self._progress.lacks:
            ledger.note(WAITING, groups.waiting)
            self._progress.lacks = groups.waiting
        self._progress.tick()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial_id_of(trial)
        outcome = self._recorder.finish(trial_id, self._scheduler.verdicts.get(trial_id))
        if outcome is None and PAUSED in (trial.last_result or {}):
            self._progress.waits(trial_id, int(trial.last_result["step"]))
            self.settle()
            return
        self._ended(trial_id, outcome)
        self.settle()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial_id_of(trial)
        outcome = self._recorder.finish(trial_id)
        if outcome is None:
            outcome = self._recorder.ledger.record_outcome(trial_id, fault(trial, self._recorder.folder / trial_id))
        self._ended(trial_id, outcome)
        self.settle()

    def settle(self) -> None:
        """Records those that have lost their race while they waited."""
        for trial_id in self._scheduler.pruned():
            self._ended(trial_id, self._recorder.finish(trial_id, self._scheduler.verdicts[trial_id]))

    def _ended(self, trial_id: str, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._breaker.count(outcome)
            if self.placement is not None:
                self.placement.ended(trial_id, outcome.device)
        self._progress.ended(trial_id, outcome)
        if self._mirror is not None:
            self._mirror.end(trial_id, outcome)
        if self._growth is not None and outcome is not None:
            self._growth.ended(trial_id)


def drive(
    trials: dict[str, TrainConfig],
    recorder: Recorder,
    progress: Progress,
    pace: Pace,
    *,
    against: dict[str, str],
    options: RunOptions,
    text_sha256: str = "",
    growth: Growth | None = None,
    meter: Meter | None = None,
) -> str | None:
    """Runs the trials on the Ray at `address`; returns the error that ended the sweep early, if one did.

    `against`: each trial's reference, which may be among the trials or have ended before. Both grow with what `growth`
    adds. `text_sha256`: of the text that all trials are about.
    """
    scratch = recorder.folder.parent.absolute() / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    scheduler, breaker = HealthScheduler(trials, pace), Breaker(meter)
    mirror = None if options.wandb == "off" else Mirror(recorder.folder.parent, options.wandb, progress.note)
    follower = Follower(recorder, progress, scheduler, breaker, growth, meter, mirror)
    requests: dict[str, dict[str, str]] = {}

    def enter(new: Mapping[str, TrainConfig]) -> Iterable[str]:
        trials.update(new)
        for trial_id in new:
            recorder.expect(trial_id)
        if growth is not None:
            against.update(references(growth.trials))
        requests.update(
            {
                trial_id: run_request(
                    trial_id,
                    config,
                    recorder.folder.absolute() / trial_id,
                    against.get(trial_id),
                    own_guards=options.worker_guards,
                    interval_timeout=options.interval_timeout,
                    gpus=options.gpus,
                    text_sha256=text_sha256,
                    keep_checkpoints=options.keep_checkpoints == "all",
                )
                for trial_id, config in new.items()
            }
        )
        pace.admit(new)
        return new

    def more() -> Iterable[str]:
        return () if growth is None else enter(growth.more())

    enter(trials)
    planned = len(trials) + (0 if growth is None else growth.planned)
    pauses = max(PAUSES, pace.most_pauses + 1)
    connection = Connection()
    # Ray sets the mode itself where it finds a token in the home folder.
    progress.watch(connection.connect(options.address), asks_token=os.environ.get(AUTH_MODE) == "token")
    follower.settle()
    # A population hands checkpoints over between one-device trials.
    executor = "actor" if pace.hands_over else options.chosen_executor
    size = ClusterSize()
    devices = {trial_id: outcome.device for trial_id, outcome in recorder.ledger.outcomes().items()}
    seeds = trials if growth is None else growth.trials
    placement = Placement(seeds, devices) if options.gpus and not options.mix_devices else None
    if placement is not None:
        follower.placement = placement
        scheduler.is_stranded = lambda request: placement.is_gone(request.get("accelerator"))
    progress.note(f"executor: {executor}, {options.workers_per_trial} worker(s) per trial, {devices_text(options)}")
    follower.groups = GroupWatch(worker_group(options).resources() if executor == "train" else None)
    follower.nodes = None if options.address == "local" else NodeWatch(recorder.folder)
    try:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        tune.Tuner(
            trainable(executor, options, scratch),
            tune_config=tune.TuneConfig(
                scheduler=scheduler,
                search_alg=TrialQueue(
                    requests, against, pace, more, lambda: options.concurrent(*size.read()), placement
                ),
                # At most; a trial whose GPU has gone is handed out a second time.
                num_samples=(pauses + 1) * planned,
                reuse_actors=executor == "actor",
                trial_name_creator=trial_id_of,
                trial_dirname_creator=trial_id_of,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(scratch),
                callbacks=[follower],
                stop=breaker,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    except BaseException:
        recorder.ledger.hurry(LAST_WORDS_SECONDS)
        raise
    finally:
        connection.disconnect()
        shutil.rmtree(scratch, ignore_errors=True)
        with recorder.ledger.unless_held():
            if meter is not None:
                meter.save()
            recorder.ledger.note(WAITING, None)
        if mirror is not None:
            mirror.close()
    return breaker.reason


def trainable(executor: str, options: RunOptions, scratch: Path) -> Any:
    """What Tune runs for each trial, with what it asks for."""
    if executor == "actor":
        # Where GPUs are what is scarce, a machine with fewer cores than GPUs must still use them all.
        return tune.with_resources(TrialActor, _gpu_bundle(options.gpus) if options.gpus else {"cpu": 1})
    return tune.with_resources(group_trainable(worker_group(options), scratch / "train"), {"cpu": DRIVER_CPUS})


def _gpu_bundle(gpus: float) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """What a trial on GPUs asks for, of the kind that its request names."""

    def bundle(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        kind = config.get("trial", {}).get("accelerator")
        return tune.PlacementGroupFactory(
            [{"CPU": DRIVER_CPUS, "GPU": gpus} | ({f"{ACCELERATOR}{kind}": KIND_SHARE} if kind else {})]
        )

    return bundle


def worker_group(options: RunOptions) -> WorkerGroup:
    """What a trial runs on under Ray Train."""
    return WorkerGroup(options.workers_per_trial, gpus=options.gpus, retries=RETRIES)


def reach(options: RunOptions) -> tuple[RunOptions, list[str]]:
    """The options as this cluster decides them, and what is to be said of it before anything is touched.

    Stays connected to none. Raises ConnectionError where no Ray cluster answers, SpecError where this sweep can't run
    on it, ValueError where the options can't be met there.
    """
    knock(options.address)
    connection = Connection()
    try:
        connection.connect(options.address)
        options = with_gpus(options, *ClusterSize().read())
        return options, list(check_cluster(options, worker_group(options).resources()))
    except (RuntimeError, RayError, ConnectionError) as error:
        # Where the cluster was to be found by itself, none may be there.
        is_lost = isinstance(error, ConnectionError) and options.address == "auto"
        reason = None if is_lost else refusal(error)
        if reason is None:
            raise
        raise SpecError(f"--address: {options.address!r}: {reason}") from None
    finally:
        connection.disconnect()


def with_gpus(options: RunOptions, now: Mapping[str, float], most: Mapping[str, float] | None) -> RunOptions:
    """The options with GPUs where the cluster has some, or can grow to them.

    SpecError where a cap counts GPUs and there are none, or where trials would ask for CPUs while the nodes that come
    for them may have GPUs that nobody uses.
    """
    if most is None and not now.get("GPU") and options.gpus_per_trial is None and GROWS in os.environ:
        raise SpecError(
            "--gpus-per-trial: missing: no node of this cluster has a GPU now, and it does not say what the nodes that "
            "are to come have; 1 or 0 is expected"
        )
    try:
        return options.settled(max(now.get("GPU", 0.0), (most or {}).get("GPU", 0.0)))
    except ValueError as error:
        raise SpecError(str(error)) from None


def _forget(ended: Iterable[Any]) -> None:
    """Tune holds statistics of every metric of every trial to the end of the sweep, which nobody reads: 20 KB each."""
    for trial in ended:
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
