"""Ledgers made by rule, so that a report's claims can be held against what was put in."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from altgrad.sweep.record.ledger import Ledger
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome, OutcomeKind

BASE_LOSS = 2.4
DATA = "0" * 64


@dataclass
class Plan:
    """A sweep to invent: `offset(format, arm, seed)` is nats above BF16, a stop, or None for no run."""

    formats: Sequence[str]
    arms: Sequence[str]
    seeds: int = 2
    steps: int = 100
    offset: Callable[[str, str, int], float | Outcome | None] = lambda *_: 0.0
    policy: str = "uniform"
    start: float | None = None
    """the training loss of every run's first step, nats; None: as the course of the run has it"""
    lrs: Sequence[float] = (3e-3,)
    overrides: dict[str, Any] = field(default_factory=dict)

    def configs(self) -> Iterable[TrainConfig]:
        for name in self.formats:
            for arm in self.arms:
                for lr in self.lrs:
                    for seed in range(self.seeds):
                        optimizer = ARMS[arm].model_copy(update={"lr": lr})
                        yield TrainConfig(
                            format=name,
                            optimizer=optimizer,
                            policy=self.policy,
                            seed=seed,
                            steps=self.steps,
                            **self.overrides,
                        )


def stall(step: int = 30, value: float = 0.05, layer: str = "lm_head") -> Outcome:
    """A stop by the flip-yield guard."""
    message = f"flip_yield was {value}"
    return Outcome(OutcomeKind.STALLED, step, "flip_yield", layer, value, 0.2, step - 20, message)


def explode(step: int = 12, value: float = math.inf) -> Outcome:
    """A stop by a loss that is no number."""
    message = "train_loss is not finite"
    return Outcome(OutcomeKind.NONFINITE, step, "train_loss", None, value, None, step, message)


def write_ledger(out_dir: Path, plan: Plan, manifest: dict[str, Any] | None = None) -> Path:
    """Records the plan's trials in out_dir/ledger.sqlite and returns out_dir."""
    with Ledger(out_dir / "ledger.sqlite") as ledger:
        configs = {config.trial_id(DATA): config for config in plan.configs()}
        ledger.add_trials(configs, DATA)
        for trial_id, config in configs.items():
            result = plan.offset(config.format, config.arm, config.seed)
            if result is None:
                continue
            rows = _rows(config, result)
            if plan.start is not None:
                rows[0]["train_loss"] = plan.start
            ledger.record_rows(trial_id, rows)
            ledger.record_outcome(trial_id, result if isinstance(result, Outcome) else _done(config, result))
    if manifest is not None:
        (out_dir / "sweep.json").write_text(json.dumps(manifest))
    return out_dir


def _done(config: TrainConfig, offset: float) -> Outcome:
    return Outcome(OutcomeKind.DONE, config.steps, seconds=4.2, **_evaluation(config, offset))


def _evaluation(config: TrainConfig, offset: float) -> dict[str, float]:
    loss = BASE_LOSS + 0.03 * config.seed + offset
    return {"train_loss": loss, "val_loss": loss, "bits_per_byte": loss / math.log(2)}


def _rows(config: TrainConfig, result: float | Outcome) -> list[dict[str, Any]]:
    offset = 0.6 if isinstance(result, Outcome) else result
    count = min(result.step, config.steps) if isinstance(result, Outcome) else config.steps
    noise = np.random.default_rng(config.seed).normal(0, 0.05, config.steps)
    cell = zlib.crc32(f"{config.format}{config.arm}".encode())
    own = np.random.default_rng(cell).normal(0, 0.02, config.steps)
    rows = []
    for step in range(1, count + 1):
        done = step / config.steps
        course = 3.1 * math.exp(-6 * done) + offset * (1 - math.exp(-3 * done))
        loss = BASE_LOSS + course + noise[step - 1] + own[step - 1]
        healthy = 0.95 - 0.02 * config.seed + own[step - 1]
        stalled = isinstance(result, Outcome) and result.signal == "flip_yield"
        flip_yield = 0.9 * math.exp(-step / 8) if stalled else healthy
        rows.append(
            {
                "step": step,
                "train_loss": loss,
                "flip_yield": flip_yield,
                "stall_ratio": 0.9,
                "stable_rank": 12.0,
                "layers": {},
            }
        )
    if isinstance(result, Outcome) and result.signal == "train_loss":
        rows[-1]["train_loss"] = result.value
    if not isinstance(result, Outcome):
        rows[-1] |= _evaluation(config, result)
    return rows
