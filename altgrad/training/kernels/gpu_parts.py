"""The parts of the Triton step around its main loop: where a program finds its tensor, the survey, the numbers.

The tensors of a group are one table, a row of addresses each, and are cut into blocks of equal length; a block's
program reads its row. What the host would have to ask for stays on the device: the survey (is the gradient finite, the
largest weight, the mean spacing) is turned into the step's numbers by kernels of one program a tensor. Float64
arguments come as their bits, for Triton passes floats as float32; division and square root are the correctly rounded
ones. Sums are integers, so the order in which programs add them does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from altgrad.quantization.kernels import NEAREST_U
from altgrad.quantization.kernels.gpu_programs import load, magnitude_code, scale_of
from altgrad.training.kernels import FIXED, MEAN_EVERY

COLUMNS = (
    "weight",
    "grad",
    "first",
    "second",
    "direction",
    "carry",
    "step",
    "scale",
    "streak",
    "mean",
    "largest",
    "elements",
    "seed",
    "known",
    "begin",
)
"""Of the table, int64: addresses, and the tensor's length, seed, whether its largest weight is known, first block."""

(
    WEIGHT,
    GRAD,
    FIRST,
    SECOND,
    DIRECTION,
    CARRY,
    STEP,
    SCALE_CELL,
    STREAK,
    MEAN,
    LARGEST,
    ELEMENTS,
    SEED,
    KNOWN,
    BEGIN,
) = (tl.constexpr(i) for i in range(len(COLUMNS)))
WIDTH = tl.constexpr(len(COLUMNS))
GRAD_BITS, WEIGHT_BITS, TOTAL, IS_FINITE, RESCALES, TOP = (tl.constexpr(i) for i in range(6))
SCALE, BY_MEAN, BY_ROOT, REPAID, LENGTH, PER_RUNG, END = (tl.constexpr(i) for i in range(7))
FLIPS, APPLIED, GRADIENT, EXPECTED, OVERFLOW, RESCALED, SKIPPED, TRAVEL, POSITION = (tl.constexpr(i) for i in range(9))
INTEGERS, NUMBERS, COUNTS = tl.constexpr(6), tl.constexpr(7), tl.constexpr(9)
"""Columns of what the step keeps of each tensor while it runs, and of its counts."""

_ONE_BITS, _ONE_SHARE = tl.constexpr((127 + FIXED) << 23), tl.constexpr(2.0**-FIXED)
_EVERY = tl.constexpr(MEAN_EVERY)
_NEAREST_U = tl.constexpr(NEAREST_U)


@triton.jit
def _address(line, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The pointer in a column of a tensor's row; aligned ones are read 16 bytes at a time."""
    pointer = tl.load(line + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _place(line, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The elements of this program's block, and which of them exist."""
    elements = tl.load(line + ELEMENTS)
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    index = (tl.program_id(0) - tl.load(line + BEGIN)) * BLOCK + tl.arange(0, BLOCK)
    return index, index < elements


@triton.jit
def _splitmix(state):
    state = state + 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def _mixed(seed, number):
    """`mix_seed(seed, number)`, uint64."""
    state = _splitmix(_splitmix(seed.to(tl.uint64)) ^ 0x9E3779B97F4A7C15)
    return _splitmix(state ^ _splitmix(number.to(tl.uint64)))


@triton.jit
def _keys(seed):
    """`hash_keys(seed)`."""
    keys = _splitmix(seed)
    return (keys & 0xFFFFFFFF).to(tl.uint32), (keys >> 32).to(tl.uint32)


@triton.jit
def _measures(count):
    """Whether this step of a tensor measures its mean spacing."""
    return (count <= _EVERY) | (count % _EVERY == 0)


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base^exponent by squaring, as on the host."""
    result = base * 0.0 + 1.0
    for _ in range(31):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _code(y, min_normal, unscale, unscale_rest, SHIFT: tl.constexpr, OFFSET: tl.constexpr, MAX_INDEX: tl.constexpr):
    """Signed code nearest to y, int32; NaN gives 0."""
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    u = tl.full(y.shape, _NEAREST_U, tl.uint32)
    code = magnitude_code(magnitude, u, 1, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    code = tl.where(magnitude > 0x7F800000, 0, tl.minimum(code, MAX_INDEX)).to(tl.int32)
    return tl.where(bits >= 0x80000000, -code, code)


@triton.jit
def _value(size, spacing, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """Value of a magnitude code, float32."""
    normal = ((size + OFFSET) << SHIFT).to(tl.float32, bitcast=True)
    return tl.where(size >= (1 << (23 - SHIFT)), normal, size.to(tl.float32) * spacing)


@triton.jit
def _gap(size, spacing, SHIFT: tl.constexpr, OFFSET: tl.constexpr, MAX_INDEX: tl.constexpr):
    """Half the distance between the neighbours of a magnitude code."""
    inner = _value(tl.abs(size - 1), spacing, SHIFT, OFFSET)
    outer = _value(tl.minimum(size + 1, MAX_INDEX), spacing, SHIFT, OFFSET)
    return (outer - tl.where(size == 0, -inner, inner)) * 0.5


@triton.jit
def _binade(y, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    exponent = (y.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.int32)
    return tl.minimum(tl.maximum(exponent, LOWEST), HIGHEST)


@triton.jit
def _binade_of_quotient(w, scale, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    magnitude = (w.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    difference = magnitude - (scale.to(tl.uint32, bitcast=True).to(tl.int64) - 0x3F800000)
    difference = tl.where(magnitude < 0x00800000, 0, difference)
    exponent = (tl.minimum(tl.maximum(difference, 0), 0x7F800000) & 0x7F800000).to(tl.int32)
    return tl.minimum(tl.maximum(exponent, LOWEST), HIGHEST)


@triton.jit
def _survey(
    table,
    owner,
    integers,
    WORD: tl.constexpr,
    NEEDS_MEAN: tl.constexpr,
    FOLLOWS: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest gradient, and the largest weight where it is asked for and not known."""
    job = tl.load(owner + tl.program_id(0)).to(tl.int64)
    line, own = table + job * WIDTH, integers + job * INTEGERS
    index, mask = _place(line, BLOCK, ALIGNED)
    g = load(_address(line, GRAD, WORD, ALIGNED), index, mask, IS_BFLOAT16).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(own + GRAD_BITS, tl.max(g.to(tl.int32), axis=0).to(tl.int64))
    if FOLLOWS or NEEDS_MEAN:
        asks = tl.load(line + KNOWN) == 0
        if not FOLLOWS:
            asks = asks & _measures(tl.load(_address(line, STEP, tl.float32)).to(tl.int32) + 1)
        if asks:
            w = load(_address(line, WEIGHT, WORD, ALIGNED), index, mask, IS_BFLOAT16)
            w = w.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
            tl.atomic_max(own + WEIGHT_BITS, tl.max(w.to(tl.int32), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["per_max", "master_scale"])
def _begin(
    table,
    integers,
    numbers,
    rows,
    per_max,
    master_scale,
    HAS_CELL: tl.constexpr,
    FOLLOWS: tl.constexpr,
    IS_FIXED: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
):
    """Counts the step, and finds the scale the codes are counted under and the binade of the largest weight."""
    job = tl.program_id(0).to(tl.int64)
    line, row = table + job * WIDTH, rows + job * COUNTS
    integers, numbers = integers + job * INTEGERS, numbers + job * NUMBERS
    is_finite = (tl.load(integers + GRAD_BITS) < 0x7F800000).to(tl.int64)
    tl.store(integers + IS_FINITE, is_finite)
    step = _address(line, STEP, tl.float32)
    tl.store(step, tl.load(step) + is_finite.to(tl.float32))
    tl.store(row + SKIPPED, tl.load(row + SKIPPED) + 1 - is_finite)
    bits = tl.load(integers + WEIGHT_BITS)
    if FOLLOWS:
        cell = _address(line, LARGEST, tl.int32)
        bits = tl.where(tl.load(line + KNOWN) != 0, tl.load(cell).to(tl.int64), bits)
        # The step takes the maximum of what it writes into the cell.
        tl.store(cell, tl.where(is_finite != 0, 0, bits).to(tl.int32))
    largest = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    if HAS_CELL:
        scale = tl.load(_address(line, SCALE_CELL, tl.float32))
    elif FOLLOWS:
        scale = scale_of(bits.to(tl.int32), per_max, False)
    elif IS_FIXED:
        scale = largest * 0.0 + master_scale
        scale = tl.where(bits < 0x7F800000, scale, master_scale)
    else:
        scale = tl.where(bits < 0, largest, 1.0)
    tl.store(numbers + SCALE, scale)
    tl.store(integers + TOP, _binade(tl.div_rn(largest, scale), LOWEST, HIGHEST).to(tl.int64))


@triton.jit
def _sum_of_spacings(
    table,
    owner,
    integers,
    numbers,
    min_normal,
    spacing,
    unscale,
    unscale_rest,
    to_fixed,
    WORD: tl.constexpr,
    IN_GAPS: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    MAX_INDEX: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    job = tl.load(owner + tl.program_id(0)).to(tl.int64)
    line, integers = table + job * WIDTH, integers + job * INTEGERS
    if _measures(tl.load(_address(line, STEP, tl.float32)).to(tl.int32)):
        index, mask = _place(line, BLOCK, ALIGNED)
        w = load(_address(line, WEIGHT, WORD, ALIGNED), index, mask, IS_BFLOAT16)
        y = tl.div_rn(w, tl.load(numbers + job * NUMBERS + SCALE))
        top = tl.load(integers + TOP).to(tl.int32)
        if IN_GAPS:
            size = tl.abs(_code(y, min_normal, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX))
            inverse = (0x7F000000 - top).to(tl.float32, bitcast=True)
            share = _gap(size, spacing, SHIFT, OFFSET, MAX_INDEX) * inverse * to_fixed
        else:
            difference = _binade(y, LOWEST, HIGHEST) - top + _ONE_BITS
            share = tl.maximum(difference, 0).to(tl.float32, bitcast=True)
        tl.atomic_add(integers + TOTAL, tl.sum(tl.where(mask, share.to(tl.int64), 0), axis=0))


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "max_value", "step_bits"])
def _prepare(
    table,
    integers,
    numbers,
    lr,
    beta1,
    beta2,
    max_value,
    step_bits,
    NEEDS_MEAN: tl.constexpr,
    IS_ULP: tl.constexpr,
    OWN_UNIT: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """The step's numbers from float64: corrections, lengths, the end of the grid."""
    job = tl.program_id(0).to(tl.int64)
    line, integers, numbers = table + job * WIDTH, integers + job * INTEGERS, numbers + job * NUMBERS
    lr, beta1, beta2 = _double(lr), _double(beta1), _double(beta2)
    count = tl.load(_address(line, STEP, tl.float32)).to(tl.int32)
    scale, elements = tl.load(numbers + SCALE).to(tl.float64), tl.load(line + ELEMENTS)
    mean = scale * 0.0 + 1.0
    if NEEDS_MEAN:
        cell = _address(line, MEAN, tl.float64)
        top = tl.load(integers + TOP).to(tl.uint32).to(tl.float32, bitcast=True).to(tl.float64)
        total = tl.load(integers + TOTAL).to(tl.float64)
        fresh = total * _ONE_SHARE / elements.to(tl.float64) * (top * _double(step_bits)) * scale
        takes = _measures(count) & (tl.load(integers + IS_FINITE) != 0)
        if elements > 0:
            mean = tl.where(takes, fresh, tl.load(cell))
            tl.store(cell, mean)
    by_mean = 1.0 / (1.0 - _power(beta1, count))
    tl.store(numbers + BY_MEAN, by_mean.to(tl.float32))
    tl.store(numbers + BY_ROOT, (1.0 / tl.sqrt(1.0 - _power(beta2, count))).to(tl.float32))
    if FEEDBACK:
        tl.store(numbers + REPAID, ((1.0 - beta1) / (beta1 * lr * by_mean)).to(tl.float32))
    tl.store(numbers + LENGTH, (lr * scale if IS_ULP else lr * scale / mean).to(tl.float32))
    tl.store(numbers + PER_RUNG, (lr if OWN_UNIT else lr / mean).to(tl.float32))
    tl.store(numbers + END, (_double(max_value) * scale).to(tl.float32))


@triton.jit
def _drawn(rungs, hashed):
    """floor(rungs + u)."""
    draw = (hashed >> 8).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24))
    whole = tl.floor(rungs)
    return whole + tl.where(draw < rungs - whole, 1.0, 0.0)


@triton.jit
def _clipped(rungs, clip):
    rungs = tl.where(rungs == rungs, rungs, 0.0)
    rungs = tl.where(rungs > -clip, rungs, -clip)
    return tl.where(rungs < clip, rungs, clip)


@triton.jit
def _rounded(
    y,
    hashed,
    min_normal,
    spacing,
    unscale,
    unscale_rest,
    max_value,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    MAX_INDEX: tl.constexpr,
    IS_NEAREST: tl.constexpr,
):
    """The grid's value for y, nearest or drawn, saturating; NaN stays."""
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if IS_NEAREST:
        u = tl.full(y.shape, _NEAREST_U, tl.uint32)
        code = magnitude_code(magnitude, u, 1, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    else:
        code = magnitude_code(magnitude, hashed >> 1, 0, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    size = tl.minimum(code, MAX_INDEX).to(tl.int32)
    value = tl.where(magnitude >= 0x7F800000, max_value, _value(size, spacing, SHIFT, OFFSET))
    signed = value.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    return tl.where(magnitude > 0x7F800000, bits, signed).to(tl.float32, bitcast=True)


@triton.jit
def _kept(value, pointer, IS_BFLOAT16: tl.constexpr):
    """What the tensor's dtype keeps of a float32."""
    if IS_BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits, rounded)
        return rounded.to(tl.float32, bitcast=True)
    return value.to(pointer.dtype.element_ty).to(tl.float32)
