"""What ends a trial from outside: lost races, and a backstop for a worker that fails to deliver its own
verdict.

Guards run inside the worker: only there can a trial still write its checkpoint and its reason before it ends,
since Ray's STOP ends an actor hard. The scheduler therefore stops a trial in two cases only, each with a
typed record of the reason: it lost its race (altgrad.sweep.pace.racing), or one of its own guards holds and the worker
has not answered: the same rules are judged here on what workers report, with the patience of one more check. A sweep
with guards off asked for neither, and its diverged trials run on.

A trial that a guard ended, on either side, enters no rung of a race with a number: it ranks behind every finite one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from altgrad.sweep.engine.backstop import Backstop
from altgrad.sweep.engine.executors import GUARDED, PAUSED
from altgrad.sweep.pace.pace import Pace
from altgrad.sweep.pace.racing import SCORE
from altgrad.training.config import TrainConfig
from altgrad.training.guards import verdict_fields
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import from_plain

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial


LOOK_SECONDS = 5.0
"""Between two looks at what trials wait for."""


class HealthScheduler(FIFOScheduler):
    """Runs trials in their order; stops what has lost its race or breaks its own guards.

    `trials` are all trials of the sweep by id; `pace` is None where none waits for others. `verdicts` holds the
    reason for each trial that this scheduler stopped.
    """

    def __init__(self, trials: Mapping[str, TrainConfig], pace: Pace | None = None) -> None:
        super().__init__()
        self.is_stranded: Callable[[dict[str, Any]], bool] = lambda request: False
        """of a trial that waits: whether what it asks for is gone for good"""
        self._looked = 0.0
        self.verdicts: dict[str, Outcome] = {}
        self._trials = trials
        self._pace = pace or Pace()
        self._backstops: dict[str, Backstop] = {}
        """of trials that run or wait"""
        self._busy: set[str] = set()
        """trials that run, or have come to an ending of their own"""
        self._paused: dict[str, dict[str, Any]] = {}

    def __reduce__(self) -> tuple[type[FIFOScheduler], tuple[()]]:
        """Tune pickles its scheduler for a restore that is never used; an open ledger can't go along."""
        return FIFOScheduler, ()

    def on_trial_result(self, tune_controller: TuneController | None, trial: Trial, result: dict[str, Any]) -> str:
        trial_id = trial_id_of(trial)
        verdict = self._backstop(trial_id, result) or self._raced(trial_id, result)
        if verdict is None:
            return str(TrialScheduler.CONTINUE)
        self.verdicts[trial_id] = verdict
        if verdict.kind is not OutcomeKind.PRUNED:
            self._pace.ended(trial_id, verdict.kind, verdict.step)
        return str(TrialScheduler.STOP)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            for trial in tune_controller.get_trials():
                # Tune would ask for the same until the end of time; the queue hands the trial out anew.
                if trial.status == "PENDING" and self.is_stranded(trial.config["trial"]):
                    tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)

    def on_trial_remove(self, tune_controller: TuneController | None, trial: Trial) -> None:
        self._busy.discard(trial_id_of(trial))

    def on_trial_add(self, tune_controller: TuneController | None, trial: Trial) -> None:
        self._busy.add(trial_id_of(trial))

    def on_trial_complete(self, tune_controller: TuneController | None, trial: Trial, result: dict[str, Any]) -> None:
        trial_id = trial_id_of(trial)
        if "outcome" not in result:
            self._busy.discard(trial_id)
        if PAUSED in result:
            self._backstop(trial_id, result)  # the worker's counts go on from here; a verdict can wait
        else:
            self._backstops.pop(trial_id, None)
        if trial_id in self.verdicts:
            return
        if PAUSED in result:
            self._paused[trial_id] = result
            if result.get(SCORE) is not None:
                self._pace.observe(trial_id, int(result["step"]), _score(result))
        if "outcome" not in result:
            return
        kind = OutcomeKind(result["outcome"])
        if kind in (OutcomeKind.BUG, OutcomeKind.OOM):
            self._pace.lost(trial_id)
        else:
            self._pace.ended(trial_id, kind, int(result["step"]))

    def on_trial_error(self, tune_controller: TuneController | None, trial: Trial) -> None:
        self._busy.discard(trial_id_of(trial))
        self._pace.lost(trial_id_of(trial))

    def pruned(self) -> list[str]:
        """Trials that lost their race while they did not run, since the last call; `verdicts` has the reasons."""
        stopped = self._pace.stopped
        found = [name for name in stopped if name in self._trials.keys() - self._busy - self.verdicts.keys()]
        for name in found:
            self.verdicts[name] = _at(stopped[name], self._paused[name]) if name in self._paused else stopped[name]
        return found

    def debug_string(self) -> str:
        return f"HealthScheduler: {len(self.verdicts)} stopped"

    def _raced(self, trial_id: str, result: Mapping[str, Any]) -> Outcome | None:
        if result.get(SCORE) is not None:
            self._pace.observe(trial_id, int(result["step"]), _score(result))
        verdict = self._pace.verdict(trial_id)
        return None if verdict is None else _at(verdict, result)

    def _backstop(self, trial_id: str, result: Mapping[str, Any]) -> Outcome | None:
        if GUARDED not in result:
            return None
        row = from_plain(json.loads(result[GUARDED]))
        if trial_id not in self._backstops:
            self._backstops[trial_id] = Backstop(self._trials[trial_id])
        own = self._backstops[trial_id]
        source = self._pace.source(trial_id, own.check_before(row["step"]))
        giver = None if source is None else self._backstops.get(source) or Backstop(self._trials[source])
        verdict = own.check(row, giver)
        if verdict is None:
            return None
        fields = verdict_fields(verdict)
        return _at(Outcome(**(fields | {"message": f"{fields['message']}; stopped by the scheduler"})), result)


def trial_id_of(trial: Trial) -> str:
    """Our id of a Tune trial (Tune's own can't be set)."""
    return str(trial.config["trial"]["trial_id"])


def _score(result: Mapping[str, Any]) -> float:
    """What the race ranks by: of a trial in which a layer moved to another format, behind every finite loss."""
    return math.inf if result.get("formats") else float(result[SCORE])


def _at(outcome: Outcome, result: Mapping[str, Any]) -> Outcome:
    """The outcome with the losses, the formats and the time of the result at which the trial was stopped."""
    return replace(
        outcome,
        step=int(result["step"]),
        formats=result.get("formats") or None,
        train_loss=result.get("train_loss"),
        val_loss=result.get("val_loss"),
        bits_per_byte=result.get("bits_per_byte"),
        seconds=float(result.get("seconds", 0.0)),
    )
