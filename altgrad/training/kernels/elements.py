"""The parts of a step for one element, for numba to inline: float32 or integer, in the order of `reference`.

Nothing branches, or LLVM would not vectorise the loop (see `quantization.kernels.loops`), and every sum is held in
32 bits within a piece of a tensor, for 64-bit lanes would halve the vectors.
"""

from __future__ import annotations

import numpy as np
from numba import types

from altgrad.quantization.kernels.compiled import inlined
from altgrad.quantization.kernels.loops import _bits, _float, _hash, _on_words, _plus, _right, _xor
from altgrad.training.kernels import FIXED

_U32, _F32, _I32 = np.uint32, np.float32, np.int32
_ABSOLUTE, _SIGN, _EXPONENT, _ONE = _U32(0x7FFFFFFF), _U32(0x80000000), _U32(0x7F800000), _U32(0x3F800000)
_NORMAL, _NEGATIVE = _U32(0x00800000), _U32(0xC0000000)
"""From here on a difference of the bits of two magnitudes is one that wrapped around."""
_FULL = _F32(2.0**FIXED)
HALF = FIXED // 2
LOW = _U32((1 << HALF) - 1)

minus, left = _on_words("sub", types.uint32), _on_words("shl", types.uint32)


@inlined
def minimum(a, b):
    return a if a < b else b


@inlined
def absolute(number):
    return _float(_U32(_bits(number) & _ABSOLUTE))


@inlined
def index_of(y, c, offset, max_index):
    """Signed code nearest to y, int32."""
    shift, halfway, flip, min_normal, magic = c[0], c[2], c[3], c[4], c[5]
    bits = _bits(y)
    magnitude = _U32(bits & _ABSOLUTE)
    last = _U32(_xor(_right(magnitude, shift), flip) & _U32(1))
    normal = minus(_right(_plus(magnitude, _plus(halfway, last)), shift), offset)
    small = minus(_bits(_F32(_float(magnitude) + magic)), _bits(magic))
    index = minimum(normal if magnitude >= min_normal else small, max_index)
    index = _U32(0) if magnitude > _EXPONENT else index
    return _I32(minus(_U32(0), index) if bits >= _SIGN else index)


@inlined
def value_of(index, shift, offset, spacing, first_normal):
    """Value of a signed code."""
    size = size_of(index)
    normal = _float(left(_plus(size, offset), shift))
    value = normal if size >= first_normal else _F32(_F32(_I32(size)) * spacing)
    return -value if index < _I32(0) else value


@inlined
def size_of(index):
    return _U32(-index if index < _I32(0) else index)


@inlined
def gap_at(size, shift, offset, lowest, mantissa_step, first_normal, max_index):
    """Half the distance between the neighbours of a magnitude code: half a spacing on either side, a quarter below
    the start of a binade, none beyond the last."""
    bits = _U32(left(_plus(size, offset), shift) & _EXPONENT)
    spacing = _F32(_float(bits if size >= first_normal else lowest) * mantissa_step)
    starts = (_U32(size & minus(first_normal, _U32(1))) == _U32(0)) & (size > first_normal)
    below = _F32(spacing * (_F32(0.25) if starts else _F32(0.5)))
    return _F32(below + _F32(spacing * (_F32(0) if size >= max_index else _F32(0.5))))


@inlined
def binade_of(y, lowest, highest):
    """Float32 bits of the binade that y's spacing belongs to."""
    exponent = _U32(_bits(y) & _EXPONENT)
    return minimum(lowest if exponent < lowest else exponent, highest)


@inlined
def binade_of_quotient(w, scale_bits, lowest, highest):
    """Float32 bits of the binade that (w / scale)'s spacing belongs to, without a division."""
    magnitude = _U32(_bits(w) & _ABSOLUTE)
    difference = minus(magnitude, minus(scale_bits, _ONE))
    is_small = (difference >= _NEGATIVE) | (magnitude < _NORMAL)
    difference = minimum(_U32(0) if is_small else difference, _EXPONENT)
    exponent = _U32(difference & _EXPONENT)
    return minimum(lowest if exponent < lowest else exponent, highest)


@inlined
def code_on_grid(y, c, offset, max_index):
    """`index_of` for values on the grid, in half the operations."""
    shift, min_normal, magic = c[0], c[4], c[5]
    bits = _bits(y)
    magnitude = _U32(bits & _ABSOLUTE)
    normal = minus(_right(magnitude, shift), offset)
    small = minus(_bits(_F32(_float(magnitude) + magic)), _bits(magic))
    size = _I32(normal if magnitude >= min_normal else small)
    return -size if bits >= _SIGN else size


@inlined
def share_word(share):
    """A share in fixed point, at most one."""
    return _U32(_I32(share if share < _FULL else _FULL))


@inlined
def whole_sum(high, low):
    """The sum of fixed-point words whose halves were added apart."""
    return np.int64(high) * (1 << HALF) + np.int64(low)


@inlined
def clipped(rungs, clip):
    """Within ± clip; NaN is 0."""
    rungs = rungs if rungs == rungs else _F32(0)
    return minimum(rungs if rungs > -clip else -clip, clip)


@inlined
def drawn(rungs, counter, key, second_key):
    """floor(rungs + u), float32."""
    draw = _F32(_F32(_I32(_right(_hash(counter, key, second_key), _U32(8)))) * _F32(2.0**-24))
    whole = _F32(np.floor(rungs))
    return whole + (_F32(1) if draw < _F32(rungs - whole) else _F32(0))


@inlined
def stiffness(weight, has_exponent, mantissa_step, least, limit):
    """The literal formula's factor on a gradient."""
    binade = _float(_U32(_bits(weight) & _EXPONENT))
    literal = _F32(binade * mantissa_step) if has_exponent else least
    return minimum(least if weight == _F32(0) else literal, limit)


@inlined
def power(base, exponent):
    """`integer_power`; ends whatever a damaged step count holds."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
