"""The curve of a reference run, as data: what a healthy run's loss and weights were at each step.

Absolute thresholds on ranks don't separate healthy from dying runs (a healthy rank falls severalfold, a dead run
keeps that of its initialization); the same number of a healthy run at the same step does. The reference of a trial is
the BF16 AdamW run of the same model, task, data and seed: equal seeds mean equal initial weights and equal batches, so
losses are compared batch by batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from altgrad.training.record import read_rows


class WeightNumbers(NamedTuple):
    """Of one layer's weight at one step."""

    stable_rank: float
    spectral_norm: float


@dataclass(frozen=True)
class ReferenceCurve:
    """Training losses (nats) and each layer's numbers, by step; `version` is the hash of both."""

    losses: Mapping[int, float]
    layers: Mapping[int, Mapping[str, WeightNumbers]]
    version: str

    def loss(self, step: int) -> float | None:
        """The reference's training loss at the step, None where it has none."""
        return self.losses.get(step)

    def ranks(self, step: int, layer: str) -> WeightNumbers | None:
        """The reference's numbers of a layer at the step, None where they were not measured."""
        return self.layers.get(step, {}).get(layer)

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> ReferenceCurve:
        """From the rows of a run."""
        losses = {row["step"]: row["train_loss"] for row in rows}
        layers = {
            row["step"]: {
                name: WeightNumbers(values["stable_rank"], values["spectral_norm"])
                for name, values in row["layers"].items()
                if "spectral_norm" in values
            }
            for row in rows
            if "layers" in row
        }
        text = json.dumps([losses, layers], sort_keys=True)
        return cls(losses, layers, hashlib.sha256(text.encode()).hexdigest()[:12])

    @classmethod
    def read(cls, folder: Path) -> ReferenceCurve:
        """From a trial's folder; FileNotFoundError where it has no record."""
        return cls.of_rows(read_rows(folder / "metrics.jsonl")[0])
