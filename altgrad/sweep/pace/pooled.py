"""One race over a whole search whose samples come one after another: asynchronous successive halving.

Only a declared search for the one best configuration pools formats and arms; an ablation never does (see
`pace.racing`, whose words are used here). Where all samples are known beforehand (search='random') that race
is held over all of them at once. Optuna chooses by what has ended, so nobody can wait for all: a group that comes to a
rung is compared with those that have come there before, and goes on if it is among the best 1 / reduction of them,
rounded up. The first to come goes on; which ones do depends on the order of arrival, as in any asynchronous halving.

A group that diverged, that a guard ended or that needed a shift of formats loses against every finite one and enters no
rung with a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from altgrad.sweep.pace.pace import Pace
from altgrad.sweep.pace.racing import SCORE, Group, pruned
from altgrad.sweep.space.pacing import RaceConfig, evaluated_at
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import GUARD_KINDS, OutcomeKind


class PooledRace(Pace):
    """Fed like `Race`; `admit` enters the trials of new samples."""

    def __init__(self, config: RaceConfig, steps: int, eval_interval: int) -> None:
        super().__init__()
        self._config, self._steps, self._every = config, steps, eval_interval
        self._rungs = config.rungs(steps, eval_interval)
        self._groups: dict[str, Group] = {}
        self._place: dict[str, Group] = {}
        self._finite: dict[int, list[float]] = {rung: [] for rung in self._rungs}
        self._won: set[int] = set()
        """groups (by id) whose other seeds may run"""

    def admit(self, trials: Mapping[str, TrainConfig]) -> None:
        for trial_id, trial in trials.items():
            if trial.is_reference or trial_id in self._place:
                continue
            group = self._groups.setdefault(trial.model_dump_json(exclude={"seed"}), Group([]))
            (group.leaders if len(group.leaders) < self._config.seeds else group.others).append(trial_id)
            self._place[trial_id] = group

    def observe(self, trial_id: str, step: int, loss: float) -> None:
        """A validation loss of a trial at a step; at the last step nothing is left to decide."""
        if not self._leads(trial_id) or step >= self._steps:
            return
        group = self._place[trial_id]
        for rung in self._rungs:
            known = group.scores.setdefault(rung, {})
            if rung <= step and trial_id not in known:
                known[trial_id] = loss
                score = group.score(rung)
                if score is not None:
                    self._judge(group, rung, score)

    def ended(self, trial_id: str, kind: OutcomeKind, step: int) -> None:
        """A trial ended by itself: a complete group starts its other seeds, a failed one does not."""
        if not self._leads(trial_id):
            return
        group = self._place[trial_id]
        if kind is OutcomeKind.DONE:
            group.exempt = True
            self._won.add(id(group))
            for member in (*group.leaders, *group.others):
                self.stopped.pop(member, None)
        elif kind in GUARD_KINDS | {OutcomeKind.PRUNED} and not group.exempt:
            self._stop(
                group,
                self._rungs[0],
                math.inf,
                math.nan,
                f"not started: its group's first seed ended as {kind} at step {step}",
            )

    def lost(self, trial_id: str) -> None:
        """A fault took the trial: its group is compared with nobody any more in this run."""
        if self._leads(trial_id):
            self._place[trial_id].exempt = True
            self._won.add(id(self._place[trial_id]))

    def is_waiting(self, trial_id: str) -> bool:
        """Whether the trial is another seed of a group that has not won yet."""
        group = self._place.get(trial_id)
        return group is not None and trial_id in group.others and id(group) not in self._won

    def _leads(self, trial_id: str) -> bool:
        return trial_id in self._place and trial_id in self._place[trial_id].leaders

    def _judge(self, group: Group, rung: int, score: float) -> None:
        finite = self._finite[rung]
        if math.isfinite(score):
            finite.append(score)
        if group.exempt or group.leaders[0] in self.stopped or not finite:
            return
        cutoff = sorted(finite)[math.ceil(len(finite) / self._config.reduction) - 1]
        if not score <= cutoff:
            mean = f"{SCORE} {score:.4g}" if math.isfinite(score) else "a seed diverged or shifted"
            self._stop(group, rung, score, cutoff, f"pruned at rung {rung} of the search: {mean}, cutoff {cutoff:.4g}")

    def _stop(self, group: Group, rung: int, score: float, cutoff: float, message: str) -> None:
        lost = pruned(rung, evaluated_at(rung, self._every), score, cutoff, message)
        for leader in group.leaders:
            self.stopped.setdefault(leader, replace(lost, val_loss=group.scores.get(rung, {}).get(leader)))
        for other in group.others:
            told = message if message.startswith("not started") else f"not started: its group was {message}"
            self.stopped.setdefault(other, replace(lost, step=0, message=told))
