"""The step as Triton kernels, equal to `reference` bit for bit; nothing here waits for the device.

All tensors of a group are stepped by the same few launches: a survey, the numbers that follow from it, one loop that
steps and counts, and two small kernels that double a crowded scale. Each ends at once where a gradient was not finite.
Fused multiply-add is off, as it would round otherwise.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.quantization import get_format
from altgrad.quantization.kernels import grid_of
from altgrad.quantization.kernels.gpu_programs import hash_of, load, store
from altgrad.training.kernels import (
    FIXED,
    GRADIENT_FLOOR,
    MAX_RUNGS,
    OVERFLOW_SHARE,
    Counting,
    Geometry,
    Job,
    Moments,
    Placement,
    Plan,
    least_stiffness,
)
from altgrad.training.kernels.gpu_parts import (
    APPLIED,
    BY_MEAN,
    BY_ROOT,
    COUNTS,
    DIRECTION,
    END,
    EXPECTED,
    FIRST,
    FLIPS,
    GRAD,
    GRADIENT,
    INTEGERS,
    IS_FINITE,
    LARGEST,
    LENGTH,
    NUMBERS,
    OVERFLOW,
    PER_RUNG,
    POSITION,
    REPAID,
    SCALE,
    SECOND,
    SEED,
    TRAVEL,
    WEIGHT,
    WIDTH,
    _address,
    _begin,
    _binade,
    _binade_of_quotient,
    _clipped,
    _code,
    _drawn,
    _gap,
    _kept,
    _keys,
    _mixed,
    _place,
    _prepare,
    _rounded,
    _sum_of_spacings,
    _survey,
    _value,
)
from altgrad.training.kernels.gpu_parts import CARRY as OWED
from altgrad.training.kernels.gpu_rescale import _requantize, _watch
from altgrad.training.kernels.gpu_table import BLOCK, table_of

_FLOOR, _FULL = tl.constexpr(GRADIENT_FLOOR), tl.constexpr(2.0**FIXED)
_ADAM, _GIVEN = tl.constexpr(int(Moments.ADAM)), tl.constexpr(int(Moments.GIVEN))
_MASTER, _NEAREST = tl.constexpr(int(Placement.MASTER)), tl.constexpr(int(Placement.NEAREST))
WARPS = 4
_WORDS = {torch.float32: tl.float32, torch.bfloat16: tl.int16, torch.float16: tl.float16}
_RUNGS, _ALL = tl.constexpr(int(Placement.RUNGS)), tl.constexpr(int(Counting.ALL))


@triton.jit
def _add(row, COLUMN: tl.constexpr, values):
    """Adds a block's sum to a count; int32 holds it, but for shares of one."""
    tl.atomic_add(row + COLUMN, tl.sum(values.to(tl.int32), axis=0).to(tl.int64))


@triton.jit(
    do_not_specialize=[
        "call",
        "lr",
        "shrink",
        "beta1",
        "rest1",
        "beta2",
        "rest2",
        "eps",
        "limit",
        "max_stiffness",
        "least",
        "clip",
        "whole_clip",
        "rung_decay",
    ]
)
def _step(
    table,
    owner,
    integers,
    numbers,
    rows,
    call,
    lr,
    shrink,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    limit,
    max_stiffness,
    least,
    clip,
    whole_clip,
    rung_decay,
    min_normal,
    spacing,
    unscale,
    unscale_rest,
    max_value,
    to_fixed,
    mantissa_step,
    WORD: tl.constexpr,
    FOLLOWS: tl.constexpr,
    MOMENTS: tl.constexpr,
    BY_SPACING: tl.constexpr,
    BY_GRADIENT: tl.constexpr,
    PLACEMENT: tl.constexpr,
    HAS_GRID: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    FEEDBACK: tl.constexpr,
    CARRY: tl.constexpr,
    DECAYS: tl.constexpr,
    COUNTING: tl.constexpr,
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
    line, row = table + job * WIDTH, rows + job * COUNTS
    integers, numbers = integers + job * INTEGERS, numbers + job * NUMBERS
    if tl.load(integers + IS_FINITE) != 0:
        index, mask = _place(line, BLOCK, ALIGNED)
        weight, first = _address(line, WEIGHT, WORD, ALIGNED), _address(line, FIRST, tl.float32, ALIGNED)
        w = load(weight, index, mask, IS_BFLOAT16)
        g = load(_address(line, GRAD, WORD, ALIGNED), index, mask, IS_BFLOAT16)
        first_key, second_key = _keys(_mixed(tl.load(line + SEED), call))
        hashed = hash_of(index.to(tl.uint32), first_key, second_key)
        scale = tl.load(numbers + SCALE)
        if COUNTING == _ALL:
            _add(row, GRADIENT, mask & (tl.abs(g) > _FLOOR))
        if HAS_GRID and BY_GRADIENT:
            binade = (w.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            literal = binade * mantissa_step if HAS_EXPONENT else w * 0.0 + least
            stiffness = tl.where(w == 0, least, literal)
            g = g * tl.where(stiffness < max_stiffness, stiffness, max_stiffness)
        m = g
        denominator = g
        if MOMENTS == _GIVEN:
            d = tl.load(_address(line, DIRECTION, tl.float32, ALIGNED) + index, mask=mask, other=0.0)
        elif MOMENTS == _ADAM:
            m = tl.load(first + index, mask=mask, other=0.0) * beta1 + g * rest1
            second = _address(line, SECOND, tl.float32, ALIGNED)
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
                carry = _address(line, OWED, tl.float32, ALIGNED)
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
            store(weight, index, tl.where(w == w, value, w), mask, IS_BFLOAT16)
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
                store(weight, index, target, mask, IS_BFLOAT16)
                target = _kept(target, weight, IS_BFLOAT16)
                if FOLLOWS:
                    magnitude = (target.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
                    peak = tl.max(tl.where(mask, magnitude, 0), axis=0)
                    tl.atomic_max(_address(line, LARGEST, tl.int32), peak)
                y_target = tl.div_rn(target, scale)
                y_new = y_target
            else:
                y_target = tl.div_rn(target, scale)
                y_new = _rounded(
                    y_target,
                    hashed,
                    min_normal,
                    spacing,
                    unscale,
                    unscale_rest,
                    max_value,
                    SHIFT,
                    OFFSET,
                    MAX_INDEX,
                    PLACEMENT == _NEAREST,
                )
                new = y_new * scale
                store(weight, index, new, mask, IS_BFLOAT16)
                _add(row, OVERFLOW, mask & (tl.abs(y_target) > max_value))
                if FEEDBACK:
                    end = tl.load(numbers + END)
                    ended = tl.where(target < end, target, end)
                    error = tl.where(ended > -end, ended, -end) - new
                    m = m - (error * denominator) * tl.load(numbers + REPAID)
            applied = target != w
            if COUNTING:
                before = _code(y, min_normal, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX)
                moved = _code(y_new, min_normal, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX) - before
                way = tl.minimum(_binade(y, LOWEST, HIGHEST), _binade(y_target, LOWEST, HIGHEST))
                share = tl.abs(y_target - y) * (0x7F000000 - way).to(tl.float32, bitcast=True) * to_fixed
        if MOMENTS != _GIVEN:
            tl.store(first + index, m, mask=mask)
        if COUNTING:
            moved = tl.where(mask, moved, 0)
            _add(row, FLIPS, moved != 0)
            _add(row, APPLIED, mask & applied)
        if COUNTING == _ALL:
            _add(row, TRAVEL, tl.abs(moved))
            _add(row, POSITION, moved)
            expected = tl.where(mask, tl.where(share < _FULL, share, _FULL).to(tl.int64), 0)
            tl.atomic_add(row + EXPECTED, tl.sum(expected, axis=0))


def step_tensors(jobs: list[Job], plan: Plan, call: int, counts: Tensor) -> None:
    """One step of every job, all of one dtype; `counts` is int64 [jobs, len(Count)] and is added to."""
    fmt = plan.fmt or get_format("E4M3")
    grid, device, dtype = grid_of(fmt), jobs[0].weight.device, jobs[0].weight.dtype
    table, owner, is_aligned = table_of(jobs, device)
    blocks, tensors = (len(owner),), (len(jobs),)
    integers = torch.zeros(len(jobs), INTEGERS.value, dtype=torch.int64, device=device)
    numbers = torch.empty(len(jobs), NUMBERS.value, dtype=torch.float32, device=device)
    shape = {"SHIFT": grid.shift, "OFFSET": grid.offset, "MAX_INDEX": grid.max_index}
    ends = {"LOWEST": grid.min_exponent_bits, "HIGHEST": grid.max_exponent_bits}
    block = {
        "WORD": _WORDS[dtype],
        "IS_BFLOAT16": dtype == torch.bfloat16,
        "ALIGNED": is_aligned,
        "BLOCK": BLOCK,
        "enable_fp_fusion": False,
        "num_warps": WARPS,
    }
    units = (grid.min_normal, grid.spacing, grid.unscale, grid.unscale_rest)
    to_fixed = 2.0**FIXED / grid.mantissa_step
    in_rungs = plan.placement == Placement.RUNGS and plan.fmt is not None
    feedback, follows = plan.feedback and plan.lr > 0, jobs[0].largest is not None

    _survey[blocks](table, owner, integers, NEEDS_MEAN=plan.needs_mean, FOLLOWS=follows, **block)
    _begin[tensors](
        table,
        integers,
        numbers,
        counts,
        1.0 / fmt.max,
        plan.master_scale or 1.0,
        HAS_CELL=jobs[0].scale is not None,
        FOLLOWS=follows,
        IS_FIXED=plan.master_scale is not None,
        enable_fp_fusion=False,
        num_warps=1,
        **ends,
    )
    if plan.needs_mean:
        _sum_of_spacings[blocks](
            table, owner, integers, numbers, *units, to_fixed, IN_GAPS=in_rungs, **shape, **ends, **block
        )
    _prepare[tensors](
        table,
        integers,
        numbers,
        _bits(plan.lr),
        _bits(plan.beta1),
        _bits(plan.beta2),
        _bits(fmt.max),
        _bits(grid.mantissa_step),
        NEEDS_MEAN=plan.needs_mean,
        IS_ULP=plan.geometry == Geometry.ULP,
        OWN_UNIT=plan.own_unit,
        FEEDBACK=feedback,
        enable_fp_fusion=False,
        num_warps=1,
    )
    is_relative = plan.geometry == Geometry.RELATIVE
    clip = min(plan.rung_clip, MAX_RUNGS)
    _step[blocks](
        table,
        owner,
        integers,
        numbers,
        counts,
        call,
        plan.lr,
        plan.lr * plan.weight_decay,
        plan.beta1,
        1 - plan.beta1,
        plan.beta2,
        1 - plan.beta2,
        plan.eps,
        plan.lr * plan.max_stiffness if is_relative else float("inf"),
        plan.max_stiffness,
        least_stiffness(fmt),
        clip,
        float(int(clip)),
        plan.weight_decay * (1.0 if plan.own_unit else plan.lr),
        *units,
        grid.max_value,
        to_fixed,
        grid.mantissa_step,
        FOLLOWS=follows,
        MOMENTS=int(plan.moments),
        BY_SPACING=is_relative or plan.geometry == Geometry.ULP,
        BY_GRADIENT=plan.geometry == Geometry.GRADIENT,
        PLACEMENT=int(plan.placement),
        HAS_GRID=plan.fmt is not None,
        HAS_EXPONENT=fmt.exponent_bits > 0,
        FEEDBACK=feedback,
        CARRY=plan.carry,
        DECAYS=plan.weight_decay > 0,
        COUNTING=int(plan.counting),
        **shape,
        **ends,
        **block,
    )
    if plan.rescales:
        _watch[tensors](table, integers, counts, _bits(OVERFLOW_SHARE), num_warps=1)
        _requantize[blocks](
            table,
            owner,
            integers,
            call,
            *units,
            grid.max_value,
            IS_NEAREST=plan.placement == Placement.NEAREST,
            CARRY=plan.carry,
            **shape,
            **block,
        )


def _bits(number: float) -> int:
    """The bits of a float64 as a signed integer."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
