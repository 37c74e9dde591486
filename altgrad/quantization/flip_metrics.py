"""Flips: did a weight's integer code change, and how often should it have?

A weight's code is its place on the format's ordered grid. Comparing codes under one scale is exact; comparing
dequantized floats is not (a scale that drifts by 1e-4 moves every float and no code).

| measure | formula | unit |
| --- | --- | --- |
| flip rate | flips / elements | share of the weights |
| stall ratio | 1 - flips / updates | share of the non-zero updates that changed no code |
| flip yield | flips / sum of min(1, abs(change) / spacing) | realised over expected under unbiased rounding |

The stall ratio is high in healthy training too, as most steps are smaller than the spacing. Flip yield
divides by what unbiased rounding would have given, so it stays near 1 while updates arrive and falls to 0
when they are lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.ops import code_index

GRADIENT_THRESHOLD = 1e-10
"""A gradient above this magnitude counts as a non-zero one."""


def compute_stall_ratio(flips: float, updates: float) -> float:
    """1 - flips / updates; 0.0 with no updates."""
    return 1.0 - flips / updates if updates else 0.0


def compute_flip_rate(flips: float, elements: float) -> float:
    """flips / elements; 0.0 with no elements."""
    return flips / elements if elements else 0.0


def flip_yield(flips: float, expected: float) -> float:
    """flips / expected flips; NaN where none were expected, for then the ratio says nothing."""
    return flips / expected if expected else math.nan


def expected_flips(delta: Tensor, spacing: Tensor) -> Tensor:
    """Sum of min(1, |delta| / spacing), both in the weight's unit: 0-d float64."""
    return (delta.abs() / spacing).clamp(max=1.0).sum(dtype=torch.float64)


def count_flips(before_index: Tensor, after_index: Tensor) -> Tensor:
    """Number of codes that differ, 0-d int64."""
    return torch.count_nonzero(before_index != after_index)


@dataclass
class _Snapshot:
    index: Tensor
    fmt: FloatFormat
    scale: float | Tensor
    gradient_updates: int | None


class WeightFlipTracker:
    """Counts flips and updates per layer around an optimizer step; each call waits for the device.

    `update_counts`, `flip_counts` and `element_counts` hold sums per layer since the last `reset`. Updates
    are the weights to which a non-zero change was applied where a mask says so, else those whose gradient
    exceeds 1e-10.
    """

    def __init__(self) -> None:
        self.update_counts: dict[str, int] = {}
        self.flip_counts: dict[str, int] = {}
        self.element_counts: dict[str, int] = {}
        self._snapshots: dict[str, _Snapshot] = {}

    def snapshot_pre_step(
        self,
        name: str,
        weight: Tensor,
        format: str | FloatFormat,
        scale: float | Tensor = 1.0,
        grad: Tensor | None = None,
    ) -> None:
        """Remembers a layer's codes, and its scale, before the step."""
        fmt = get_format(format)
        kept_scale = scale.detach().clone() if isinstance(scale, Tensor) else scale
        updates = None if grad is None else int((grad.detach().abs() > GRADIENT_THRESHOLD).sum())
        self._snapshots[name] = _Snapshot(code_index(weight, fmt, kept_scale), fmt, kept_scale, updates)

    def compute_flips_post_step(
        self,
        name: str,
        weight: Tensor,
        format: str | FloatFormat,
        scale: float | Tensor = 1.0,
        *,
        applied: Tensor | None = None,
    ) -> int:
        """Flips since the snapshot, under the snapshot's scale; adds them and the updates to the layer's
        counts.

        `applied`: bool mask of the weights with a non-zero applied change. Without it and without a gradient
        at the snapshot no updates are counted. ValueError: no snapshot, or one in another format.
        """
        if name not in self._snapshots:
            raise ValueError(f"no snapshot of {name!r}; call snapshot_pre_step before the step")
        before = self._snapshots.pop(name)
        if get_format(format) != before.fmt:
            raise ValueError(f"{name!r} was snapshot in {before.fmt.name}, now {get_format(format).name}: codes differ")
        flips = int(count_flips(before.index, code_index(weight, before.fmt, before.scale)))
        updates = before.gradient_updates if applied is None else int(torch.count_nonzero(applied))
        self.flip_counts[name] = self.flip_counts.get(name, 0) + flips
        self.update_counts[name] = self.update_counts.get(name, 0) + (updates or 0)
        self.element_counts[name] = self.element_counts.get(name, 0) + weight.numel()
        return flips

    def get_stall_ratios(self) -> dict[str, float]:
        """1 - flips / updates per layer."""
        return {name: compute_stall_ratio(self.flip_counts[name], n) for name, n in self.update_counts.items()}

    def get_flip_rates(self) -> dict[str, float]:
        """Flips per weight and step, per layer."""
        return {name: compute_flip_rate(self.flip_counts[name], n) for name, n in self.element_counts.items()}

    def reset(self) -> None:
        """Forgets all counts and snapshots."""
        for counts in (self.update_counts, self.flip_counts, self.element_counts):
            counts.clear()
        self._snapshots.clear()
