"""What the weights look like: ranks, how they lie on the grid, whether they are numbers at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad.quantization import (
    RankGauge,
    codes_in_use,
    count_nonfinite,
    format_scale,
    grid_alignment_statistics,
    ulp,
    weight_grid,
)
from altgrad.quantization.formats import FloatFormat
from altgrad.training.catalogue import SIGNALS
from altgrad.training.observers.base import Layers, Moment, Observer, Readings, Subject
from altgrad.training.reference import ReferenceCurve


def grid_scale(parameter: Tensor, fmt: FloatFormat) -> Tensor:
    """The scale under which a weight's codes are read: its grid's, else that of its amax."""
    own = weight_grid(parameter).scale
    if own is not None:
        return own
    return format_scale(parameter.detach(), fmt)


class RankObserver(Observer):
    """Stable rank and spectral norm at every check, the other ranks where the check is exact.

    `rank_drop` is the share lost since the first check whose rank was above 0; ratios are held against the reference's
    numbers at the same step, where it has them. `spread` is what tells a collapse from a head that is always nearly of
    rank one: a tied head's stable rank falls to 1.1 in healthy runs (spread .1), and to 1.00 when it collapses.
    """

    def __init__(self, subject: Subject, exact_every: int, reference: ReferenceCurve | None) -> None:
        self._weights, self._reference = subject.watched, reference
        self._critical = frozenset(subject.critical)
        self._gauge = RankGauge(exact_every)
        self._first: dict[str, float] = {}
        self._step = 0

    def start_step(self, moment: Moment) -> None:
        self._step = moment.step

    def collect(self) -> Readings:
        measured = self._gauge.measure({name: weight.detach() for name, weight in self._weights.items()})
        return {
            (name, signal): getattr(numbers, signal)
            for name, numbers in measured.items()
            for signal in ("stable_rank", "spectral_norm", "effective_rank", "variance_rank")
            if hasattr(numbers, signal)
        }

    def finish(self, layers: Layers, row: dict[str, Any]) -> None:
        for name in self._weights:
            values = layers[name]
            rank = values["stable_rank"]
            if rank > 0 and math.isfinite(rank):
                self._first.setdefault(name, rank)
            values["rank_drop"] = 1 - rank / self._first[name] if name in self._first else 0.0
            if name in self._critical:
                values["critical_rank_drop"] = values["rank_drop"]
            values["spread"] = _spread(rank)
            expected = self._reference.ranks(self._step, name) if self._reference else None
            if expected is not None:
                values["rank_ratio"] = _ratio(rank, expected.stable_rank)
                values["spread_ratio"] = _ratio(values["spread"], _spread(expected.stable_rank))
                values["spectral_ratio"] = _ratio(values["spectral_norm"], expected.spectral_norm)

    def state_dict(self) -> dict[str, Any]:
        return {"gauge": self._gauge.state_dict(), "first": dict(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._gauge.load_state_dict(state["gauge"])
        self._first = dict(state["first"])


def _spread(rank: float) -> float:
    """Share of the energy outside the first direction; a zero matrix has none."""
    return max(0.0, 1.0 - 1.0 / rank) if rank else 0.0


def _ratio(value: float, expected: float) -> float:
    return value / expected if expected else math.nan


class CatalogueObserver(Observer):
    """Signals that the catalogue itself says how to measure on a weight, at checks or on the rarer schedule."""

    def __init__(self, subject: Subject) -> None:
        self._weights = subject.watched
        self._is_detail = False

    def start_step(self, moment: Moment) -> None:
        self._is_detail = moment.detail

    def collect(self) -> Readings:
        due = {
            name: signal.of_weight
            for name, signal in SIGNALS.items()
            if signal.of_weight is not None and (signal.schedule == "check" or self._is_detail)
        }
        return {
            (layer, name): measure(weight.detach())
            for layer, weight in self._weights.items()
            for name, measure in due.items()
        }


class NonfiniteObserver(Observer):
    """Weights that are NaN or infinite, and the first layer that has any."""

    def __init__(self, subject: Subject) -> None:
        self._parameters = {
            name.removesuffix(".weight"): parameter for name, parameter in subject.model.named_parameters()
        }

    def collect(self) -> Readings:
        return {
            (name, "_nonfinite"): count_nonfinite(parameter.detach()) for name, parameter in self._parameters.items()
        }

    def finish(self, layers: Layers, row: dict[str, Any]) -> None:
        broken = {name: int(layers[name].pop("_nonfinite")) for name in self._parameters}
        row["nonfinite_weights"] = sum(broken.values())
        if row["nonfinite_weights"]:
            row["nonfinite_layer"] = next(name for name, count in broken.items() if count)


class GridObserver(Observer):
    """How the weights lie on their format's grid, on the rarer schedule."""

    def __init__(self, subject: Subject) -> None:
        self._formats = dict(subject.formats)
        self._due = False

    def start_step(self, moment: Moment) -> None:
        self._due = moment.detail

    def collect(self) -> Readings:
        found: Readings = {}
        for name, (parameter, fmt) in self._formats.items() if self._due else ():
            weight = parameter.detach()
            scale = grid_scale(parameter, fmt)
            alignment = grid_alignment_statistics(weight, fmt, scale)
            spacing = ulp(weight, fmt, scale).log2()
            found[name, "stiffness"] = torch.where(weight != 0, spacing, torch.nan).nanmean()
            found[name, "grid_distance"] = alignment.mean_distance
            found[name, "on_grid"] = alignment.share_on_grid
            found[name, "codes_in_use"] = codes_in_use(weight, fmt, scale)
        return found
