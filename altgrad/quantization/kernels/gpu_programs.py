"""The rounding rule as Triton programs: one read and one write of the tensor, which is the floor on a GPU.

The rule is the package's; see its docstring. Three things keep the results those of the other kernels bit for bit:
the division is the correctly rounded one (`div_rn`: Triton's own float32 division on a GPU is not), every other
float operation is exact by construction, and the stochastic draw is the same counter hash of (seed, flat index).
float16 and bfloat16 are widened on load and rounded on store, without a float32 tensor between; bfloat16 by its bits,
which say the same on every device (the interpreter's own conversion truncates).
"""

from __future__ import annotations

import triton
import triton.language as tl

from altgrad.quantization.kernels import LARGEST_SCALE, SMALLEST_SCALE

_LEAST, _MOST = tl.constexpr(SMALLEST_SCALE), tl.constexpr(LARGEST_SCALE)


@triton.jit
def hash_of(index, first, second):
    """32 hashed bits of the flat index under two keys, uint32."""
    h = index ^ first
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) ^ second
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def load(pointer, index, mask, IS_BFLOAT16: tl.constexpr):
    """The elements as float32; bfloat16 comes as its bits."""
    x = tl.load(pointer + index, mask=mask, other=0)
    if IS_BFLOAT16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def store(pointer, index, value, mask, IS_BFLOAT16: tl.constexpr):
    """Rounds to the tensor's dtype, ties to even."""
    if IS_BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        tl.store(pointer + index, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(pointer + index, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def magnitude_code(bits, u, odd, min_normal, unscale, unscale_rest, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """Code of the magnitude with these float32 bits, rounded by u, uint32; not yet clamped to the largest."""
    magnitude = bits.to(tl.float32, bitcast=True)
    is_normal = magnitude >= min_normal
    steps = tl.where(is_normal, 0.0, magnitude) * unscale * unscale_rest
    whole = steps.to(tl.int32)
    below = tl.where(is_normal, (bits >> SHIFT) - OFFSET, whole.to(tl.uint32))
    low = (bits & ((1 << SHIFT) - 1)) << (31 - SHIFT)
    part = ((steps - whole.to(tl.float32)) * 2147483648.0).to(tl.int32).to(tl.uint32)
    fraction = tl.where(is_normal, low, part)
    return below + ((fraction + u + (below & odd)) >> 31)


@triton.jit
def value_of(code, spacing, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """Value of a magnitude code, float32."""
    normal = ((code + OFFSET) << SHIFT).to(tl.float32, bitcast=True)
    return tl.where(code >= (1 << (23 - SHIFT)), normal, code.to(tl.int32).to(tl.float32) * spacing)


@triton.jit
def draw_of(index, first, second, u, STOCHASTIC: tl.constexpr):
    """What rounding adds to an element's fraction: u, or a draw by the flat index under two keys, uint32."""
    if STOCHASTIC:  # a branch on a constant is compiled away; of a conditional expression both sides would be
        draw = hash_of(index.to(tl.uint32), first.to(tl.uint32), second.to(tl.uint32)) >> 1
    else:
        draw = u.to(tl.uint32)
    return draw


@triton.jit
def signed_like(value, bits):
    """A rounded magnitude with the sign of the float32 of these bits; NaN stays NaN."""
    signed = value.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits, signed).to(tl.float32, bitcast=True)


@triton.jit
def last_code(
    scale,
    last,
    min_normal,
    spacing,
    unscale,
    unscale_rest,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    MAX_INDEX: tl.constexpr,
):
    """Code of the last value whose product with the scale is at most `last`; the quotient's may be off by one."""
    quotient = tl.div_rn(last, scale).to(tl.uint32, bitcast=True)
    none = quotient & 0
    code = tl.minimum(magnitude_code(quotient, none, 0, min_normal, unscale, unscale_rest, SHIFT, OFFSET), MAX_INDEX)
    above = tl.minimum(code + 1, MAX_INDEX)
    code = tl.where(value_of(above, spacing, SHIFT, OFFSET) * scale <= last, above, code)
    return tl.where(value_of(code, spacing, SHIFT, OFFSET) * scale > last, code - 1, code)


@triton.jit
def largest_parts_of(
    x_pointer, partial, elements, rounds, IS_BFLOAT16: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program's largest magnitude, as bits: above infinity's where there is a NaN.

    Every program has a place of its own, so that nothing must be set to zero before.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for _ in range(rounds):  # a loop over elements would step past the end of 32 bits
        bits = load(x_pointer, index, index < elements, IS_BFLOAT16).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, bits.to(tl.int32))
        index += PARTS * BLOCK
    tl.store(partial + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def scale_of(bits, per_max, POWER_OF_TWO: tl.constexpr):
    """`scale_of_amax` of the magnitude with these int32 bits."""
    scale = tl.minimum(tl.maximum(bits.to(tl.float32, bitcast=True) * per_max, _LEAST), _MOST)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), scale, 1.0)


@triton.jit
def counted_amax(
    largest,
    history,
    gathered,
    opening,
    length,
    HAS_HISTORY: tl.constexpr,
    WINDOW: tl.constexpr,
    ADVANCES: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Bits of the amax that a delayed scale takes, `ScaleTracker.gather` or, without ADVANCES, its `scale_for`.

    The first program writes. Another may read the opening amax before or after: it finds NaN, or the very `largest`
    that it would put in its place.
    """
    counted = largest * 0
    if HAS_HISTORY:
        place = tl.arange(0, WINDOW)
        window = tl.load(history + place, mask=place < length, other=0.0)
        counted = tl.max(window.to(tl.int32, bitcast=True), axis=0)
    elif not SHARED:
        opened = tl.load(opening)
        is_first = opened != opened
        counted = tl.where(is_first, largest, opened.to(tl.int32, bitcast=True))
        if ADVANCES:  # noqa: SIM102 (known when Triton compiles; the inner condition is not)
            if is_first & (tl.program_id(0) == 0):
                tl.store(opening, largest.to(tl.float32, bitcast=True))
    if ADVANCES:  # noqa: SIM102 (as above)
        if tl.program_id(0) == 0:
            finite = tl.where(largest < 0x7F800000, largest, 0).to(tl.float32, bitcast=True)
            before = tl.load(gathered)
            tl.store(gathered, tl.where(before >= finite, before, finite))
    return counted


@triton.jit
def scale_and_add(
    y_pointer,
    first,
    second,
    bias_pointer,
    out_pointer,
    elements,
    columns,
    FACTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITES_BFLOAT16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    y = tl.load(y_pointer + index, mask=mask, other=0.0)
    if FACTORS > 0:
        y = y * tl.load(first)
    if FACTORS > 1:
        y = y * tl.load(second)
    if HAS_BIAS:
        y = y + tl.load(bias_pointer + index % columns, mask=mask, other=0.0)
    store(out_pointer, index, y, mask, WRITES_BFLOAT16)


@triton.jit
def transpose(x_pointer, out_pointer, rows, columns, IS_BFLOAT16: tl.constexpr, TILE: tl.constexpr):
    """[rows, columns] as [columns, rows] in the type of `out`, which holds the values exactly."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    mask = (row < rows) & (column < columns)
    values = tl.trans(load(x_pointer, row * columns + column, mask, IS_BFLOAT16)).to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + tl.trans(column) * rows + tl.trans(row), values, mask=tl.trans(mask))


# A key of 1 must stay a number: specialised, it would become a constant without a type.
@triton.jit(do_not_specialize=["first", "second", "u"])
def round_elements(
    x_pointer,
    out_pointer,
    scale_pointer,
    elements,
    first,
    second,
    min_normal,
    spacing,
    unscale,
    unscale_rest,
    finite_over,
    infinite_over,
    last,
    u,
    partial,
    per_max,
    history,
    gathered,
    opening,
    length,
    PARTS: tl.constexpr,
    DELAYED: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    WINDOW: tl.constexpr,
    ADVANCES: tl.constexpr,
    SHARED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    MAX_INDEX: tl.constexpr,
    ODD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SATURATES: tl.constexpr,
    UNSCALED: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    WRITES_BFLOAT16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    if PARTS > 0 or DELAYED:
        largest = tl.full((), 0, tl.int32)
        if PARTS > 0:
            largest = tl.max(tl.load(partial + tl.arange(0, PARTS)), axis=0)
        if DELAYED:
            largest = counted_amax(largest, history, gathered, opening, length, HAS_HISTORY, WINDOW, ADVANCES, SHARED)
        scale = scale_of(largest, per_max, POWER_OF_TWO)
        if tl.program_id(0) == 0:
            tl.store(scale_pointer, scale)
    else:
        scale = tl.load(scale_pointer)
    y = tl.div_rn(load(x_pointer, index, mask, IS_BFLOAT16), scale)
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    draw = draw_of(index, first, second, u, STOCHASTIC)
    code = magnitude_code(magnitude, draw, ODD, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    if UNSCALED:
        value = value_of(tl.minimum(code, MAX_INDEX), spacing, SHIFT, OFFSET)
        value = tl.where(magnitude == 0x7F800000, float("inf"), value)
    elif SATURATES:
        top = tl.full((), MAX_INDEX, tl.uint32)
        if finite_over * scale > last:
            top = last_code(scale, last, min_normal, spacing, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX)
        value = value_of(tl.minimum(code, top), spacing, SHIFT, OFFSET)
    else:
        value = value_of(tl.minimum(code, MAX_INDEX), spacing, SHIFT, OFFSET)
        value = tl.where(code > MAX_INDEX, finite_over, value)
        value = tl.where(magnitude == 0x7F800000, infinite_over, value)
    result = signed_like(value, bits)
    if not UNSCALED:
        result = result * scale
    store(out_pointer, index, result, mask, WRITES_BFLOAT16)


@triton.jit(do_not_specialize=["u"])
def index_elements(
    x_pointer,
    out_pointer,
    scale_pointer,
    elements,
    min_normal,
    unscale,
    unscale_rest,
    u,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    MAX_INDEX: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    y = tl.div_rn(load(x_pointer, index, mask, IS_BFLOAT16), tl.load(scale_pointer))
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = magnitude_code(magnitude, u.to(tl.uint32), 1, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    code = tl.where(magnitude > 0x7F800000, 0, tl.minimum(code, MAX_INDEX)).to(tl.int32)
    tl.store(out_pointer + index, tl.where(bits >= 0x80000000, -code, code), mask=mask)
