"""The rounding rule in readable torch: any device, any scale that broadcasts, traceable by torch.compile.

Every intermediate is float32 or an integer, so the results are those of the fast kernels bit for bit; see the
package's docstring for the rule. float64 is divided as float64 and then rounded once: to odd in float32 (toward zero,
the last bit set where anything was lost), which has more than two bits beyond any format here, so that no later
rounding can tell it from the exact quotient (Boldo & Melquiond, IEEE Trans. Computers 57, 2008).
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.quantization.kernels import NEAREST_U, Grid, Overflow, Rounding, hash_keys, last_finite, overflow_values

Scale = float | Tensor


def quantize(
    x: Tensor,
    scale: Scale,
    grid: Grid,
    rounding: Rounding,
    overflow: Overflow,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """round(x / scale) * scale, float32 (float64 for float64) of x's shape; with `dtype`, saturation stops where that
    ends."""
    y = quotient(x, scale)
    if x.dtype == torch.float64 and rounding == "stochastic":
        index = _drawn_of_double(x / scale, y, grid, seed)
    else:
        index = rounded_magnitude(y, grid, rounding, seed)
    if dtype is not None and overflow == "saturate":
        magnitude = magnitude_value(torch.minimum(index, last_index(grid, dtype, scale, x.device)), grid)
    else:
        finite_over, infinite_over = overflow_values(grid, rounding, overflow)
        magnitude = magnitude_value(index.clamp(max=grid.max_index), grid)
        magnitude = torch.where(index > grid.max_index, finite_over, magnitude)
        magnitude = torch.where(torch.isinf(y), infinite_over, magnitude)
    values = torch.where(torch.isnan(y), y, torch.copysign(magnitude, y))
    return values.to(x.dtype) * scale if x.dtype == torch.float64 else values * scale


def quotient(x: Tensor, scale: Scale) -> Tensor:
    """x / scale as the float32 that every rounding to a format treats like it."""
    if x.dtype != torch.float64:
        return x.to(torch.float32) / scale
    y = x / scale
    nearest = y.to(torch.float32)
    bits = nearest.view(torch.int32) - (nearest.abs() > y.abs()).to(torch.int32)
    return (bits | (nearest != y).to(torch.int32)).view(torch.float32)


def _drawn_of_double(y: Tensor, carrier: Tensor, grid: Grid, seed: int | None) -> Tensor:
    """Stochastic code of |y|, float64, whose fraction float32 would cut: that of the 31 bits a draw has."""
    below = rounded_magnitude(carrier, grid, "toward_zero").clamp(max=grid.max_index)
    low, high = (magnitude_value(index, grid).to(torch.float64) for index in (below, below + 1))
    fraction = ((y.abs() - low) / (high - low)).nan_to_num(0.0, 1.0).clamp(0.0, 1.0)
    return below + (((fraction * 2.0**31).to(torch.int64) + _draws(y, seed)) >> 31)


def last_index(grid: Grid, dtype: torch.dtype, scale: Scale, device: torch.device) -> Tensor:
    """Code of the last value that, times the scale, is finite in a dtype: int64 of the scale's shape."""
    last = last_finite(dtype)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=device)
    # The quotient is rounded, so the code may be off by one either way.
    code = rounded_magnitude(last / scale, grid, "toward_zero").clamp(max=grid.max_index)
    above = (code + 1).clamp(max=grid.max_index)
    code = torch.where(magnitude_value(above, grid) * scale <= last, above, code)
    return code - (magnitude_value(code, grid) * scale > last).to(code.dtype)


def code_index(x: Tensor, scale: Scale, grid: Grid) -> Tensor:
    """Signed code of the value nearest to x / scale, int32, saturating; NaN gives 0."""
    y = quotient(x, scale)
    index = rounded_magnitude(y, grid, "nearest").clamp(max=grid.max_index)
    signed = torch.where(torch.signbit(y), -index, index)
    return torch.where(torch.isnan(y), 0, signed).to(torch.int32)


def index_to_value(index: Tensor, scale: Scale, grid: Grid) -> Tensor:
    """Value of a signed code times scale, float32; codes beyond the last are clamped to it."""
    clamped = index.clamp(-grid.max_index, grid.max_index).to(torch.int32)
    magnitude = magnitude_value(clamped.abs(), grid)
    return torch.where(clamped < 0, -magnitude, magnitude) * scale


def ulp(x: Tensor, scale: Scale, grid: Grid) -> Tensor:
    """Spacing of the scaled grid at x, float32; NaN where x / scale is."""
    y = quotient(x, scale)
    exponent = y.view(torch.int32) & 0x7F800000
    binade = exponent.clamp(grid.min_exponent_bits, grid.max_exponent_bits).view(torch.float32)
    return torch.where(torch.isnan(y), y, binade * grid.mantissa_step * scale)


def rounded_magnitude(y: Tensor, grid: Grid, rounding: Rounding, seed: int | None = None) -> Tensor:
    """Code of |y| rounded as asked, int64, not yet clamped to the largest; meaningless where y is NaN."""
    bits = (y.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    is_normal = y.abs() >= grid.min_normal
    steps = torch.where(is_normal, 0.0, y.abs()) * grid.unscale * grid.unscale_rest
    whole = steps.to(torch.int32)
    below = torch.where(is_normal, (bits >> grid.shift) - grid.offset, whole)
    fraction = torch.where(
        is_normal, (bits & ((1 << grid.shift) - 1)) << (31 - grid.shift), ((steps - whole) * 2.0**31).to(torch.int64)
    )
    if rounding == "nearest":
        return below + ((fraction + NEAREST_U + (below & 1)) >> 31)
    if rounding == "toward_zero":
        return below
    return below + ((fraction + _draws(y, seed)) >> 31)


def _draws(y: Tensor, seed: int | None) -> Tensor:
    """31 random bits for every element, int64."""
    if seed is None:
        raise ValueError("stochastic rounding needs a seed, an integer of up to 64 bits; got None")
    return counter_hash(y.shape, seed, y.device) >> 1


def magnitude_value(index: Tensor, grid: Grid) -> Tensor:
    """Value of a magnitude code, float32."""
    is_normal = index >= (1 << (23 - grid.shift))
    normal = ((index.to(torch.int32) + grid.offset) << grid.shift).view(torch.float32)
    return torch.where(is_normal, normal, index.to(torch.float32) * grid.spacing)


def counter_hash(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """32 hashed bits of (seed, flat index) for every element, int64.

    A bijective 32-bit finalizer (Wellons' lowbias32 constants) keyed at the input and between its two rounds.
    """
    first, second = hash_keys(seed)
    h = torch.arange(shape.numel(), dtype=torch.int64, device=device).view(shape) ^ first
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = (h ^ (h >> 15)) ^ second
    h = (h * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def uniform(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """The draws in [0, 1) of a seed, 24 bits each, float32."""
    return (counter_hash(shape, seed, device) >> 8).to(torch.float32) * 2.0**-24
