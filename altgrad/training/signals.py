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
| ulp_travel, bit_position | sum of |code change| and of the signed code changes, codes |
| overflow | weights that wanted to leave the grid, number (resident arms) |
| skipped_tensors | tensors whose gradient was not finite and whose step was left out, number |
| nonfinite_weights | weights that are NaN or infinite, number |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.quantization import FloatFormat, compute_stable_rank, compute_stall_ratio, flip_yield
from altgrad.training.kernels import FIXED, Count
from altgrad.training.optimizer import GridAwareOptimizer


class StepSignals:
    """Accumulates an optimizer's counts per layer and reads the weights once per log interval.

    `formats`: the weights that have one, by layer, as `quantized_parameters` gives them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: GridAwareOptimizer,
        formats: Mapping[str, tuple[nn.Parameter, FloatFormat]],
    ) -> None:
        self._optimizer = optimizer
        self._layers: dict[Tensor, str] = {parameter: name for name, (parameter, _) in formats.items()}
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._ranked: dict[str, Tensor] = {name: parameter for parameter, name in self._layers.items()} or {
            name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        self._sums: dict[tuple[Tensor, ...], Tensor] = {}

    def after_update(self) -> None:
        """Adds the counts of the step just taken; no sync."""
        for parameters, rows in self._optimizer.counted:
            self._sums[parameters] = self._sums[parameters] + rows if parameters in self._sums else rows

    @torch.no_grad()
    def collect(self) -> dict[str, Any]:
        """The signals of the interval that ends here, as plain numbers; starts the next interval."""
        ranks = [compute_stable_rank(parameter.detach()).double() for parameter in self._ranked.values()]
        broken = [(~torch.isfinite(parameter)).sum().double() for parameter in self._names]
        counted = [rows.double().flatten() for rows in self._sums.values()]
        fetched = iter(torch.cat([torch.stack(ranks + broken), *counted]).tolist())
        rank_values = {name: next(fetched) for name in self._ranked}
        broken_values = {name: next(fetched) for name in self._names.values()}
        counts = {
            parameter: {count: next(fetched) for count in Count}
            for parameters in self._sums
            for parameter in parameters
        }
        self._sums = {}
        return self._row(rank_values, broken_values, counts)

    def _row(
        self, ranks: dict[str, float], broken: dict[str, float], counts: dict[Tensor, dict[Count, float]]
    ) -> dict[str, Any]:
        layers: dict[str, dict[str, Any]] = {name: {"stable_rank": rank} for name, rank in ranks.items()}
        of_layers = {self._layers[p]: values for p, values in counts.items() if p in self._layers}
        for name in filter(of_layers.__contains__, self._layers.values()):
            layers[name] |= _counted(of_layers[name]) | {"rescaled": int(of_layers[name][Count.RESCALED])}
        totals = {count: sum(values[count] for values in of_layers.values()) for count in Count}
        row: dict[str, Any] = _counted(totals) if of_layers else {}
        row["stable_rank"] = sum(ranks.values()) / len(ranks) if ranks else math.nan
        row["nonfinite_weights"] = int(sum(broken.values()))
        if row["nonfinite_weights"]:
            row["nonfinite_layer"] = layer_name(next(name for name, count in broken.items() if count))
        skipped = int(sum(values[Count.SKIPPED] for values in counts.values()))
        return row | {"skipped_tensors": skipped, "layers": layers}


def layer_name(parameter: str) -> str:
    """The name of the layer that a weight belongs to."""
    return parameter.removesuffix(".weight")


def _counted(values: dict[Count, float]) -> dict[str, Any]:
    flips, applied = int(values[Count.FLIPS]), int(values[Count.APPLIED])
    return {
        "flips": flips,
        "updates": applied,
        "gradient_updates": int(values[Count.GRADIENT]),
        "overflow": int(values[Count.OVERFLOW]),
        "ulp_travel": int(values[Count.TRAVEL]),
        "bit_position": int(values[Count.POSITION]),
        "stall_ratio": compute_stall_ratio(flips, applied),
        "flip_yield": flip_yield(flips, values[Count.EXPECTED] * 2.0**-FIXED),
    }
