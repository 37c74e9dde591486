"""The numba kernels for contiguous float32, bfloat16 and float16 tensors on the CPU, at memory speed and
without a compiler installed.

Half-width inputs are widened and narrowed inside the loop, with no float32 tensor between. Large tensors are
cut into one piece per thread torch may use (`torch.set_num_threads`), each piece under its own released
interpreter lock: numba's own threading layers either abort when two threads enter them (workqueue) or need a
library that may be missing (omp, tbb).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad.quantization.kernels import Grid, Overflow, Rounding, hash_keys, loops, overflow_values
from altgrad.quantization.kernels.memory import Words, values, words

THREADED_FROM = 1 << 17
"""Elements from which a second thread repays its start."""


def quantize(
    x: Tensor, scale: float, grid: Grid, rounding: Rounding, overflow: Overflow, seed: int | None, out: Tensor
) -> None:
    """round(x / scale) * scale into `out`, of x's dtype; both contiguous, possibly the same tensor."""
    loop, numbers = _loop(x.dtype, scale, grid, rounding, overflow)
    keys: tuple[int, ...] = ()
    if rounding == "stochastic":
        if seed is None:
            raise ValueError("stochastic rounding needs a seed, an integer of up to 64 bits; got None")
        keys = hash_keys(seed)
    source = words(x)
    target = None if out.data_ptr() == x.data_ptr() else words(out)

    def piece(begin: int, end: int) -> None:
        part = None if target is None else target[begin:end]
        loop(source[begin:end], part, *numbers, *((*keys, begin) if keys else ()))

    _in_pieces(x.numel(), piece)


def code_index(x: Tensor, scale: float, grid: Grid, out: Tensor) -> None:
    """Signed code nearest to x / scale into the int32 `out`."""
    source, target = words(x), values(out)
    constants = _constants(grid, "nearest", "saturate")
    _in_pieces(
        x.numel(),
        lambda a, b: loops.nearest_index(source[a:b], target[a:b], scale, constants, grid.offset, grid.max_index),
    )


def index_to_value(index: Tensor, scale: float, grid: Grid, out: Tensor) -> None:
    """Value of the signed int32 code times scale into the float32 `out`."""
    codes, target = values(index), values(out)
    numbers = (scale, grid.shift, grid.offset, grid.spacing, grid.max_index)
    _in_pieces(index.numel(), lambda a, b: loops.value_of_index(codes[a:b], target[a:b], *numbers))


def ulp(x: Tensor, scale: float, grid: Grid, out: Tensor) -> None:
    """Spacing of the scaled grid at x into the float32 `out`."""
    source, target = words(x), values(out)
    numbers = (scale, grid.min_exponent_bits, grid.max_exponent_bits, grid.mantissa_step)
    _in_pieces(x.numel(), lambda a, b: loops.spacing_at(source[a:b], target[a:b], *numbers))


def uniform(seed: int, out: Tensor) -> None:
    """The draws in [0, 1) of a seed, 24 bits each, into the float32 `out`."""
    target, keys = values(out), hash_keys(seed)
    _in_pieces(out.numel(), lambda a, b: loops.uniform(target[a:b], *keys, a))


@lru_cache(maxsize=256)
def _loop(
    dtype: torch.dtype, scale: float, grid: Grid, rounding: Rounding, overflow: Overflow
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The loop for a call and the numbers it takes between its arrays and its keys."""
    inverse = _exact_inverse(scale)
    if dtype == torch.bfloat16 and rounding == "nearest" and inverse is not None:
        narrow = _narrow_numbers(grid, scale, overflow)
        if narrow is not None:
            return loops.round_nearest_in_16_bits, narrow
    loop = {
        "nearest": loops.round_nearest,
        "stochastic": loops.round_stochastic,
        "toward_zero": loops.round_toward_zero,
    }[rounding]
    return loop, (scale, inverse, _constants(grid, rounding, overflow))


def _exact_inverse(scale: float) -> float | None:
    """1 / scale where multiplying by it is dividing by scale, in every bit: for powers of two; else None."""
    significand, exponent = math.frexp(scale)
    return math.ldexp(1.0, 1 - exponent) if significand == 0.5 and -125 <= exponent <= 127 else None


def _narrow_numbers(grid: Grid, scale: float, overflow: Overflow) -> tuple[int, ...] | None:
    """What the 16-bit loop needs under a power-of-two scale; None where it does not hold.

    It wants the scaled grid to be made of normal bfloat16 numbers. Without mantissa bits ties follow the
    parity of the exponent, which has to be that of the code: an odd power of two or an even bias changes it.
    """
    mantissa = 23 - grid.shift
    spacing, largest = grid.spacing * scale, grid.max_value * scale
    is_odd_power = math.frexp(scale)[1] % 2 == 0
    if mantissa > 7 or (mantissa == 0 and is_odd_power != bool(grid.offset & 1)):
        return None
    if spacing < 2.0**-124 or largest > torch.finfo(torch.bfloat16).max:
        return None
    over = largest if overflow == "saturate" else math.inf
    top_halves = (_word(number) >> 16 for number in (spacing, spacing / 2, largest, over))
    least = 7 - mantissa
    parity = (0x7F, 0x80) if mantissa else (0x7FFF, 0)
    return (least + (_word(grid.min_normal * scale) >> 23), least, *top_halves, *parity)


@cache
def _constants(grid: Grid, rounding: Rounding, overflow: Overflow) -> Words:
    """What the loops need of a format, in one array: a single argument costs far less a call than twelve."""
    _, beyond = overflow_values(grid, rounding, overflow)
    return np.array(
        [
            grid.shift,
            0x7FFFFFFF & -(1 << grid.shift),  # the bits kept of a normal
            (1 << (grid.shift - 1)) - 1,  # half a spacing less one bit
            grid.offset & 1,  # the last bit kept, or its opposite, breaks ties
            _word(grid.min_normal),
            _word(math.ldexp(grid.spacing, 23)),
            _word(grid.spacing),
            _word(grid.unscale),
            _word(grid.unscale_rest),
            _word(grid.max_value),
            _word(beyond),
        ],
        dtype=np.uint32,
    )


def _word(number: float) -> int:
    return int(np.float32(number).view(np.uint32))


def _in_pieces(size: int, work: Callable[[int, int], object]) -> None:
    """work(begin, end) over 0 ... size, on as many threads as torch may use where the size repays it."""
    threads = torch.get_num_threads() if size >= THREADED_FROM else 1
    if threads == 1:
        work(0, size)
        return
    step = -(-size // threads + 63) // 64 * 64
    waiting = [_pool().submit(work, a, min(a + step, size)) for a in range(step, size, step)]
    work(0, min(step, size))
    for piece in waiting:
        piece.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="altgrad-kernel")


# A forked child has the pool's queue but none of its threads: a task put there would wait for ever.
os.register_at_fork(after_in_child=_pool.cache_clear)
