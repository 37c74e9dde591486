"""Population-based training: the members of a cell learn from each other's learning rates while they train.

A population is the trials that differ in learning rate and rung clip alone: one format, arm, policy, setting and seed.
Every `interval` steps its members wait for each other, each with a checkpoint. Then the worst take over weights,
optimizer state and values from the best, and go on with these values times one of `factors` (exploit and explore,
arXiv 1711.09846). Seeds have populations of their own, so replicates stay independent and paired.

Which member takes over from which, and the factors, follow from the losses, the names of the members and the step
alone: neither the order of arrival nor an interruption changes them. An exchange is entered in the ledger before a
checkpoint is touched, and marked once all of it is done; none of the members goes on before that. What takes over and
what is taken over from are different members, so an exchange that was interrupted is done again from the same states.

Since a member's numbers depend on all of its population, its id does too, and begins with `pbt-`: it is never taken for
the trial that its first values name. A member that a guard ended leaves the population; with fewer than two left, or
before the last step, nothing is exchanged. A cell with a single member is no population and keeps its ordinary id.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from altgrad.sweep.pace.pace import Pace
from altgrad.sweep.record.ledger import Ledger, is_settled
from altgrad.sweep.space.pacing import PbtConfig
from altgrad.sweep.space.populations import FIELDS, PREFIX, population_of
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.checkpoint import load_checkpoint, save_checkpoint
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import GUARD_KINDS, OutcomeKind


class Mutation(NamedTuple):
    """At `step` the trial took over from `source` and went on with `after` where it had `before`."""

    trial_id: str
    step: int
    field: str
    before: float
    after: float
    source: str


@dataclass
class Members:
    """One population; `values` are the current ones by member and field, `scores` validation losses by step, nats."""

    names: list[str] = field(default_factory=list)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    exchanged: set[int] = field(default_factory=set)
    sources: dict[tuple[str, int], str] = field(default_factory=dict)
    """from whom a member took over at a step"""

    @property
    def present(self) -> list[str]:
        return [name for name in self.names if name not in self.gone]

    def take_over(self, exchange: Sequence[Mutation]) -> None:
        """Enters what has been exchanged at a step."""
        for item in exchange:
            self.values[item.trial_id][item.field] = item.after
            self.sources[item.trial_id, item.step] = item.source
            self.exchanged.add(item.step)


class Population(Pace):
    """All populations of a sweep, as they stand after what the ledger holds; fed and asked like a race."""

    hands_over = True

    def __init__(self, trials: Mapping[str, TrainConfig], spec: SweepSpec, ledger: Ledger, folder: Path) -> None:
        super().__init__()
        self._config: PbtConfig = spec.pbt
        self.most_pauses = spec.base.steps // spec.exchange_every
        self._steps, self._every = spec.base.steps, spec.exchange_every
        self._ledger, self._folder = ledger, folder
        self._trials = trials
        self._place: dict[str, Members] = {}
        populations: dict[str, Members] = {}
        for trial_id, config in trials.items():
            if trial_id.startswith(PREFIX):
                members = populations.setdefault(population_of(config), Members())
                members.names.append(trial_id)
                own = {name: getattr(config.optimizer, name, None) for name in FIELDS}
                members.values[trial_id] = {name: value for name, value in own.items() if value is not None}
                self._place[trial_id] = members
        for members in populations.values():
            self._restore(members)

    def observe(self, trial_id: str, step: int, loss: float) -> None:
        """A validation loss of a member at a step, whose checkpoint is written."""
        if trial_id in self._place and step % self._every == 0:
            members = self._place[trial_id]
            members.scores.setdefault(step, {})[trial_id] = loss
            self._exchange_if_due(members)

    def ended(self, trial_id: str, kind: OutcomeKind, step: int) -> None:
        """A member ended by itself: one that a guard ended leaves."""
        if trial_id in self._place and kind in GUARD_KINDS:
            self.lost(trial_id)

    def lost(self, trial_id: str) -> None:
        """A fault took the member; the others go on without it."""
        if trial_id in self._place:
            self._place[trial_id].gone.add(trial_id)
            self._exchange_if_due(self._place[trial_id])

    def source(self, trial_id: str, step: int) -> str | None:
        """The member whose checkpoint the trial took over at the step; None where it kept its own."""
        return self._place[trial_id].sources.get((trial_id, step)) if trial_id in self._place else None

    def pause_step(self, trial_id: str) -> int | None:
        """The step at which the member waits for the others; None where nothing more is exchanged."""
        members = self._place.get(trial_id)
        return None if members is None else self._due(members)

    def is_waiting(self, trial_id: str) -> bool:
        """Whether the member has come to the exchange and others have not."""
        due = self.pause_step(trial_id)
        return due is not None and trial_id in self._place[trial_id].scores.get(due, {})

    def adjusted(self, trial_id: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The member's request with its current values in the configuration."""
        if trial_id not in self._place:
            return dict(request)
        config = json.loads(request["config"])
        config["optimizer"] |= self._place[trial_id].values[trial_id]
        return dict(request) | {"config": json.dumps(config)}

    def _due(self, members: Members) -> int | None:
        if len(members.present) < 2:
            return None
        open_steps = (step for step in range(self._every, self._steps, self._every) if step not in members.exchanged)
        return next(open_steps, None)

    def _restore(self, members: Members) -> None:
        outcomes = self._ledger.outcomes_of(members.names)
        for name, outcome in outcomes.items():
            if outcome.kind in GUARD_KINDS and is_settled(outcome, self._trials[name]):
                members.gone.add(name)
        known, unfinished = self._ledger.mutations(members.names)
        for step in sorted({mutation[1] for mutation in known}):
            exchange = [Mutation(*mutation) for mutation in known if mutation[1] == step]
            if step in unfinished:
                self._apply(exchange)
            members.take_over(exchange)
        for name in members.names:
            for step, loss in self._ledger.scores(name):
                if step % self._every == 0:
                    members.scores.setdefault(step, {})[name] = loss
        self._exchange_if_due(members)

    def _exchange_if_due(self, members: Members) -> None:
        while (step := self._due(members)) is not None:
            arrived = members.scores.get(step, {})
            if any(name not in arrived for name in members.present):
                return
            exchange = self._choose(members, step)
            # A driver that was killed may have recorded the step without the checkpoint: it is trained again.
            stale = [name for name in {item.source for item in exchange} if self._checkpoint_step(name) != step]
            for name in stale:
                del arrived[name]
            if stale:
                return
            self._ledger.add_mutations(exchange)
            self._apply(exchange)
            members.take_over(exchange)

    def _choose(self, members: Members, step: int) -> list[Mutation]:
        losses = members.scores[step]
        ranked = sorted(members.present, key=lambda name: (_rank(losses[name]), name))
        count = max(1, int(len(ranked) * self._config.quantile))
        exchange = []
        for name in ranked[-count:]:
            generator = random.Random(f"{name}:{step}")
            source = generator.choice(ranked[:count])
            for field_name, before in members.values[name].items():
                after = members.values[source][field_name] * generator.choice(self._config.factors)
                exchange.append(Mutation(name, step, field_name, before, after, source))
        return exchange

    def _apply(self, exchange: Sequence[Mutation]) -> None:
        """Writes the takers' checkpoints, then notes that all are written."""
        for taker in dict.fromkeys(item.trial_id for item in exchange):
            own = [item for item in exchange if item.trial_id == taker]
            state = load_checkpoint(self._folder / own[0].source / "checkpoint")
            before = load_checkpoint(self._folder / taker / "checkpoint")
            assert state is not None, "a member that has come to an exchange has a checkpoint"
            state["seconds"] = state["seconds"] if before is None else before["seconds"]
            for group in state["optimizer"]["param_groups"]:
                group.update({item.field: item.after for item in own if item.field in group})
            save_checkpoint(self._folder / taker / "checkpoint", state)
        self._ledger.mutations_applied(exchange)

    def _checkpoint_step(self, name: str) -> int | None:
        state = load_checkpoint(self._folder / name / "checkpoint")
        return None if state is None else int(state["step"])


def _rank(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
