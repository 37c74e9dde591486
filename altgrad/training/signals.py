"""Observers: what can be seen on a step without changing it.

They read what the optimizer counted in its own pass, hold 0-d tensors between log intervals, and fetch everything of
an interval in one host sync. Nothing here may change a bit of the training; a test holds that. Windows count training
steps: the counts of a row are sums over the steps since the row before.

| signal | meaning, unit |
| --- | --- |
| flips | weights whose integer code changed, number |
| updates | weights to which a non-zero change was applied, number |
| gradient_updates | weights with |gradient| > 1e-10, number |
| stall_ratio | 1 - flips / updates; 0 with no updates (the literal definition) |
| flip_yield | flips / sum of min(1, |change| / spacing): realised over expected under unbiased rounding |
| stable_rank | squared Frobenius norm over squared spectral norm; of the row: the mean over layers |
| overflow | weights that wanted to leave the grid, number (resident arms) |
| skipped_tensors | tensors whose gradient was not finite and whose step was left out, number |
| nonfinite_weights | weights that are NaN or infinite, number |
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.quantization import compute_stable_rank, compute_stall_ratio, flip_yield, quantized_parameters
from altgrad.training.optimizer import GridAwareOptimizer

COUNTS = ("flips", "applied", "gradient", "expected", "overflow")


class StepSignals:
    """Accumulates an optimizer's counts per layer and reads the weights once per log interval."""

    def __init__(self, model: nn.Module, optimizer: GridAwareOptimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._layers = {name: parameter for name, (parameter, _) in quantized_parameters(model).items()}
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._ranked: dict[str, Tensor] = dict(self._layers) or {
            name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        self._sums: dict[str, Tensor] = {}
        self._rescaled: dict[str, int] = {}
        self._skipped = 0

    def after_update(self) -> None:
        """Adds the counts of the step just taken; no sync."""
        self._skipped += self._optimizer.skipped
        for name, parameter in self._layers.items():
            counts = self._optimizer.counts.get(parameter)
            if counts is None:
                continue
            values = torch.stack([getattr(counts, field).double() for field in COUNTS])
            self._sums[name] = self._sums[name] + values if name in self._sums else values
            self._rescaled[name] = self._rescaled.get(name, 0) + counts.rescaled

    @torch.no_grad()
    def collect(self) -> dict[str, Any]:
        """The signals of the interval that ends here, as plain numbers; starts the next interval."""
        ranks = [compute_stable_rank(parameter.detach()).double() for parameter in self._ranked.values()]
        broken = [(~torch.isfinite(parameter)).sum().double() for parameter in self._names]
        fetched = torch.cat([torch.stack(ranks + broken), *self._sums.values()]).tolist()
        rank_values = dict(zip(self._ranked, fetched, strict=False))
        broken_values = dict(zip(self._names.values(), fetched[len(ranks) :], strict=False))
        counted = fetched[len(ranks) + len(broken) :]
        width = len(COUNTS)
        sums = {name: counted[i * width : (i + 1) * width] for i, name in enumerate(self._sums)}
        row = self._row(rank_values, broken_values, sums)
        self._sums, self._rescaled, self._skipped = {}, {}, 0
        return row

    def _row(
        self, ranks: dict[str, float], broken: dict[str, float], sums: dict[str, list[float]]
    ) -> dict[str, Any]:
        layers: dict[str, dict[str, Any]] = {name: {"stable_rank": rank} for name, rank in ranks.items()}
        for name, values in sums.items():
            layers[name] |= _counted(values) | {"rescaled": self._rescaled[name]}
        totals = [sum(column) for column in zip(*sums.values(), strict=True)] if sums else None
        row: dict[str, Any] = _counted(totals) if totals else {}
        row["stable_rank"] = sum(ranks.values()) / len(ranks) if ranks else math.nan
        row["nonfinite_weights"] = int(sum(broken.values()))
        if row["nonfinite_weights"]:
            row["nonfinite_layer"] = layer_name(next(name for name, count in broken.items() if count))
        return row | {"skipped_tensors": self._skipped, "layers": layers}


def layer_name(parameter: str) -> str:
    """The name of the layer that a weight belongs to."""
    return parameter.removesuffix(".weight")


def _counted(values: list[float]) -> dict[str, Any]:
    flips, applied, gradient, expected, overflow = values
    return {
        "flips": int(flips),
        "updates": int(applied),
        "gradient_updates": int(gradient),
        "overflow": int(overflow),
        "stall_ratio": compute_stall_ratio(int(flips), int(applied)),
        "flip_yield": flip_yield(flips, expected),
    }
