"""The Triton kernels that double a tensor's scale after sustained overflow, and round its weights under it."""

from __future__ import annotations

import triton
import triton.language as tl

from altgrad.quantization.kernels.gpu_programs import hash_of, load, store
from altgrad.training.kernels import OVERFLOW_STEPS
from altgrad.training.kernels.gpu_parts import CARRY as OWED
from altgrad.training.kernels.gpu_parts import (
    COUNTS,
    ELEMENTS,
    INTEGERS,
    IS_FINITE,
    OVERFLOW,
    RESCALED,
    RESCALES,
    SCALE_CELL,
    SEED,
    STREAK,
    WEIGHT,
    WIDTH,
    _address,
    _double,
    _keys,
    _mixed,
    _place,
    _rounded,
)

_STREAK = tl.constexpr(OVERFLOW_STEPS)


@triton.jit(do_not_specialize=["share_bits"])
def _watch(table, integers, rows, share_bits):
    """Doubles the scale after sustained overflow, and says so to `_requantize`."""
    job = tl.program_id(0).to(tl.int64)
    line, integers, row = table + job * WIDTH, integers + job * INTEGERS, rows + job * COUNTS
    streak, scale_cell = _address(line, STREAK, tl.int64), _address(line, SCALE_CELL, tl.float32)
    crowded = tl.load(row + OVERFLOW).to(tl.float64) > _double(share_bits) * tl.load(line + ELEMENTS).to(tl.float64)
    is_finite = tl.load(integers + IS_FINITE) != 0
    old = tl.load(streak)
    count = tl.where(crowded, old + 1, old * 0)
    doubles = is_finite & (count >= _STREAK)
    tl.store(streak, tl.where(is_finite, tl.where(doubles, count * 0, count), old))
    scale = tl.load(scale_cell)
    tl.store(scale_cell, tl.where(doubles, scale * 2, scale))
    tl.store(row + RESCALED, tl.load(row + RESCALED) + doubles.to(tl.int64))
    tl.store(integers + RESCALES, doubles.to(tl.int64))


@triton.jit(do_not_specialize=["call"])
def _requantize(
    table,
    owner,
    integers,
    call,
    min_normal,
    spacing,
    unscale,
    unscale_rest,
    max_value,
    WORD: tl.constexpr,
    IS_NEAREST: tl.constexpr,
    CARRY: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    MAX_INDEX: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    job = tl.load(owner + tl.program_id(0)).to(tl.int64)
    line = table + job * WIDTH
    if tl.load(integers + job * INTEGERS + RESCALES) != 0:
        index, mask = _place(line, BLOCK, ALIGNED)
        weight, scale = _address(line, WEIGHT, WORD, ALIGNED), tl.load(_address(line, SCALE_CELL, tl.float32))
        first_key, second_key = _keys(_mixed(_mixed(tl.load(line + SEED), call), tl.full((), 1, tl.uint64)))
        hashed = hash_of(index.to(tl.uint32), first_key, second_key)
        y = tl.div_rn(load(weight, index, mask, IS_BFLOAT16), scale)
        y = _rounded(
            y, hashed, min_normal, spacing, unscale, unscale_rest, max_value, SHIFT, OFFSET, MAX_INDEX, IS_NEAREST
        )
        store(weight, index, y * scale, mask, IS_BFLOAT16)
        if CARRY:
            carry = _address(line, OWED, tl.float32, ALIGNED)
            tl.store(carry + index, tl.load(carry + index, mask=mask, other=0.0) * 0.5, mask=mask)
