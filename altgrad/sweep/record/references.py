"""Which reference each trial is held against.

The reference of a trial is the BF16 AdamW run of the same model, task, data and seed. Where an axis of learning rates
gives several, it is the one whose learning rate is nearest (on a logarithmic scale, the lower of two): ranks and norms
depend on it. Of several with that rate (an axis of beta2, say) it is the one that shares most of the trial's values. A
trial starts when its reference has ended, so that what it is held against is the same in every run
of the sweep; a reference that did not reach its end is no measure, and the trial then runs without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from altgrad.training.config import BASELINE, TrainConfig

SHARED = ("task", "model", "data", "schedule", "clip_grad_norm", "seed", "interventions")


def references(trials: Mapping[str, TrainConfig]) -> dict[str, str]:
    """Trial to its reference, by id; trials without one, and references themselves, are left out."""
    by_setting: dict[str, list[str]] = {}
    for trial_id, config in trials.items():
        if config.is_reference and config.format == BASELINE:
            by_setting.setdefault(_setting(config), []).append(trial_id)
    found = {}
    for trial_id, config in trials.items():
        rivals = [] if config.is_reference else by_setting.get(_setting(config), [])
        if rivals:
            found[trial_id] = min(rivals, key=lambda rival: _distance(trials[rival], config))
    return found


def _setting(config: TrainConfig) -> str:
    return config.model_dump_json(include=set(SHARED))


def _distance(reference: TrainConfig, config: TrainConfig) -> tuple[float, float, int]:
    lr = reference.optimizer.lr
    theirs, own = reference.optimizer.model_dump(), config.optimizer.model_dump()
    differing = sum(theirs[name] != own[name] for name in theirs.keys() & own.keys() - {"kind", "lr", "rounding"})
    return round(abs(math.log(lr / config.optimizer.lr)), 9), lr, differing
