"""The step as Triton kernels, equal to `reference` bit for bit; nothing here waits for the device.

Per tensor: a survey, the numbers that follow from it, one loop that steps and counts, and two small kernels that double
a crowded scale. Each ends at once where the gradient was not finite. Fused multiply-add is off, as it would round
otherwise. Tested under Triton's interpreter; its speed on a GPU has not been measured.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.quantization import get_format, mix_seed
from altgrad.quantization.kernels import grid_of, hash_keys
from altgrad.quantization.kernels.gpu import BLOCK, _hash, _load, _plain, _store
from altgrad.training.kernels import (
    FIXED,
    GRADIENT_FLOOR,
    MAX_RUNGS,
    OVERFLOW_SHARE,
    OVERFLOW_STEPS,
    Counting,
    Geometry,
    Job,
    Moments,
    Placement,
    Plan,
)  # fmt: skip
from altgrad.training.kernels.gpu_parts import (
    APPLIED,
    BY_MEAN,
    BY_ROOT,
    END,
    EXPECTED,
    FLIPS,
    GRADIENT,
    IS_FINITE,
    LENGTH,
    OVERFLOW,
    PER_RUNG,
    POSITION,
    REPAID,
    RESCALED,
    RESCALES,
    SCALE,
    TRAVEL,
    _begin,
    _binade,
    _binade_of_quotient,
    _clipped,
    _code,
    _double,
    _drawn,
    _gap,
    _prepare,
    _rounded,
    _sum_of_spacings,
    _survey,
    _value,
)  # fmt: skip

_FLOOR, _FULL = tl.constexpr(GRADIENT_FLOOR), tl.constexpr(2.0**FIXED)
_SHARE, _STREAK = tl.constexpr(OVERFLOW_SHARE), tl.constexpr(OVERFLOW_STEPS)
_ADAM, _GIVEN = tl.constexpr(int(Moments.ADAM)), tl.constexpr(int(Moments.GIVEN))
_MASTER, _NEAREST = tl.constexpr(int(Placement.MASTER)), tl.constexpr(int(Placement.NEAREST))
_RUNGS, _ALL = tl.constexpr(int(Placement.RUNGS)), tl.constexpr(int(Counting.ALL))


@triton.jit
def _add(row, column, values):  # type: ignore[no-untyped-def]
    tl.atomic_add(row + column, tl.sum(values.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=[
    "lr", "shrink", "beta1", "rest1", "beta2", "rest2", "eps", "limit", "max_stiffness", "least", "clip", "whole_clip",
    "rung_decay", "first_key", "second_key",
])  # fmt: skip
def _step(  # type: ignore[no-untyped-def]
    weight, grad, first, second, direction, carry, integers, numbers, row, elements, lr, shrink, beta1, rest1, beta2,
    rest2, eps, limit, max_stiffness, least, clip, whole_clip, rung_decay, first_key, second_key, min_normal, spacing,
    unscale, unscale_rest, max_value, to_fixed, mantissa_step,
    MOMENTS: tl.constexpr, BY_SPACING: tl.constexpr, BY_GRADIENT: tl.constexpr, PLACEMENT: tl.constexpr,
    HAS_GRID: tl.constexpr,
    HAS_EXPONENT: tl.constexpr, FEEDBACK: tl.constexpr, CARRY: tl.constexpr, DECAYS: tl.constexpr,
    COUNTS: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr, MAX_INDEX: tl.constexpr, LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr, IS_BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(integers + IS_FINITE) != 0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        w, g = _load(weight, index, mask, IS_BFLOAT16), _load(grad, index, mask, IS_BFLOAT16)
        hashed = _hash(index.to(tl.uint32), first_key.to(tl.uint32), second_key.to(tl.uint32))
        scale = tl.load(numbers + SCALE)
        if COUNTS == _ALL:
            _add(row, GRADIENT, mask & (tl.abs(g) > _FLOOR))
        if HAS_GRID and BY_GRADIENT:
            binade = (w.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            literal = binade * mantissa_step if HAS_EXPONENT else w * 0.0 + least
            stiffness = tl.where(w == 0, least, literal)
            g = g * tl.where(stiffness < max_stiffness, stiffness, max_stiffness)
        m = g
        denominator = g
        if MOMENTS == _GIVEN:
            d = tl.load(direction + index, mask=mask, other=0.0)
        elif MOMENTS == _ADAM:
            m = tl.load(first + index, mask=mask, other=0.0) * beta1 + g * rest1
            v = tl.load(second + index, mask=mask, other=0.0) * beta2 + (g * g) * rest2
            tl.store(second + index, v, mask=mask)
            denominator = tl.sqrt_rn(v) * tl.load(numbers + BY_ROOT) + eps
            d = tl.div_rn(m * tl.load(numbers + BY_MEAN), denominator)
        else:
            m = tl.load(first + index, mask=mask, other=0.0) * beta1 + g
            d = m
        y = tl.div_rn(w, scale)
        if HAS_GRID and PLACEMENT == _RUNGS:
            code = _code(y, min_normal, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX)
            rungs = d * tl.load(numbers + PER_RUNG)
            if DECAYS:
                rungs += tl.div_rn(y * rung_decay, _gap(tl.abs(code), spacing, SHIFT, OFFSET, MAX_INDEX))
            rungs = _clipped(rungs, clip)
            if CARRY:
                owed = tl.load(carry + index, mask=mask, other=0.0)
                place = owed - rungs
                steps = tl.where(rungs != 0, -_clipped(_drawn(place, hashed), whole_clip), 0.0)
            else:
                steps = _drawn(rungs, hashed)
            wanted = code - steps.to(tl.int32)
            inside = tl.maximum(tl.minimum(wanted, MAX_INDEX), -MAX_INDEX)
            moved = inside - code
            if CARRY:
                below, above = (-MAX_INDEX - inside).to(tl.float32), (MAX_INDEX - inside).to(tl.float32)
                rest = place - moved.to(tl.float32)
                rest = tl.where(rest > below, rest, below)
                rest = tl.where(rest < above, rest, above)
                tl.store(carry + index, tl.where(rungs != 0, rest, owed), mask=mask)
            value = _value(tl.abs(inside), spacing, SHIFT, OFFSET)
            value = tl.where(inside < 0, -value, value) * scale
            _store(weight, index, tl.where(w == w, value, w), mask, IS_BFLOAT16)
            _add(row, OVERFLOW, mask & (wanted != inside))
            applied, share = rungs != 0, tl.abs(rungs) * _FULL
        else:
            if HAS_GRID and BY_SPACING:
                length = _binade_of_quotient(w, scale, LOWEST, HIGHEST).to(tl.float32, bitcast=True) * mantissa_step
                length = length * tl.load(numbers + LENGTH)
                change = d * tl.where(length < limit, length, limit)
            else:
                change = d * lr
            target = w - (change + w * shrink)
            moved, share = index * 0, y
            if PLACEMENT == _MASTER or not HAS_GRID:
                _store(weight, index, target, mask, IS_BFLOAT16)
                target = _kept(target, weight, IS_BFLOAT16)
                y_target = tl.div_rn(target, scale)
                y_new = y_target
            else:
                y_target = tl.div_rn(target, scale)
                y_new = _rounded(y_target, hashed, min_normal, spacing, unscale, unscale_rest, max_value, SHIFT,
                                 OFFSET, MAX_INDEX, PLACEMENT == _NEAREST)  # fmt: skip
                new = y_new * scale
                _store(weight, index, new, mask, IS_BFLOAT16)
                _add(row, OVERFLOW, mask & (tl.abs(y_target) > max_value))
                if FEEDBACK:
                    end = tl.load(numbers + END)
                    ended = tl.where(target < end, target, end)
                    error = tl.where(ended > -end, ended, -end) - new
                    m = m - (error * denominator) * tl.load(numbers + REPAID)
            applied = target != w
            if COUNTS:
                before = _code(y, min_normal, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX)
                moved = _code(y_new, min_normal, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX) - before
                way = tl.minimum(_binade(y, LOWEST, HIGHEST), _binade(y_target, LOWEST, HIGHEST))
                share = tl.abs(y_target - y) * (0x7F000000 - way).to(tl.float32, bitcast=True) * to_fixed
        if MOMENTS != _GIVEN:
            tl.store(first + index, m, mask=mask)
        if COUNTS:
            moved = tl.where(mask, moved, 0)
            _add(row, FLIPS, moved != 0)
            _add(row, APPLIED, mask & applied)
        if COUNTS == _ALL:
            _add(row, TRAVEL, tl.abs(moved))
            _add(row, POSITION, moved)
            _add(row, EXPECTED, tl.where(mask, tl.where(share < _FULL, share, _FULL).to(tl.int32), 0))


@triton.jit
def _kept(value, pointer, IS_BFLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the tensor's dtype keeps of a float32."""
    if IS_BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits, rounded)
        return rounded.to(tl.float32, bitcast=True)
    return value.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["share_bits"])
def _watch(integers, streak, scale_cell, row, elements, share_bits):  # type: ignore[no-untyped-def]
    """Doubles the scale after sustained overflow, and says so to `_requantize`."""
    crowded = tl.load(row + OVERFLOW).to(tl.float64) > _double(share_bits) * elements.to(tl.float64)
    is_finite = tl.load(integers + IS_FINITE) != 0
    old = tl.load(streak)
    count = tl.where(crowded, old + 1, old * 0)
    doubles = is_finite & (count >= _STREAK)
    tl.store(streak, tl.where(is_finite, tl.where(doubles, count * 0, count), old))
    scale = tl.load(scale_cell)
    tl.store(scale_cell, tl.where(doubles, scale * 2, scale))
    tl.store(row + RESCALED, tl.load(row + RESCALED) + doubles.to(tl.int64))
    tl.store(integers + RESCALES, doubles.to(tl.int64))


@triton.jit(do_not_specialize=["first_key", "second_key"])
def _requantize(  # type: ignore[no-untyped-def]
    weight, carry, integers, scale_cell, elements, first_key, second_key, min_normal, spacing, unscale, unscale_rest,
    max_value, IS_NEAREST: tl.constexpr, CARRY: tl.constexpr, SHIFT: tl.constexpr, OFFSET: tl.constexpr,
    MAX_INDEX: tl.constexpr, IS_BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(integers + RESCALES) != 0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        scale = tl.load(scale_cell)
        hashed = _hash(index.to(tl.uint32), first_key.to(tl.uint32), second_key.to(tl.uint32))
        y = tl.div_rn(_load(weight, index, mask, IS_BFLOAT16), scale)
        y = _rounded(y, hashed, min_normal, spacing, unscale, unscale_rest, max_value, SHIFT, OFFSET, MAX_INDEX,
                     IS_NEAREST)  # fmt: skip
        _store(weight, index, y * scale, mask, IS_BFLOAT16)
        if CARRY:
            tl.store(carry + index, tl.load(carry + index, mask=mask, other=0.0) * 0.5, mask=mask)


def step_tensors(jobs: list[Job], plan: Plan, call: int, counts: Tensor) -> None:
    """One step of every job; `counts` is int64 [jobs, len(Count)] and is added to."""
    for job, row in zip(jobs, counts, strict=True):
        _step_one(job, plan, mix_seed(job.seed, call), row)


def _step_one(job: Job, plan: Plan, seed: int, row: Tensor) -> None:
    fmt = plan.fmt or get_format("E4M3")
    grid, weight = grid_of(fmt), _plain(job.weight)
    elements, is_bfloat16 = job.weight.numel(), job.weight.dtype == torch.bfloat16
    programs = (max(1, triton.cdiv(elements, BLOCK)),)
    integers = torch.zeros(6, dtype=torch.int64, device=weight.device)
    numbers = torch.zeros(7, device=weight.device)
    shape = {"SHIFT": grid.shift, "OFFSET": grid.offset, "MAX_INDEX": grid.max_index}
    ends = {"LOWEST": grid.min_exponent_bits, "HIGHEST": grid.max_exponent_bits}
    block = {"IS_BFLOAT16": is_bfloat16, "BLOCK": BLOCK, "enable_fp_fusion": False}
    units = (grid.min_normal, grid.spacing, grid.unscale, grid.unscale_rest)
    to_fixed, none = 2.0**FIXED / grid.mantissa_step, numbers
    in_rungs = plan.placement == Placement.RUNGS and plan.fmt is not None
    is_nearest = plan.placement == Placement.NEAREST
    feedback = plan.feedback and plan.lr > 0

    _survey[programs](weight, _plain(job.grad), integers, elements, **block)
    _begin[(1,)](
        integers, numbers, job.step, _or(job.scale, none), row, 1.0 / fmt.max, plan.master_scale or 1.0,
        HAS_CELL=job.scale is not None, IS_FIXED=plan.master_scale is not None,
        IS_WIDE=fmt.total_bits > 8 or not plan.needs_scale, enable_fp_fusion=False, **ends,
    )  # fmt: skip
    needs_mean = plan.needs_mean and elements > 0
    if needs_mean:
        _sum_of_spacings[programs](
            weight, integers, numbers, elements, *units, to_fixed, IN_GAPS=in_rungs, **shape, **ends, **block
        )
    _prepare[(1,)](
        integers, numbers, job.step, _or(job.mean, none), elements, _bits(plan.lr), _bits(plan.beta1),
        _bits(plan.beta2), _bits(fmt.max), _bits(grid.mantissa_step), NEEDS_MEAN=needs_mean,
        IS_ULP=plan.geometry == Geometry.ULP, OWN_UNIT=plan.own_unit, FEEDBACK=feedback, enable_fp_fusion=False,
    )  # fmt: skip
    is_relative = plan.geometry == Geometry.RELATIVE
    by_spacing = is_relative or plan.geometry == Geometry.ULP
    clip = min(plan.rung_clip, MAX_RUNGS)
    _step[programs](
        weight, _plain(job.grad), _or(job.first, none), _or(job.second, none), _or(job.direction, none),
        _or(job.carry, none), integers, numbers, row, elements, plan.lr, plan.lr * plan.weight_decay, plan.beta1,
        1 - plan.beta1, plan.beta2, 1 - plan.beta2, plan.eps,
        plan.lr * plan.max_stiffness if is_relative else float("inf"), plan.max_stiffness, grid.spacing, clip,
        float(int(clip)), plan.weight_decay * (1.0 if plan.own_unit else plan.lr), *hash_keys(seed), *units,
        grid.max_value, to_fixed, grid.mantissa_step, MOMENTS=int(plan.moments), BY_SPACING=by_spacing,
        BY_GRADIENT=plan.geometry == Geometry.GRADIENT,
        PLACEMENT=int(plan.placement), HAS_GRID=plan.fmt is not None, HAS_EXPONENT=fmt.exponent_bits > 0,
        FEEDBACK=feedback, CARRY=plan.carry, DECAYS=plan.weight_decay > 0, COUNTS=int(plan.counting), **shape, **ends,
        **block,
    )  # fmt: skip
    if plan.rescales:
        assert job.scale is not None and job.streak is not None
        _watch[(1,)](integers, job.streak, job.scale, row, elements, _bits(OVERFLOW_SHARE))
        _requantize[programs](
            weight, _or(job.carry, none), integers, job.scale, elements, *hash_keys(mix_seed(seed, 1)), *units,
            grid.max_value, IS_NEAREST=is_nearest, CARRY=plan.carry, **shape, **block,
        )  # fmt: skip


def _or(given: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if given is None else given


def _bits(number: float) -> int:
    """The bits of a float64 as a signed integer."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
