"""What a search optimizes: a trial's signals as numbers that an optimizer may be told.

A trial that a guard ended, whose loss is no number, or of which a layer had to be moved to another format, is a result,
and a bad one: it counts as worse than any other, by a finite number, so that what is told stays a number and the search
learns to stay away. A trial that a fault ended
says nothing of its configuration; it has no value.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from altgrad.sweep.record.ledger import Ledger, is_settled
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import OutcomeKind


class Objective(NamedTuple):
    """Which way is better, and what stands for a run that failed."""

    direction: Literal["minimize", "maximize"]
    worst: float


OBJECTIVES = {
    "val_loss": Objective("minimize", 1e3),
    "bits_per_byte": Objective("minimize", 1e3),
    "flip_yield": Objective("maximize", 0.0),
    "val_f1_micro": Objective("maximize", 0.0),
}
"""Signals that a search may be told, with the unit of `worst` that of the signal."""


def value_of(ledger: Ledger, trial_id: str, config: TrainConfig, objective: str) -> float | None:
    """What the trial is worth at `config.steps`; None where it has no result, or the signal was never measured."""
    outcome = ledger.outcomes_of([trial_id]).get(trial_id)
    if outcome is None or not is_settled(outcome, config):
        return None
    if outcome.kind not in (OutcomeKind.DONE, OutcomeKind.PRUNED) and outcome.step <= config.steps:
        return OBJECTIVES[objective].worst
    if ledger.formats_at(trial_id, config.steps):
        return OBJECTIVES[objective].worst
    measured = [value for step, value in ledger.signal(trial_id, objective) if step <= config.steps]
    if not measured:
        return None
    return measured[-1] if math.isfinite(measured[-1]) else OBJECTIVES[objective].worst
