"""Racing groups of seeds within a cell: successive halving that cannot answer the ablation's question by
accident.

Plain ASHA pools all trials, and then stops exactly the coarse formats whose benefit is the question; a NaN
never stops, and one infinity turns its cutoff into NaN. It also judges whoever comes first against nobody, so
that on few cores it saves little and decides by the order of arrival. Here

* a race is held within one cell (task, format, arm, policy): it compares learning rates and the like;
* what competes is a group, the seeds of one set of parameters. Its first `seeds` lead: they run the race, by
  their mean validation loss, and the others start when their group has won. So a comparison can wait until it
  means something (early losses favour what looks good in the warm-up) and still cost little. All of a group
  stop or none does: no seed pair is broken;
* a group pauses at a rung until every group of its cell has come there; then they are compared, once. Which
  ones go on depends on their losses alone, not on how many run at a time or in which order. Waiting costs no
  slot: other cells run meanwhile, and who goes on does so from its checkpoint;
* comparison is by rank. A group with a leader that diverged, that a guard ended, or in which a layer had to be moved
  to another format (its loss is no longer one of its format), ranks behind every finite group, and its value is
  excluded when the cutoff is computed;
* rungs lie at first_rung · reduction^k steps (where first_rung is not given: at 1 / (reduction + 1) of the
  steps, and at least one evaluation); of n groups at a rung the best ceil(n / reduction) go on. One group alone
  is never stopped nor paused, and references never are.

A search for the one best configuration is no ablation and may pool its cells; where its samples come one after another
see `altgrad.sweep.pace.pooled`.

A rung is reached by the first result at or behind its step that carries a validation loss. A group with a
leader that has already run to its end, or that a fault took out, is compared with nobody and left alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from altgrad.sweep.pace.pace import Pace
from altgrad.sweep.space.pacing import RaceConfig, evaluated_at
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import GUARD_KINDS, Outcome, OutcomeKind

SCORE = "val_loss"


def pruned(rung: int, step: int, score: float, cutoff: float, message: str) -> Outcome:
    """How a trial ends that has lost at a rung."""
    return Outcome(OutcomeKind.PRUNED, step, SCORE, None, score, cutoff, rung, message)


@dataclass
class Group:
    """The seeds of one set of parameters in one cell."""

    leaders: list[str]
    others: list[str] = field(default_factory=list)
    """its seeds that start when the race is won"""
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    """rung -> leader -> validation loss, nats; infinite where it has none"""
    exempt: bool = False
    """whether it is compared with nobody"""

    def score(self, rung: int) -> float | None:
        """The mean over the leaders, infinite if any is not finite, None until all have reached the rung."""
        seen = self.scores.get(rung, {})
        if len(seen) < len(self.leaders):
            return None
        return math.fsum(seen.values()) / len(seen) if all(map(math.isfinite, seen.values())) else math.inf


@dataclass
class Cell:
    """Groups that compete, and how many rungs are behind them."""

    groups: list[Group] = field(default_factory=list)
    decided: int = 0


class Race(Pace):
    """Who goes on. Fed with losses and endings; the order in which they come decides nothing.

    `pooled`: all trials are one cell, as a search for the one best configuration wants it.
    """

    def __init__(self, trials: Mapping[str, TrainConfig], config: RaceConfig, *, pooled: bool = False) -> None:
        super().__init__()
        self._config = config
        self._cells: dict[str, Cell] = {}
        self._place: dict[str, tuple[Cell, Group]] = {}
        self._last_step = {trial_id: trial.steps for trial_id, trial in trials.items()}
        longest = max(trials.values(), key=lambda trial: trial.steps)
        self._every = longest.eval_interval
        self._rungs = config.rungs(longest.steps, longest.eval_interval)
        groups: dict[str, Group] = {}
        for trial_id, trial in trials.items():
            if trial.is_reference:
                continue
            cell = self._cells.setdefault("" if pooled else json.dumps(trial.cell()), Cell())
            parameters = trial.model_dump_json(exclude={"seed"})
            if parameters not in groups:
                groups[parameters] = Group([])
                cell.groups.append(groups[parameters])
            group = groups[parameters]
            (group.leaders if len(group.leaders) < config.seeds else group.others).append(trial_id)
            self._place[trial_id] = cell, groups[parameters]

    def observe(self, trial_id: str, step: int, loss: float) -> None:
        """A validation loss of a trial at a step; at the last step nothing is left to decide."""
        if not self._leads(trial_id) or step >= self._last_step[trial_id]:
            return
        cell, group = self._place[trial_id]
        for rung in self._rungs:
            if rung <= step:
                group.scores.setdefault(rung, {}).setdefault(trial_id, loss)
        self._decide(cell)

    def ended(self, trial_id: str, kind: OutcomeKind, step: int) -> None:
        """A trial ended by itself: a complete one is safe, one that a guard ended ranks last in every rung."""
        if not self._leads(trial_id):
            return
        cell, group = self._place[trial_id]
        if kind is OutcomeKind.DONE:
            group.exempt = True
        elif kind in GUARD_KINDS:
            # It was failing before it was ended: its earlier numbers decide for nobody either.
            group.scores |= {rung: group.scores.get(rung, {}) | {trial_id: math.inf} for rung in self._rungs}
        elif kind is OutcomeKind.PRUNED:
            for rung in self._rungs:
                group.scores.setdefault(rung, {}).setdefault(trial_id, math.inf)
        self._decide(cell)

    def lost(self, trial_id: str) -> None:
        """A trial was interrupted by a fault: its group can't be judged fairly any more in this run."""
        if self._leads(trial_id):
            cell, group = self._place[trial_id]
            group.exempt = True
            self._decide(cell)

    def pause_step(self, trial_id: str) -> int | None:
        """The step at which the trial waits for the others of its cell; None where it may run to its end."""
        if not self._leads(trial_id):
            return None
        cell, group = self._place[trial_id]
        if not self._is_racing(cell, group):
            return None
        step = evaluated_at(self._rungs[cell.decided], self._every)
        return step if step < self._last_step[trial_id] else None

    def is_waiting(self, trial_id: str) -> bool:
        """Whether the trial has come as far as it may while others of its cell have not."""
        if trial_id not in self._place:
            return False
        cell, group = self._place[trial_id]
        if not self._leads(trial_id):
            return self._is_racing(cell, group)
        return self.pause_step(trial_id) is not None and trial_id in group.scores.get(self._rungs[cell.decided], {})

    def _leads(self, trial_id: str) -> bool:
        return trial_id in self._place and trial_id in self._place[trial_id][1].leaders

    def _is_racing(self, cell: Cell, group: Group) -> bool:
        rivals = any(other is not group for other in self._racing(cell))
        return rivals and not group.exempt and cell.decided < len(self._rungs)

    def _racing(self, cell: Cell) -> list[Group]:
        return [group for group in cell.groups if not group.exempt and group.leaders[0] not in self.stopped]

    def _decide(self, cell: Cell) -> None:
        while cell.decided < len(self._rungs):
            rung, racing = self._rungs[cell.decided], self._racing(cell)
            scored = [(score, group) for group in racing if (score := group.score(rung)) is not None]
            if len(scored) < len(racing) or len(racing) < 2:
                return
            scores = sorted(score for score, _ in scored)
            cutoff = scores[math.ceil(len(scores) / self._config.reduction) - 1]
            cell.decided += 1
            for score, group in scored:
                if score > cutoff:
                    self._stop(group, rung, score, cutoff)

    def _stop(self, group: Group, rung: int, score: float, cutoff: float) -> None:
        of = f" of {len(group.leaders)} seeds" if len(group.leaders) > 1 else ""
        mean = (
            f"{SCORE} {score:.4g}{of}" if math.isfinite(score) else "a seed diverged, was ended by a guard or shifted"
        )
        message = f"pruned at rung {rung}: {mean}, cutoff {cutoff:.4g}"
        lost = pruned(rung, evaluated_at(rung, self._every), score, cutoff, message)
        for leader in group.leaders:
            self.stopped.setdefault(leader, replace(lost, val_loss=group.scores[rung][leader]))
        for other in group.others:
            self.stopped.setdefault(other, replace(lost, step=0, message=f"not started: its group was {lost.message}"))
