"""The parts of the Triton step around its main loop: the survey of a tensor and the numbers that follow from it.

What the host would have to ask for stays on the device: the survey (is the gradient finite, the largest weight, the
mean spacing) is turned into the step's numbers by kernels of one program. Float64 arguments come as their bits, for
Triton passes floats as float32; division and square root are the correctly rounded ones. Sums are integers, so the
order in which programs add them does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from altgrad.quantization.kernels import NEAREST_U
from altgrad.quantization.kernels.gpu import _load, _magnitude_code
from altgrad.quantization.scaling import LARGEST_SCALE, SMALLEST_SCALE
from altgrad.training.kernels import FIXED, MEAN_EVERY

GRAD_BITS, WEIGHT_BITS, TOTAL, IS_FINITE, RESCALES, TOP = (tl.constexpr(i) for i in range(6))
SCALE, BY_MEAN, BY_ROOT, REPAID, LENGTH, PER_RUNG, END = (tl.constexpr(i) for i in range(7))
FLIPS, APPLIED, GRADIENT, EXPECTED, OVERFLOW, RESCALED, SKIPPED, TRAVEL, POSITION = (
    tl.constexpr(i) for i in range(9)
)
_ONE_BITS, _ONE_SHARE = tl.constexpr((127 + FIXED) << 23), tl.constexpr(2.0**-FIXED)
_EVERY = tl.constexpr(MEAN_EVERY)
_LEAST, _MOST = tl.constexpr(SMALLEST_SCALE), tl.constexpr(LARGEST_SCALE)
_NEAREST_U = tl.constexpr(NEAREST_U)


@triton.jit
def _double(bits):  # type: ignore[no-untyped-def]
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):  # type: ignore[no-untyped-def]
    """base^exponent by squaring, as on the host."""
    result = base * 0.0 + 1.0
    for _ in range(31):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _code(y, min_normal, unscale, unscale_rest, SHIFT: tl.constexpr, OFFSET: tl.constexpr,  # type: ignore
          MAX_INDEX: tl.constexpr):  # fmt: skip
    """Signed code nearest to y, int32; NaN gives 0."""
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    u = tl.full(y.shape, _NEAREST_U, tl.uint32)
    code = _magnitude_code(magnitude, u, 1, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    code = tl.where(magnitude > 0x7F800000, 0, tl.minimum(code, MAX_INDEX)).to(tl.int32)
    return tl.where(bits >= 0x80000000, -code, code)


@triton.jit
def _value(size, spacing, SHIFT: tl.constexpr, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """Value of a magnitude code, float32."""
    normal = ((size + OFFSET) << SHIFT).to(tl.float32, bitcast=True)
    return tl.where(size >= (1 << (23 - SHIFT)), normal, size.to(tl.float32) * spacing)


@triton.jit
def _gap(size, spacing, SHIFT: tl.constexpr, OFFSET: tl.constexpr, MAX_INDEX: tl.constexpr):  # type: ignore
    """Half the distance between the neighbours of a magnitude code."""
    inner = _value(tl.abs(size - 1), spacing, SHIFT, OFFSET)
    outer = _value(tl.minimum(size + 1, MAX_INDEX), spacing, SHIFT, OFFSET)
    return (outer - tl.where(size == 0, -inner, inner)) * 0.5


@triton.jit
def _binade(y, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):  # type: ignore[no-untyped-def]
    exponent = (y.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.int32)
    return tl.minimum(tl.maximum(exponent, LOWEST), HIGHEST)


@triton.jit
def _binade_of_quotient(w, scale, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):  # type: ignore[no-untyped-def]
    magnitude = (w.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    difference = magnitude - (scale.to(tl.uint32, bitcast=True).to(tl.int64) - 0x3F800000)
    difference = tl.where(magnitude < 0x00800000, 0, difference)
    exponent = (tl.minimum(tl.maximum(difference, 0), 0x7F800000) & 0x7F800000).to(tl.int32)
    return tl.minimum(tl.maximum(exponent, LOWEST), HIGHEST)


@triton.jit
def _survey(weight, grad, integers, elements, IS_BFLOAT16: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    w = _load(weight, index, mask, IS_BFLOAT16).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    g = _load(grad, index, mask, IS_BFLOAT16).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(integers + GRAD_BITS, tl.max(g.to(tl.int64), axis=0))
    tl.atomic_max(integers + WEIGHT_BITS, tl.max(w.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["per_max", "master_scale"])
def _begin(integers, numbers, step, scale_cell, row, per_max, master_scale, HAS_CELL: tl.constexpr,  # type: ignore
           IS_FIXED: tl.constexpr, IS_WIDE: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):  # fmt: skip
    """Counts the step, and finds the scale the codes are counted under and the binade of the largest weight."""
    is_finite = (tl.load(integers + GRAD_BITS) < 0x7F800000).to(tl.int64)
    tl.store(integers + IS_FINITE, is_finite)
    tl.store(step, tl.load(step) + is_finite.to(tl.float32))
    tl.store(row + SKIPPED, tl.load(row + SKIPPED) + 1 - is_finite)
    bits = tl.load(integers + WEIGHT_BITS)
    largest = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    if HAS_CELL:
        scale = tl.load(scale_cell)
    elif IS_FIXED:
        scale = largest * 0.0 + master_scale
        scale = tl.where(bits < 0x7F800000, scale, master_scale)
    elif IS_WIDE:
        scale = tl.where(bits < 0, largest, 1.0)
    else:
        scale = tl.minimum(tl.maximum(largest * per_max, _LEAST), _MOST)
        scale = tl.where((bits > 0) & (bits < 0x7F800000), scale, 1.0)
    tl.store(numbers + SCALE, scale)
    tl.store(integers + TOP, _binade(tl.div_rn(largest, scale), LOWEST, HIGHEST).to(tl.int64))


@triton.jit
def _sum_of_spacings(weight, integers, numbers, elements, min_normal, spacing, unscale, unscale_rest, to_fixed,  # type: ignore
                     IN_GAPS: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr, MAX_INDEX: tl.constexpr,
                     LOWEST: tl.constexpr, HIGHEST: tl.constexpr, IS_BFLOAT16: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    y = tl.div_rn(_load(weight, index, mask, IS_BFLOAT16), tl.load(numbers + SCALE))
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
def _prepare(integers, numbers, step, mean_cell, elements, lr, beta1, beta2, max_value, step_bits,  # type: ignore
             NEEDS_MEAN: tl.constexpr, IS_ULP: tl.constexpr, OWN_UNIT: tl.constexpr,
             FEEDBACK: tl.constexpr):  # fmt: skip
    """The step's numbers from float64: corrections, lengths, the end of the grid."""
    lr, beta1, beta2 = _double(lr), _double(beta1), _double(beta2)
    count, scale = tl.load(step).to(tl.int32), tl.load(numbers + SCALE).to(tl.float64)
    mean = scale * 0.0 + 1.0
    if NEEDS_MEAN:
        top = tl.load(integers + TOP).to(tl.uint32).to(tl.float32, bitcast=True).to(tl.float64)
        total = tl.load(integers + TOTAL).to(tl.float64)
        fresh = total * _ONE_SHARE / elements.to(tl.float64) * (top * _double(step_bits)) * scale
        measures = ((count <= _EVERY) | (count % _EVERY == 0)) & (tl.load(integers + IS_FINITE) != 0)
        mean = tl.where(measures, fresh, tl.load(mean_cell))
        tl.store(mean_cell, mean)
    by_mean = 1.0 / (1.0 - _power(beta1, count))
    tl.store(numbers + BY_MEAN, by_mean.to(tl.float32))
    tl.store(numbers + BY_ROOT, (1.0 / tl.sqrt(1.0 - _power(beta2, count))).to(tl.float32))
    if FEEDBACK:
        tl.store(numbers + REPAID, ((1.0 - beta1) / (beta1 * lr * by_mean)).to(tl.float32))
    tl.store(numbers + LENGTH, (lr * scale if IS_ULP else lr * scale / mean).to(tl.float32))
    tl.store(numbers + PER_RUNG, (lr if OWN_UNIT else lr / mean).to(tl.float32))
    tl.store(numbers + END, (_double(max_value) * scale).to(tl.float32))


@triton.jit
def _drawn(rungs, hashed):  # type: ignore[no-untyped-def]
    """floor(rungs + u)."""
    draw = (hashed >> 8).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24))
    whole = tl.floor(rungs)
    return whole + tl.where(draw < rungs - whole, 1.0, 0.0)


@triton.jit
def _clipped(rungs, clip):  # type: ignore[no-untyped-def]
    rungs = tl.where(rungs == rungs, rungs, 0.0)
    rungs = tl.where(rungs > -clip, rungs, -clip)
    return tl.where(rungs < clip, rungs, clip)


@triton.jit
def _rounded(y, hashed, min_normal, spacing, unscale, unscale_rest, max_value, SHIFT: tl.constexpr,  # type: ignore
             OFFSET: tl.constexpr, MAX_INDEX: tl.constexpr, IS_NEAREST: tl.constexpr):  # fmt: skip
    """The grid's value for y, nearest or drawn, saturating; NaN stays."""
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if IS_NEAREST:
        u = tl.full(y.shape, _NEAREST_U, tl.uint32)
        code = _magnitude_code(magnitude, u, 1, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    else:
        code = _magnitude_code(magnitude, hashed >> 1, 0, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    size = tl.minimum(code, MAX_INDEX).to(tl.int32)
    value = tl.where(magnitude >= 0x7F800000, max_value, _value(size, spacing, SHIFT, OFFSET))
    signed = value.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    return tl.where(magnitude > 0x7F800000, bits, signed).to(tl.float32, bitcast=True)
