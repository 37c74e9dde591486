"""What one tensor says: its range under a format, its tails, its gradient, its update, its units that stay silent.

| signal | formula | unit |
| --- | --- | --- |
| amax | max abs(x) | the tensor's |
| overflow | elements that would round beyond the largest value, infinities too | share of the elements |
| underflow | elements not 0 that round to a zero of either sign | share of the elements |
| saturation | elements that round to the largest magnitude | share of the elements |
| SQNR | 10 log10(sum x^2 / sum (x - round(x))^2) | dB; infinite where rounding changes nothing |
| kurtosis | E[(x - mean)^4] / E[(x - mean)^2]^2 | 3 for a normal tensor; outliers raise it |
| L2, L-infinity | sqrt(sum g^2), max abs(g) | the gradient's |
| SNR of a gradient | abs(mean) / standard deviation over its elements | ratio |
| SNR over steps | sqrt(sum m^2 / sum (v - m^2)), m and v the running means of g and g^2 | ratio |
| dead fraction | units whose gradients stayed below 1e-8 for 100 steps | share of the units |
| zero updates | elements whose update is 0 | share of the elements |
| update to weight | RMS(update) / RMS(weight); healthy between 1e-4 and 1e-2 | ratio |
| amax jump | amax / its moving average before | ratio |

Kurtosis of activations was seen to grow long before a training in FP8 diverged (FOG, arXiv 2505.20524).

A unit is a row of the weight, an output neuron. Overflow is meant as in IEEE 754: the magnitude lies more than half
a spacing beyond the largest value; so an amax mapped onto that value, and off it by a rounding of the scale, is none.

Sums are float64. Elements that are NaN or infinite are left out of SQNR and of the moving averages, and counted;
they make amax, kurtosis, norms and ratios NaN or infinite, as they should. Nothing here waits for the device or
changes its inputs; results are 0-d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.kernels.dispatch import scalar
from altgrad.quantization.ops import quantize

Scale = float | Tensor

DEAD_THRESHOLD = 1e-8
DEAD_STEPS = 100


class RangeStatistics(NamedTuple):
    """A tensor under a format and scale: amax in the tensor's unit, SQNR in dB, shares of all elements; 0-d float64."""

    amax: Tensor
    overflow: Tensor
    underflow: Tensor
    saturation: Tensor
    sqnr_db: Tensor
    nonfinite: Tensor


class GradientStatistics(NamedTuple):
    """Norms, SNR over elements, shares of zeros and of elements not finite; 0-d float64."""

    l2: Tensor
    linf: Tensor
    snr: Tensor
    zero: Tensor
    nonfinite: Tensor


class UpdateStatistics(NamedTuple):
    """Share of zero updates and RMS(update) / RMS(weight), infinite on a zero weight; 0-d float64."""

    zero: Tensor
    rms_ratio: Tensor


class AmaxAverage(NamedTuple):
    """Moving average of an amax, and the amax over the average before it; NaN where there is none yet."""

    mean: Tensor
    jump: Tensor


def range_statistics(
    x: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0, amax: Tensor | None = None
) -> RangeStatistics:
    """How much of a tensor of any role a format covers under this scale; ValueError without elements.

    `amax`: max abs(x), 0-d, where it is known.
    """
    fmt, x = get_format(fmt), _elements(x)
    amax = _amax(x) if amax is None else amax.double()
    rounded, finite = quantize(x, fmt, scale), (x - x) == 0  # NaN differs from itself, and so does inf - inf
    largest = torch.as_tensor(scale, dtype=torch.float32, device=x.device) * fmt.max
    # The difference of a number and its neighbour on the grid is exact; beyond the range it is rounded.
    power = [_length(torch.where(finite, values, 0.0)).square() for values in (x, x - rounded)]
    at_ends = torch.count_nonzero(rounded == largest) + torch.count_nonzero(rounded == -largest)
    return RangeStatistics(
        amax=amax,
        overflow=overflow_share(x, fmt, scale, amax),
        underflow=(torch.count_nonzero(x) - torch.count_nonzero(rounded)).double() / x.numel(),
        saturation=at_ends.double() / x.numel(),
        sqnr_db=10.0 * (power[0] / power[1]).log10(),
        nonfinite=1.0 - _share(finite),
    )


def overflow_share(x: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0, amax: Tensor | None = None) -> Tensor:
    """The `overflow` of `range_statistics` alone: 0-d float64; on a CPU only the amax is taken where none can be."""
    x, limit = _elements(x), _overflow_limit(get_format(fmt))
    has_one_scale = not isinstance(scale, Tensor) or scale.numel() == 1
    amax = _amax(x) if amax is None and has_one_scale else amax
    peak = None if amax is None or not has_one_scale else scalar(amax.float() / scale)
    if peak is not None and peak <= limit:
        return torch.zeros((), dtype=torch.float64)
    return _share((x / scale).abs() > limit)


def activation_kurtosis(x: Tensor) -> Tensor:
    """Fourth standardized moment over all elements: 0-d float64, NaN for a constant or non-finite tensor."""
    values = _elements(x).double()
    square = (values - values.mean()).square()  # 0 for a constant: float32s add up exactly in float64
    return square.square().mean() / square.mean().square()


def gradient_statistics(grad: Tensor) -> GradientStatistics:
    """One step's gradient; ValueError without elements."""
    gradient = _elements(grad)
    wide = gradient.double()
    mean = wide.mean()
    deviation = torch.linalg.vector_norm(wide - mean) / math.sqrt(wide.numel())
    linf = _amax(gradient)
    return GradientStatistics(
        l2=torch.linalg.vector_norm(wide),
        linf=linf,
        snr=mean.abs() / deviation,
        zero=_zeros(gradient),
        nonfinite=count_nonfinite(gradient, linf).double() / gradient.numel(),
    )


def count_nonfinite(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """Elements that are NaN or infinite, 0-d int64; on a CPU only the amax is taken where there are none."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    if x.device.type == "cpu":
        peak = scalar(_amax(x) if amax is None else amax)
        if peak is not None and math.isfinite(peak):
            return torch.zeros((), dtype=torch.int64)
    return torch.count_nonzero(x - x)  # of all numbers only these differ from themselves


def moment_snr(mean: Tensor, mean_square: Tensor) -> Tensor:
    """SNR over steps from running means of g and g^2 free of their start's bias, such as Adam's: 0-d float64.

    Infinite where every gradient was the same, NaN where all were 0.
    """
    m, v = _elements(mean).double(), _elements(mean_square).double()
    if m.shape != v.shape:
        raise ValueError(f"mean has the shape {tuple(m.shape)}, mean_square {tuple(v.shape)}")
    variance = (v - m.square()).clamp(min=0.0)
    return (m.square().sum() / variance.sum()).sqrt()


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return length


def _zeros(x: Tensor) -> Tensor:
    """Share of the elements that are 0, 0-d float64."""
    return (x.numel() - torch.count_nonzero(x)).double() / x.numel()


def update_statistics(weight: Tensor, update: Tensor) -> UpdateStatistics:
    """An update against the weight it was made to; ValueError without elements or where the shapes differ."""
    x, delta = _elements(weight), _elements(update)
    if x.shape != delta.shape:
        raise ValueError(f"weight has the shape {tuple(x.shape)}, update {tuple(delta.shape)}")
    norms = [torch.linalg.vector_norm(values, dtype=torch.float64) for values in (delta, x)]
    return UpdateStatistics(zero=_zeros(delta), rms_ratio=norms[0] / norms[1])


class DeadUnits:
    """Counts for each unit the training steps since its gradient last reached `threshold`.

    A unit is a row of the gradient (an element of a vector); it is dead after `steps` steps. A NaN in a row leaves its
    count as it was.
    """

    def __init__(self, threshold: float = DEAD_THRESHOLD, steps: int = DEAD_STEPS) -> None:
        if threshold <= 0.0 or steps < 1:
            raise ValueError(f"need threshold > 0 and steps >= 1, got {threshold} and {steps}")
        self.threshold, self.steps = threshold, steps
        self._silent: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}

    def update(self, name: str, step: int, grad: Tensor) -> Tensor:
        """Dead share of the units, 0-d float64; ValueError where steps do not ascend.

        Steps between two calls count as silent where both ends are.
        """
        elapsed = _elapsed(self._seen, name, step, first=1)
        gradient = _elements(grad)
        size = gradient.abs().flatten(1).amax(1) if gradient.dim() > 1 else gradient.abs().flatten()
        before = self._silent[name] if name in self._silent else torch.zeros_like(size, dtype=torch.int64)
        before = before.to(size.device)  # a restored state lies on the CPU
        counted = torch.where(size < self.threshold, before + elapsed, 0)
        self._silent[name] = torch.where(size.isnan(), before, counted)
        return _share(self._silent[name] >= self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Silent steps by unit and the last step seen, by name."""
        silent = {name: counts.clone() for name, counts in self._silent.items()}
        return {"silent": silent, "seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._silent = {name: counts.clone() for name, counts in state["silent"].items()}
        self._seen = dict(state["seen"])


class AmaxMovingAverage:
    """Moving average of a tensor's amax; it decays by e over `smoothing` training steps, however often updated.

    An amax that is not finite enters nothing, and its jump is NaN or infinite.
    """

    def __init__(self, smoothing: int = 100) -> None:
        if smoothing < 1:
            raise ValueError(f"smoothing counts training steps, at least 1; got {smoothing}")
        self.smoothing = smoothing
        self._mean: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}

    def update(self, name: str, step: int, amax: Tensor) -> AmaxAverage:
        """Takes in one 0-d amax; ValueError where steps do not ascend."""
        return self.update_all(step, {name: amax})[name]

    def update_all(self, step: int, amaxes: Mapping[str, Tensor]) -> dict[str, AmaxAverage]:
        """`update` of many by name, in the calls that one takes."""
        if not amaxes:
            return {}
        values = torch.stack([amax.detach().double() for amax in amaxes.values()])
        nothing, zero = values.new_full((), math.nan), values.new_zeros(())
        # A restored state lies on the CPU.
        before = torch.stack([self._mean.get(name, nothing).to(values.device) for name in amaxes])
        elapsed = {name: _elapsed(self._seen, name, step, first=0) for name in amaxes}
        waiting = torch.stack([self._waiting.get(name, zero).to(values.device) + n for name, n in elapsed.items()])
        kept = torch.exp(-waiting / self.smoothing)
        moved = torch.where(before.isnan(), values, values + (before - values) * kept)
        finite = torch.isfinite(values)
        means = torch.where(finite, moved, before).unbind()
        self._mean |= dict(zip(amaxes, means, strict=True))
        self._waiting |= dict(zip(amaxes, torch.where(finite, 0.0, waiting).unbind(), strict=True))
        return dict(zip(amaxes, map(AmaxAverage, means, (values / before).unbind()), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Means, steps since each last moved, and the last step seen, by name."""
        tensors = {"mean": self._mean, "waiting": self._waiting}
        return {key: {name: value.clone() for name, value in kept.items()} for key, kept in tensors.items()} | {
            "seen": dict(self._seen)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._mean = {name: value.clone() for name, value in state["mean"].items()}
        self._waiting = {name: value.clone() for name, value in state["waiting"].items()}
        self._seen = dict(state["seen"])


@cache
def _overflow_limit(fmt: FloatFormat) -> float:
    """The magnitude half a spacing beyond the largest value."""
    exponent = max(math.frexp(fmt.max)[1] - 1, fmt.min_exponent)
    return fmt.max + math.ldexp(0.5, exponent - fmt.mantissa_bits)


def _elapsed(seen: dict[str, int], name: str, step: int, *, first: int) -> int:
    if name in seen and step <= seen[name]:
        raise ValueError(f"steps must ascend: {step} after {seen[name]} for {name!r}")
    elapsed = step - seen[name] if name in seen else first
    seen[name] = step
    return elapsed


def _elements(x: Tensor) -> Tensor:
    """Float32, detached; ValueError without elements or for integers."""
    if x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"need floating-point elements, got {x.dtype} of the shape {tuple(x.shape)}")
    return x.detach().to(torch.float32)


def _amax(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(high, -low).double()


def _share(mask: Tensor) -> Tensor:
    return torch.count_nonzero(mask).double() / mask.numel()
