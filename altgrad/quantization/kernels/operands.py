"""A whole operand in one call: amax, scale, rounding, infinities kept; and a layer's output, finished where it lies.

Between a layer's matrix products lie tensors that are read once and written once. What they cost beside that is
small calls (a scale alone is eight of torch's operators) and passes over temporaries. So one kernel finds the scale
and rounds under it, from the tensor's end, which the look for the amax has left in the cache.

Kernels take addresses, which say neither dtype nor length: `operand_kernels` of `operand_dispatch` has checked both.
A kernel answers whether it has done it; where not (a scale that takes the format's end out of float32, a NaN among the
scales of blocks), the caller rounds by torch's operators, and what was written is dropped.

Loops run over slices (`x[a:b]`), never from a computed begin, for which numba wraps negative indices and LLVM does
not vectorise. Dividing and multiplying by an exact inverse are two loops, chosen once for each scale.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import cache

import numpy as np
import torch
from numba import carray

from altgrad.quantization.kernels import LARGEST_SCALE, SMALLEST_SCALE, finite_bound
from altgrad.quantization.kernels.compiled import compiled, inlined
from altgrad.quantization.kernels.loops import (
    _ABSOLUTE,
    _INFINITY,
    _bits,
    _drawn,
    _finished,
    _float,
    _hash,
    _nearest,
    _plus,
    _right,
    largest_bits,
    mixed,
    pointer_to,
    splitmix64,
)

_U32, _U64, _F32, _F64, _I64 = np.uint32, np.uint64, np.float32, np.float64, np.int64
PIECE = 1 << 15
"""Elements of a piece: what is read and written of it stays in the second cache."""
_QUIET, _UPPER = _U32(0x00400000), _U32(0xFFFF0000)
_LARGEST_POWER = _U32(0x7F000000)
"""2^127, for which an infinity counts in a block."""
_BOUND = _F64(finite_bound(torch.float32))
"""From which a scaled grid's end is beyond float32."""
WORDS = 29
"""Of what a rule is told by, int64: 11 constants of the format, 11 of E4M3 as the format of scales, then bits of
float32 head-room over the format's end, of the float64 end, block size, top exponent of a block's elements, bits of
float32 that E4M3 scales reach, the key of draws, and whether scales are powers of two."""


class Source(IntEnum):
    """Where a scale comes from."""

    GIVEN = 0  # a cell
    TENSOR = 1
    DELAYED = 2  # the tensor's history
    ROWS = 3
    E8M0 = 4  # blocks of a row, powers of two
    E4M3 = 5  # the same, E4M3 times one of the tensor


_TENSOR, _DELAYED, _ROWS = int(Source.TENSOR), int(Source.DELAYED), int(Source.ROWS)
_E8M0, _E4M3 = int(Source.E8M0), int(Source.E4M3)


@inlined
def _constants(w, begin):
    """The words of a format, out of memory before the loop; `cpu` says what they are."""
    c = w[begin : begin + 11]
    shift, mask, halfway, flip, least = _U32(c[0]), _U32(c[1]), _U32(c[2]), _U32(c[3]), _U32(c[4])
    magic, spacing, unscale, rest = _float(_U32(c[5])), _float(_U32(c[6])), _float(_U32(c[7])), _float(_U32(c[8]))
    return shift, mask, halfway, flip, least, magic, spacing, unscale, rest, _U32(c[9]), _U32(c[10])


@inlined
def _scale_of(largest, per_max, power_of_two):
    """`scaling.scale_of_amax` of the bits of an amax; `per_max`: head-room over the format's largest value."""
    scale = _F32(_float(largest) * per_max)
    scale = min(max(scale, _F32(SMALLEST_SCALE)), _F32(LARGEST_SCALE))
    if power_of_two:
        scale = _float(_U32(_plus(_bits(scale), _U32(0x7FFFFF)) & _INFINITY))
    return _F32(1) if largest == 0 or largest >= _INFINITY else scale


@inlined
def _counted(largest):
    """The bits of a block's amax as its scale takes them."""
    return _LARGEST_POWER if largest == _INFINITY else largest


@inlined
def _e8m0_scale(largest, emax):
    """2^(floor(log2 amax) - emax), held to what 8 bits of exponent say; the amax finite."""
    exponent = _I64(_right(largest, _U32(23))) - 127
    if largest < _U32(0x00800000):  # a subnormal: the power of two below it, by its float64
        exponent = _I64((np.float64(_float(largest)).view(np.int64) >> 52) & 2047) - 1023 if largest else _I64(-1023)
    code = min(max(exponent - emax, -127), 127) + 127
    return _float(_U32(0x00400000) if code == 0 else _U32(code << 23))


@inlined
def _e4m3_scale(largest, element_max, tensor_scale, c):
    """A block's scale in E4M3 times the tensor's."""
    wanted = _F32(_F32(_float(largest) / element_max) / tensor_scale)
    bits = _bits(max(wanted, c[6]))  # the least value of E4M3, its spacing
    return _F32(_finished(bits, _nearest(bits, c), c) * tensor_scale)


@inlined
def _tensor_scale(x, columns, size, beyond):
    """`block_scaling`'s scale of the whole tensor: its largest block amax that is a number, over what E4M3 reaches."""
    whole = _U32(0)
    for row in range(x.size // columns):
        line = x[row * columns : (row + 1) * columns]
        for begin in range(0, columns, size):
            largest = _counted(largest_bits(line[begin : begin + size]))
            whole = max(whole, largest if largest < _INFINITY else _U32(0))
    return max(_F32(_float(whole) / beyond), _F32(2.0**-126)) if whole else _F32(1)


@inlined
def _delayed_scale(largest, history, gathered, opening, advance, per_max, power_of_two, shared):
    """`ScaleTracker.gather`, or `scale_for` without `advance`; `history` has no elements while there is none."""
    if history.size == 0 and not shared:
        counted = largest if opening[0] != opening[0] else _bits(opening[0])
    else:
        counted = _U32(0)
        for i in range(history.size):
            counted = max(counted, _bits(history[i]))
    if advance:
        if history.size == 0 and not shared and opening[0] != opening[0]:
            opening[0] = _float(largest)
        finite = _float(largest) if largest < _INFINITY else _F32(0)
        gathered[0] = finite if not gathered[0] >= finite else gathered[0]
    return _scale_of(counted, per_max, power_of_two)


@inlined
def _operand(word, quotient, scale, counter, key, second_key, c, modes):
    """Bits of an element, `quotient` under its scale, rounded and scaled back; `modes` are constants of a kernel."""
    is_nearest, is_drawn, keeps_infinities = modes
    bits = _bits(quotient)
    magnitude = _U32(bits & _ABSOLUTE)
    if is_nearest:
        rounded = _nearest(magnitude, c)
    elif is_drawn:
        rounded = _drawn(magnitude, _right(_hash(counter, key, second_key), _U32(1)), c)
    else:
        rounded = _INFINITY if magnitude == _INFINITY else min(_drawn(magnitude, _U32(0), c), c[9])
    value = _bits(_F32(_finished(bits, rounded, c) * scale))
    return word if keeps_infinities and _U32(word & _ABSOLUTE) == _INFINITY else value


@cache
def rounder(source: int, rounding: str, keeps_infinities: bool) -> Callable[..., bool]:
    """The kernel that rounds contiguous float32 [rows, columns] at one address to another, by a source of scales."""
    is_nearest, is_drawn = rounding == "nearest", rounding == "stochastic"
    in_blocks, in_rows = source in (_E8M0, _E4M3), source == _ROWS
    is_tensor, is_delayed, is_e8m0, is_e4m3 = source == _TENSOR, source == _DELAYED, source == _E8M0, source == _E4M3

    def run(here, there, rows, columns, first, rule, cell, draws, history, length, gathered, opening, advance, shared):
        elements = rows * columns
        x, out = carray(pointer_to(here), elements, _U32), carray(pointer_to(there), elements, _U32)
        w = carray(pointer_to(rule), WORDS, np.int64)
        c, c4, per_max = _constants(w, 0), _constants(w, 11), _float(_U32(w[22]))
        end = carray(pointer_to(rule), WORDS, _F64)[23]
        modes, advance_by = (is_nearest, is_drawn, keeps_infinities), _U32(1) if is_drawn else _U32(0)
        size, emax, beyond, power_of_two = w[24], w[25], _float(_U32(w[26])), w[28] != 0
        scale, tensor_scale, key32, second_key = _F32(1), _F32(1), _U32(0), _U32(0)
        if is_drawn:
            keys = splitmix64(mixed(_U64(w[27]), _U64(carray(pointer_to(draws), 1, np.int64)[0])))
            key32, second_key = _U32(keys & _U64(0xFFFFFFFF)), _U32(keys >> _U64(32))
        if is_tensor:
            scale = _scale_of(largest_bits(x), per_max, power_of_two)
        elif is_delayed:
            window = carray(pointer_to(history), length, _F32)
            total, start = carray(pointer_to(gathered), 1, _F32), carray(pointer_to(opening), 1, _F32)
            largest = largest_bits(x) if advance or length == 0 else _U32(0)
            scale = _delayed_scale(largest, window, total, start, advance, per_max, power_of_two, shared)
        elif is_e4m3:
            tensor_scale = _tensor_scale(x, columns, size, beyond)
        elif not (in_rows or is_e8m0):
            scale = carray(pointer_to(cell), 1, _F32)[0] if cell else _F32(1)
        if not (0 < scale < np.inf) or end * _F64(scale) >= _BOUND:
            return False
        inner = size if in_blocks else (columns if in_rows else PIECE)
        each = -(-columns // inner) if in_blocks else 1
        count = rows * each if in_blocks else (rows if in_rows else -(-elements // PIECE))
        for number in range(count):
            if in_blocks:
                begin = number // each * columns + number % each * inner
                stop = min(begin + inner, (number // each + 1) * columns)
            else:
                begin = (count - 1 - number) * inner
                stop = min(begin + inner, elements)
            a, b = x[begin:stop], out[begin:stop]
            if in_rows:
                scale = _scale_of(largest_bits(a), per_max, power_of_two)
            elif in_blocks:
                largest = _counted(largest_bits(a))
                if largest > _INFINITY:
                    return False
                power = _e8m0_scale(largest, emax)
                scale = power if is_e8m0 else _e4m3_scale(largest, _F32(end), tensor_scale, c4)
            if (in_rows or in_blocks) and end * _F64(scale) >= _BOUND:
                return False
            counter = _U32(first + begin)
            exponent = _right(_bits(scale), _U32(23))
            if _U32(_bits(scale) & _U32(0x007FFFFF)) == 0 and exponent >= 2 and exponent <= 252:
                inverse = _F32(_F32(1) / scale)
                for i in range(a.size):
                    quotient = _F32(_float(a[i]) * inverse)
                    b[i] = _operand(a[i], quotient, scale, counter, key32, second_key, c, modes)
                    counter = _plus(counter, advance_by)
            else:
                for i in range(a.size):
                    quotient = _F32(_float(a[i]) / scale)
                    b[i] = _operand(a[i], quotient, scale, counter, key32, second_key, c, modes)
                    counter = _plus(counter, advance_by)
        return True

    return compiled(run)


@inlined
def _as_bfloat16(bits):
    """A float32 of the nearest bfloat16, ties to even; NaN stays one."""
    rounded = _U32(_plus(bits, _plus(_U32(0x7FFF), _U32(_right(bits, _U32(16)) & _U32(1)))) & _UPPER)
    return _U32(_U32(bits | _QUIET) & _UPPER) if _U32(bits & _ABSOLUTE) > _INFINITY else rounded


@compiled
def to_bfloat16(here, there, elements):
    """Contiguous float32 rounded to bfloat16's values at another address."""
    x, out = carray(pointer_to(here), elements, _U32), carray(pointer_to(there), elements, _U32)
    for i in range(x.size):
        out[i] = _as_bfloat16(x[i])


@compiled
def finish(here, elements):
    """The same in place."""
    x = carray(pointer_to(here), elements, _U32)
    for i in range(x.size):
        x[i] = _as_bfloat16(x[i])


@compiled
def finish_with_bias(here, rows, columns, bias):
    """x [rows, columns] + bias [columns], rounded to bfloat16's values, in place; all float32."""
    x, added = carray(pointer_to(here), rows * columns, _U32), carray(pointer_to(bias), columns, _F32)
    for row in range(rows):
        line = x[row * columns : (row + 1) * columns]
        for i in range(line.size):
            line[i] = _as_bfloat16(_bits(_F32(_float(line[i]) + added[i])))


@compiled
def largest_of(here, elements):
    """Bits of the largest magnitude of contiguous float32 at an address."""
    return largest_bits(carray(pointer_to(here), elements, _U32))


@compiled
def scale_of_bits(largest, per_max, power_of_two):
    """The scale that the bits of an amax call for."""
    return _scale_of(_U32(largest), _F32(per_max), power_of_two)


@compiled
def scale_of_history(largest, per_max, power_of_two, history, length, gathered, opening, advance, shared):
    """The delayed scale of a tensor whose amax has these bits, which joins what the step gathers with `advance`."""
    window = carray(pointer_to(history), length, _F32)
    total, start = carray(pointer_to(gathered), 1, _F32), carray(pointer_to(opening), 1, _F32)
    return _delayed_scale(_U32(largest), window, total, start, advance, _F32(per_max), power_of_two, shared)
