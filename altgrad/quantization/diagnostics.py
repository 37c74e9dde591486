"""How a tensor lies on its format's grid, and how far a step moves it there.

| signal | formula | unit |
| --- | --- | --- |
| stiffness S | 2^(floor(log2 abs(w)) - M); 2^-M without exponent bits | the weight's |
| grid distance | abs(w - nearest grid point) / spacing at w | ULP, 0 to 0.5 within the format's range |
| travel | code after - code before | codes (grid steps), signed |
| codes in use | distinct codes / the format's finite values (both zeros are one) | share |
| stall ratio | updates with round(b + d) = b / updates d that are not 0, where b = round(w) | share |
| stiffness correlation | of log abs(g) with log S over weights where both are finite and not 0 | -1 to 1 |

S is the spacing of an unbounded format of M mantissa bits; the spacing that a real one has is `ulp`, which knows
subnormals and the tensor's scale. Exponents come from frexp, for log2 rounds up just below a power of two. Codes are
compared under one scale; a scale that drifts moves every float and no code.

The stall ratio is high in healthy training too, since most steps are smaller than the spacing: it is reported, and
decided upon only where asked. For weights that the optimizer keeps off the grid (a float32 master) it says what the
format would have kept of this step alone; what happened to the codes is the flips' business.

Elements that are NaN or infinite are left out of every mean, and how many there are is a number of its own. Nothing
here waits for the device or changes its inputs; results are 0-d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.ops import code_index, quantize, ulp

Scale = float | Tensor


class GridAlignment(NamedTuple):
    """Distances to the nearest grid point in ULPs; shares of all elements. 0-d float64, NaN where none is finite."""

    mean_distance: Tensor
    max_distance: Tensor
    share_on_grid: Tensor
    share_beyond: Tensor
    share_nonfinite: Tensor


class UlpTravel(NamedTuple):
    """Travel in codes over elements finite before and after; shares of these. 0-d float64, NaN where there are none."""

    mean: Tensor
    max: Tensor
    signed_mean: Tensor
    share_moved: Tensor
    share_nonfinite: Tensor


class StiffnessCorrelation(NamedTuple):
    """0-d float64; NaN with fewer than two elements, or where either side is constant (a format without exponent)."""

    pearson: Tensor
    spearman: Tensor


class BitStall(NamedTuple):
    """Updates that rounding swallows, and updates: 0-d int64."""

    stalled: Tensor
    updates: Tensor


def compute_stiffness_field(weights: Tensor, format_or_mantissa_bits: str | FloatFormat | int) -> Tensor:
    """S of every weight, of its shape, float32 (float64 for float64 weights); ValueError for negative bits.

    NaN at zero and at NaN, infinite at infinity. A format without exponent bits has 2^-M everywhere but at NaN.
    """
    if isinstance(format_or_mantissa_bits, int):
        mantissa_bits, has_exponent = format_or_mantissa_bits, True
        if mantissa_bits < 0:
            raise ValueError(f"mantissa bits must be 0 or more, got {mantissa_bits}")
    else:
        fmt = get_format(format_or_mantissa_bits)
        mantissa_bits, has_exponent = fmt.mantissa_bits, fmt.exponent_bits > 0
    x = weights.detach()
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    if not has_exponent:
        return torch.where(x.isnan(), x, math.ldexp(1.0, -mantissa_bits))
    stiffness = _power_of_two(_exponent(x) - mantissa_bits).to(x.dtype)
    return torch.where(x.isinf(), math.inf, torch.where(x.isnan() | (x == 0), math.nan, stiffness))


def grid_alignment_statistics(weight: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> GridAlignment:
    """Where a tensor lies between the grid's points; ValueError without elements.

    On the grid is what rounding leaves as it is, bit for bit; beyond are magnitudes above the largest value, whose
    distance counts in that value's spacing.
    """
    fmt, x = get_format(fmt), _elements(weight)
    nearest, finite = quantize(x, fmt, scale), torch.isfinite(x)
    distance = (x.double() - nearest.double()).abs() / ulp(x, fmt, scale).double()
    count = finite.sum()
    return GridAlignment(
        mean_distance=_sum_where(finite, distance) / count,
        max_distance=_max_where(finite, distance),
        share_on_grid=_share(finite & (nearest == x)),
        share_beyond=_share((x / scale).abs() > fmt.max),
        share_nonfinite=_share(~finite),
    )


def ulp_statistics(before: Tensor, after: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> UlpTravel:
    """How far each element's code moved; ValueError without elements or where the shapes differ."""
    old, new = _elements(before), _elements(after)
    if old.shape != new.shape:
        raise ValueError(f"before has the shape {tuple(old.shape)}, after {tuple(new.shape)}")
    finite = torch.isfinite(old) & torch.isfinite(new)
    travel = code_index(new, fmt, scale).double() - code_index(old, fmt, scale)
    count = finite.sum()
    return UlpTravel(
        mean=_sum_where(finite, travel.abs()) / count,
        max=_max_where(finite, travel.abs()),
        signed_mean=_sum_where(finite, travel) / count,
        share_moved=_sum_where(finite, (travel != 0).double()) / count,
        share_nonfinite=_share(~finite),
    )


def gradient_stiffness_correlation(grad: Tensor, weight: Tensor, fmt: str | FloatFormat) -> StiffnessCorrelation:
    """Whether gradients are larger where the grid is coarser: Pearson of the logarithms, Spearman of the ranks."""
    size, stiffness, used = _logarithms(grad, weight, fmt)
    return StiffnessCorrelation(
        pearson=_pearson(size, stiffness, used), spearman=_pearson(_ranks(size, used), _ranks(stiffness, used), used)
    )


def stiffness_pearson(grad: Tensor, weight: Tensor, fmt: str | FloatFormat) -> Tensor:
    """Pearson's half of `gradient_stiffness_correlation`, 0-d, without the sorting that ranks need."""
    return _pearson(*_logarithms(grad, weight, fmt))


def _logarithms(grad: Tensor, weight: Tensor, fmt: str | FloatFormat) -> tuple[Tensor, Tensor, Tensor]:
    """log2 |g|, log2 S but for a constant, and where both are finite; all flat."""
    gradient, x = _elements(grad).flatten(), _elements(weight).flatten()
    if gradient.shape != x.shape:
        raise ValueError(f"grad has the shape {tuple(grad.shape)}, weight {tuple(weight.shape)}")
    used = torch.isfinite(gradient) & torch.isfinite(x) & (gradient != 0) & (x != 0)
    is_constant = get_format(fmt).exponent_bits == 0
    # log2 S is the exponent but for a constant, and no correlation sees a constant.
    stiffness = torch.zeros_like(x).double() if is_constant else _exponent(torch.where(used, x, 1.0)).double()
    size = torch.where(used, gradient.double().abs(), 1.0).log2()
    return size, stiffness, used


def codes_in_use(weight: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> Tensor:
    """Share of the format's finite values that some element rounds to: 0-d float64; what is not finite uses none."""
    fmt, x = get_format(fmt), _elements(weight)
    values = 2 * fmt.max_index + 1
    place = torch.where(torch.isfinite(x), code_index(x, fmt, scale) + fmt.max_index, values).long().flatten()
    used = torch.zeros(values + 1, dtype=torch.float64, device=x.device).index_fill(0, place, 1.0)
    return used[:values].sum() / values


def detect_bit_stall(weight: Tensor, update: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> BitStall:
    """Updates (not 0, finite, on a finite weight) with round(b + update) = b, b = round(weight), and all such updates.

    The sum is made in float32, as a step is. At the range's end an update outwards is stalled too.
    """
    x, delta = _elements(weight), _elements(update)
    if x.shape != delta.shape:
        raise ValueError(f"weight has the shape {tuple(x.shape)}, update {tuple(delta.shape)}")
    base = quantize(x, fmt, scale)
    is_update = (delta != 0) & torch.isfinite(delta) & torch.isfinite(x)
    stays = code_index(base + delta, fmt, scale) == code_index(base, fmt, scale)
    return BitStall((is_update & stays).sum(), is_update.sum())


class BitStallDetector:
    """Adds up stalls and updates per layer between checks; a layer is stalled where their ratio exceeds `threshold`.

    `update` once per training step never waits for the device; `check` fetches all layers at once.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold is a share of the updates in [0, 1), got {threshold}")
        self.threshold = threshold
        self._counts: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor, update: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> BitStall:
        """Takes in one step of a layer, weight as it was before the update."""
        found = detect_bit_stall(weight, update, fmt, scale)
        counts = torch.stack(found)
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts
        return found

    def stall_ratios(self) -> dict[str, Tensor]:
        """Stalled over updates since the last reset, 0-d float64 by layer; 0 with no updates."""
        return {name: counts[0] / counts[1].clamp(min=1).double() for name, counts in self._counts.items()}

    def check(self) -> dict[str, float]:
        """The stalled layers and their ratios; one wait for all."""
        ratios = self.stall_ratios()
        values = torch.stack(list(ratios.values())).tolist() if ratios else []
        return {name: value for name, value in zip(ratios, values, strict=True) if value > self.threshold}

    def reset(self) -> None:
        """Starts the next interval."""
        self._counts.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Stalled and updates by layer, int64 [2]."""
        return {name: counts.clone() for name, counts in self._counts.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._counts = {name: counts.clone() for name, counts in state.items()}


def _elements(x: Tensor) -> Tensor:
    """Float32, detached; ValueError without elements or for integers."""
    if x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"need floating-point elements, got {x.dtype} of the shape {tuple(x.shape)}")
    return x.detach().to(torch.float32)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|), int64; anything where x is 0 or not finite."""
    return torch.frexp(x).exponent.long() - 1


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float64, exact between 2^-1022 and 2^1023 and held there."""
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def _share(mask: Tensor) -> Tensor:
    return mask.sum() / torch.full((), mask.numel(), dtype=torch.float64, device=mask.device)


def _sum_where(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(dtype=torch.float64)


def _max_where(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask.any(), torch.where(mask, values, -math.inf).max(), math.nan)


def _pearson(a: Tensor, b: Tensor, used: Tensor) -> Tensor:
    count = used.sum()
    # From the smallest first: equal values then differ from their mean by exactly 0.
    from_least = [x - torch.where(used, x, math.inf).min() for x in (a, b)]
    from_mean = [torch.where(used, x - _sum_where(used, x) / count, 0.0) for x in from_least]
    spread = [(x * x).sum().sqrt() for x in from_mean]
    return (from_mean[0] * from_mean[1]).sum() / (spread[0] * spread[1])


def _ranks(x: Tensor, used: Tensor) -> Tensor:
    """Ranks among the used elements, ties at their mean, float64: from places in the sorted tensor."""
    keyed = torch.where(used, x, math.inf)
    ordered = keyed.sort().values
    return (torch.searchsorted(ordered, keyed) + torch.searchsorted(ordered, keyed, right=True) + 1).double() / 2.0
