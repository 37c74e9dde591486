"""What every kernel shares: a format's constants, and the keys of the random stream.

Every kernel rounds y = x / scale by one rule. With |y| split into the code below it and the fraction of the
way to the next code, in 31-bit fixed point,

    index = code_below + ((fraction + u) >> 31)

where u decides the rounding: 0 is toward zero, 2^30 - 1 + (code_below is odd) is nearest with ties to the
even code, and a uniform draw from [0, 2^31) is stochastic, unbiased to 2^-31 of the spacing and never moving
what is on the grid. For normals both parts are bit fields of the float32; for subnormals they are the integer
and fractional part of y in units of the smallest spacing. Neither needs a logarithm or a branch.

The draw for element i is a hash of (seed, i) and of nothing else, so it depends neither on the format nor on
where the tensor lies. `reference` says this in torch, `cpu` in numba; they agree bit for bit.

A value of the grid times the scale can lie beyond the tensor's own element type: 65536 is a value of E6M1 and no
float16. Saturation stops at the last value whose product is finite there (`fitting`), so what is finite stays so.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat

Rounding = Literal["nearest", "stochastic", "toward_zero"]
Overflow = Literal["saturate", "inf"]


class Drawn(NamedTuple):
    """The seed of a numbered draw, `mix_seed(key, number)`; `number` 0-d int64, so that graphs can take it as input."""

    key: int
    number: Tensor


Seed = int | Drawn | None

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types the fast kernels read and write; others pass through float32."""

NEAREST_U = (1 << 30) - 1
MAX_HASHED_ELEMENTS = 1 << 32

FLOAT32_MAX = float(torch.finfo(torch.float32).max)

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126
"""What a scale may be at the ends."""

_MASK64 = (1 << 64) - 1


class Grid(NamedTuple):
    """A format's constants as float32 arithmetic wants them."""

    shift: int  # float32 mantissa bits below the format's, 23 - M
    offset: int  # (float32 bits >> shift) - offset is the code of a normal
    min_normal: float  # 2^emin
    spacing: float  # 2^(emin - M), the spacing below 2^emin
    unscale: float  # unscale * unscale_rest = 1 / spacing, in two factors as one may exceed float32
    unscale_rest: float
    max_index: int
    max_value: float
    min_exponent_bits: int  # float32 bits of 2^emin
    max_exponent_bits: int  # float32 bits of 2^(exponent of the top binade)
    mantissa_step: float  # 2^-M


@cache
def grid_of(fmt: FloatFormat) -> Grid:
    """The constants of a format."""
    emin, mantissa = fmt.min_exponent, fmt.mantissa_bits
    first = min(mantissa - emin, 100)
    emax = max(math.frexp(fmt.max)[1] - 1, emin)
    return Grid(
        shift=23 - mantissa,
        offset=(emin + 126) << mantissa,
        min_normal=math.ldexp(1.0, emin),
        spacing=math.ldexp(1.0, emin - mantissa),
        unscale=math.ldexp(1.0, first),
        unscale_rest=math.ldexp(1.0, mantissa - emin - first),
        max_index=fmt.max_index,
        max_value=fmt.max,
        min_exponent_bits=(emin + 127) << 23,
        max_exponent_bits=(emax + 127) << 23,
        mantissa_step=math.ldexp(1.0, -mantissa),
    )


def finite_bound(dtype: torch.dtype) -> float:
    """The least number that, stored through float32, is no longer finite in a dtype: half a spacing past its end."""
    info = torch.finfo(dtype)
    if info.max >= FLOAT32_MAX:
        return math.ldexp(1.0, 128) - math.ldexp(1.0, 103)
    beyond = info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)
    # float32 rounds first, and to even: half of its own spacing below.
    return beyond - math.ldexp(1.0, math.frexp(beyond)[1] - 25)


def last_finite(dtype: torch.dtype) -> float:
    """The largest float32 that is finite in a dtype."""
    bound = finite_bound(dtype)
    return bound - math.ldexp(1.0, math.frexp(bound)[1] - 25)


def fitting(grid: Grid, dtype: torch.dtype, scale: float) -> Grid:
    """The grid up to its last value that, times scale, is finite in a dtype: where saturation stops."""
    bound = finite_bound(dtype)
    return grid if grid.max_value * scale < bound else _cut(grid, scale, bound)


@lru_cache(maxsize=256)
def _cut(grid: Grid, scale: float, bound: float) -> Grid:
    # At most 16 bits times 24: the products are exact in Python's floats.
    codes = range(grid.max_index + 1)
    last = bisect_left(codes, bound, key=lambda code: _magnitude(grid, code) * scale) - 1
    return grid._replace(max_index=last, max_value=_magnitude(grid, last))


def _magnitude(grid: Grid, code: int) -> float:
    mantissa = 23 - grid.shift
    binade = max(code >> mantissa, 1)
    return math.ldexp(grid.spacing * (code - ((binade - 1) << mantissa)), binade - 1)


def mix_seed(*parts: int) -> int:
    """One 64-bit seed from several integers, order mattering (splitmix64 over each in turn)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = _splitmix64(state ^ _splitmix64(part & _MASK64))
    return state


def seed_of(seed: Seed) -> int | None:
    """The seed as a number; reads a numbered draw."""
    return mix_seed(seed.key, int(seed.number)) if isinstance(seed, Drawn) else seed


def hash_keys(seed: int) -> tuple[int, int]:
    """The two 32-bit keys of the counter hash for a seed of up to 64 bits."""
    mixed = _splitmix64(seed & _MASK64)
    return mixed & 0xFFFFFFFF, mixed >> 32


def overflow_values(grid: Grid, rounding: Rounding, overflow: Overflow) -> tuple[float, float]:
    """What stands for a finite and for an infinite magnitude beyond the largest value.

    Rounding toward zero takes no finite number to infinity.
    """
    if overflow == "saturate":
        return grid.max_value, grid.max_value
    return (grid.max_value if rounding == "toward_zero" else math.inf), math.inf


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)
