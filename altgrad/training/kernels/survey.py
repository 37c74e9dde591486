"""What is found out about a tensor before numba steps it.

Its gradient must be finite, or the tensor is left as it is; the scale its codes are counted under and the mean spacing
of its weights enter the step. A look at every gradient costs a sixth of a step where it is a pass of its own, so
`fused` takes the next tensors' gradients along and only the rest is looked at here.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from altgrad.quantization.kernels import LARGEST_SCALE, SMALLEST_SCALE
from altgrad.quantization.kernels.compiled import compiled, inlined
from altgrad.quantization.kernels.loops import _constants, _float, _load, _plus, _right, largest_bits, pointer_to
from altgrad.training.kernels import FIXED
from altgrad.training.kernels import layout as at
from altgrad.training.kernels.elements import HALF, LOW, binade_of, gap_at, index_of, minus, size_of, whole_sum

_U32, _F32, _I32, _I64, _F64 = np.uint32, np.float32, np.int32, np.int64, np.float64
_INFINITY = _U32(0x7F800000)


@inlined
def _number(bits):
    return _F64(_float(_U32(bits)))


@compiled
def look(word, line, begin, largest, position):
    """Takes the rest of a tensor's gradient, from an element on, into the largest found of it."""
    grad = carray(pointer_to(line[at.GRAD]), line[at.ELEMENTS], word.dtype)
    largest[position] = max(largest[position], largest_bits(grad[begin:]))


@compiled
def scale_of(numbers, largest, scale):
    """The scale the weights are counted under: the optimizer's own, a fixed one, or that of the amax."""
    if scale.size:
        return scale[0]
    if numbers[at.MASTER_SCALE] > 0:
        return _F32(numbers[at.MASTER_SCALE])
    if numbers[at.IS_WIDE] or largest == 0 or largest >= _INFINITY:
        return _F32(1)
    found = _F32(_float(largest) * _F32(numbers[at.PER_MAX]))
    return min(max(found, _F32(SMALLEST_SCALE)), _F32(LARGEST_SCALE))


@compiled
def _sum_of_spacings(words, scale, grid_words, top):
    scale, lowest, highest = _F32(scale), grid_words[at.LOWEST], grid_words[at.HIGHEST]
    shift, high, low = _U32((127 + FIXED) << 23), _U32(0), _U32(0)
    for i in range(words.size):
        binade = _plus(binade_of(_F32(_load(words[i]) / scale), lowest, highest), shift)
        word = _U32(_I32(_float(minus(binade, top) if binade > top else _U32(0))))
        high, low = _plus(high, _right(word, _U32(HALF))), _plus(low, _U32(word & LOW))
    return whole_sum(high, low)


@compiled
def _sum_of_gaps(words, scale, grid_words, top):
    c, scale = _constants(grid_words), _F32(scale)
    offset, lowest, max_index = grid_words[at.OFFSET], grid_words[at.LOWEST], grid_words[at.MAX_INDEX]
    first_normal, step = grid_words[at.FIRST_NORMAL], _float(grid_words[at.MANTISSA_STEP])
    inverse, to_fixed = _float(minus(_U32(0x7F000000), top)), _float(grid_words[at.TO_FIXED])
    high, low = _U32(0), _U32(0)
    for i in range(words.size):
        size = size_of(index_of(_F32(_load(words[i]) / scale), c, offset, max_index))
        gap = gap_at(size, c[0], offset, lowest, step, first_normal, max_index)
        word = _U32(_I32(_F32(_F32(gap * inverse) * to_fixed)))
        high, low = _plus(high, _right(word, _U32(HALF))), _plus(low, _U32(word & LOW))
    return whole_sum(high, low)


@compiled
def mean_of(words, scale, largest, in_gaps, grid_words):
    """Mean spacing, or gap where the step is in rungs, in units of the scale."""
    top = binade_of(_F32(_float(largest) / _F32(scale)), grid_words[at.LOWEST], grid_words[at.HIGHEST])
    total = _I64(0)
    for begin in range(0, words.size, at.PIECE):
        piece = words[begin : begin + at.PIECE]
        if in_gaps:
            total += _sum_of_gaps(piece, scale, grid_words, top)
        else:
            total += _sum_of_spacings(piece, scale, grid_words, top)
    return _F64(total) * 2.0**-FIXED / words.size * (_number(top) * _number(grid_words[at.MANTISSA_STEP]))
