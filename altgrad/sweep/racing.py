"""Racing groups of seeds within a cell: successive halving that cannot answer the ablation's question by
accident.

Plain ASHA pools all trials, and then stops exactly the coarse formats whose benefit is the question; a NaN
never stops, and one infinity turns its cutoff into NaN. Here

* a race is held within one cell (task, format, arm, policy): it compares learning rates and the like;
* what competes is a group, the seeds of one set of parameters, scored by the mean validation loss of its
  seeds. It is judged when all of them have reached the rung, and then all stop or none does: no seed pair is
  broken;
* comparison is by rank. A group with a member that diverged, or that a guard ended, ranks behind every finite
  group and lends its value to no cutoff;
* rungs lie at first_rung · reduction^k steps (where first_rung is not given: a reduction² part of the steps,
  and at least one evaluation); of n groups seen at a rung the best ceil(n / reduction) go on. One group alone
  is never stopped, and references never are.

A rung is reached by the first result at or behind its step that carries a validation loss. A group with a
member that has already run to its end is left alone, so racing has an effect only where the seeds of a group
run side by side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from altgrad.sweep.spec import RaceConfig, is_reference
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import GUARD_KINDS, Outcome, OutcomeKind

SCORE = "val_loss"


@dataclass
class Group:
    """The seeds of one set of parameters in one cell."""

    members: list[str]
    cell: str
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    """rung -> member -> validation loss, nats; non-finite where the member has none"""
    judged: set[int] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    unusable: bool = False

    def score(self, rung: int) -> float | None:
        """The mean over the seeds, infinite if any is not finite, None until all have reached the rung."""
        seen = self.scores.get(rung, {})
        if len(seen) < len(self.members):
            return None
        return math.fsum(seen.values()) / len(seen) if all(map(math.isfinite, seen.values())) else math.inf


class Race:
    """Who goes on. Fed with losses and endings in the order in which they come."""

    def __init__(self, trials: Mapping[str, TrainConfig], config: RaceConfig) -> None:
        self._config = config
        self._groups: dict[str, Group] = {}
        self._group_of: dict[str, Group] = {}
        self._stopped: dict[str, Outcome] = {}
        self._last_step = {trial_id: trial.steps for trial_id, trial in trials.items()}
        longest = max(trials.values(), key=lambda trial: trial.steps)
        self._rungs = config.rungs(longest.steps, longest.eval_interval)
        for trial_id, trial in trials.items():
            if is_reference(trial):
                continue
            parameters = trial.model_dump_json(exclude={"seed"})
            group = self._groups.setdefault(parameters, Group([], json.dumps(trial.cell())))
            group.members.append(trial_id)
            self._group_of[trial_id] = group

    def observe(self, trial_id: str, step: int, loss: float) -> None:
        """A validation loss of a trial at a step; at the last step nothing is left to decide."""
        group = self._group_of.get(trial_id)
        if group is None or step >= self._last_step[trial_id]:
            return
        for rung in self._rungs:
            if rung <= step:
                group.scores.setdefault(rung, {}).setdefault(trial_id, loss)
        self._judge(group, step)

    def ended(self, trial_id: str, kind: OutcomeKind, step: int) -> None:
        """A trial ended by itself: a complete one is safe, one that a guard ended ranks last in every rung."""
        group = self._group_of.get(trial_id)
        if group is None:
            return
        if kind is OutcomeKind.DONE:
            group.finished.add(trial_id)
            return
        for rung in self._rungs:
            scores = group.scores.setdefault(rung, {})
            # What a guard ended was failing before it was ended: its earlier numbers decide for nobody either.
            scores[trial_id] = math.inf if kind in GUARD_KINDS else scores.get(trial_id, math.inf)
        self._judge(group, step)

    def lost(self, trial_id: str) -> None:
        """A trial was interrupted by a fault: its group can't be judged fairly any more in this run."""
        if trial_id in self._group_of:
            self._group_of[trial_id].unusable = True

    def verdict(self, trial_id: str) -> Outcome | None:
        """Why the trial has lost its race, or None while it goes on."""
        return self._stopped.get(trial_id)

    def _judge(self, group: Group, step: int) -> None:
        for rung in self._rungs:
            score = group.score(rung)
            if score is None or rung in group.judged:
                continue
            group.judged.add(rung)
            rivals = [other.score(rung) for other in self._groups.values() if other.cell == group.cell]
            scores = sorted(value for value in rivals if value is not None)
            kept = math.ceil(len(scores) / self._config.reduction)
            cutoff = scores[kept - 1]
            if score > cutoff and not group.finished and not group.unusable:
                self._stop(group, rung, step, score, cutoff)

    def _stop(self, group: Group, rung: int, step: int, score: float, cutoff: float) -> None:
        mean = f"mean {SCORE} {score:.4g} of {len(group.members)} seeds" if math.isfinite(score) else \
            "a seed diverged or was ended by a guard"
        for member in group.members:
            self._stopped.setdefault(member, Outcome(
                kind=OutcomeKind.PRUNED, step=step, signal=SCORE, value=score, limit=cutoff, first_seen=rung,
                message=f"pruned at rung {rung}: {mean}, cutoff {cutoff:.4g}"))
