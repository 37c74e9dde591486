"""What a step did to the codes: sums of what the optimizer counted in its own pass, over the steps of an interval."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altgrad.quantization import compute_flip_rate, compute_stall_ratio, flip_yield
from altgrad.training.kernels import FIXED, Count
from altgrad.training.observers.base import Layers, Observer, Readings, Subject

_RAW = {count: f"_{count.name.lower()}" for count in Count}
"""Names under which sums travel to the host; a leading underscore keeps them out of the row."""


class CountsObserver(Observer):
    """Flips, updates, stall ratio, flip yield, travel and the like, by layer and over all."""

    def __init__(self, subject: Subject) -> None:
        self._optimizer, self._epoch = subject.optimizer, subject.epoch
        self._layers: dict[Tensor, str] = {parameter: name for name, parameter in subject.rounded.items()}
        self._sums: dict[tuple[Tensor, ...], Tensor] = {}
        self._steps = 0

    def after_update(self) -> None:
        for parameters, rows in self._optimizer.counted:
            self._sums[parameters] = self._sums[parameters] + rows if parameters in self._sums else rows
        self._steps += 1

    def collect(self) -> Readings:
        found: Readings = {}
        for parameters, rows in self._sums.items():
            for parameter, row in zip(parameters, rows.unbind(), strict=True):
                name = self._layers.get(parameter)
                if name is not None:
                    found |= {(name, _RAW[count]): value for count, value in zip(Count, row.unbind(), strict=True)}
        skipped = [rows[:, Count.SKIPPED].sum() for rows in self._sums.values()]
        found["", "skipped_tensors"] = torch.stack(skipped).sum() if skipped else torch.zeros((), dtype=torch.float32)
        self._sums = {}
        return found

    def finish(self, layers: Layers, row: dict[str, Any]) -> None:
        steps, self._steps = self._steps, 0
        totals: dict[Count, float] = dict.fromkeys(Count, 0.0)
        weights = 0
        for name, values in layers.items():
            if _RAW[Count.FLIPS] not in values:
                continue
            sums = {count: values.pop(_RAW[count]) for count in Count}
            size = self._size(name)
            values |= self._signals(sums, size * steps)
            values["rescaled"] = int(sums[Count.RESCALED])
            values["frozen"] = int(sums[Count.GRADIENT] > 0 and sums[Count.APPLIED] == 0 and not sums[Count.SKIPPED])
            totals = {count: totals[count] + sums[count] for count in Count}
            weights += size
        if weights:
            row |= self._signals(totals, weights * steps)
        row["skipped_tensors"] = int(row["skipped_tensors"])

    def _size(self, name: str) -> int:
        return next(parameter.numel() for parameter, own in self._layers.items() if own == name)

    def _signals(self, sums: dict[Count, float], chances: int) -> dict[str, Any]:
        """The signals of sums over an interval in which `chances` elements could have moved."""
        flips, applied = int(sums[Count.FLIPS]), int(sums[Count.APPLIED])
        rate = compute_flip_rate(flips, chances)
        return {
            "flips": flips,
            "updates": applied,
            "gradient_updates": int(sums[Count.GRADIENT]),
            "overflow": int(sums[Count.OVERFLOW]),
            "ulp_travel": int(sums[Count.TRAVEL]),
            "bit_position": int(sums[Count.POSITION]),
            "flip_rate": rate,
            "flip_rate_per_epoch": rate * self._epoch,
            "stall_ratio": compute_stall_ratio(flips, applied),
            "flip_yield": flip_yield(flips, sums[Count.EXPECTED] * 2.0**-FIXED),
            "zero_updates": 1.0 - applied / chances,
        }
