"""Scales of lines: a row (an output channel, a token) or a block of one (MX, NVFP4) finds its scale and is rounded
under it in one launch, with a second one before it where the whole tensor has a scale too.

A program takes as many lines as fill it; a line longer than a program's width is read in pieces, twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.quantization.kernels import NEAREST_U, Grid, Rounding, hash_keys, last_finite, overflow_values
from altgrad.quantization.kernels.gpu_programs import (
    draw_of,
    last_code,
    load,
    magnitude_code,
    scale_of,
    signed_like,
    value_of,
)

ELEMENTS, WARPS, MOST_PARTS = 2048, 4, 1024
ROWS, E8M0, E4M3 = 0, 1, 2
_E8M0, _E4M3 = tl.constexpr(E8M0), tl.constexpr(E4M3)
_LEAST_TENSOR_SCALE = tl.constexpr(2.0**-126)
_NEAREST = tl.constexpr(NEAREST_U)


class Lines(NamedTuple):
    """How lines find their scales.

    `size`: elements of a block, 0 for whole rows; `emax`: exponent of the elements' top binade; `beyond`: the largest
    product of a scale in E4M3 and an element; `grid`: that of E4M3.
    """

    kind: int
    per_max: float = 0.0
    power_of_two: bool = False
    size: int = 0
    emax: int = 0
    beyond: float = 1.0
    grid: Grid | None = None


@triton.jit
def _span(line, lines, columns, each, size):
    """Where lines begin in the tensor and how long they are; those beyond the last have no elements."""
    number = line % each
    length = tl.minimum(columns - number * size, size)
    return line // each * columns + number * size, tl.where(line < lines, length, 0)


@triton.jit
def _amax_of(x_pointer, begin, length, size, LINES: tl.constexpr, WIDTH: tl.constexpr, IS_BFLOAT16: tl.constexpr):
    """[LINES] bits of the lines' largest magnitudes, int32; above infinity's where there is a NaN."""
    place = tl.arange(0, WIDTH)
    largest = tl.zeros((LINES,), tl.int32)
    for offset in range(0, size, WIDTH):
        inside = (offset + place)[None, :] < length[:, None]
        index = begin[:, None] + (offset + place)[None, :]
        bits = load(x_pointer, index, inside, IS_BFLOAT16).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(bits.to(tl.int32), axis=1))
    return largest


@triton.jit
def _in_block(largest):
    """An infinity counts as 2^127 in a block."""
    return tl.where(largest == 0x7F800000, 0x7F000000, largest)


@triton.jit
def _largest_block(
    x_pointer,
    partial,
    rounds,
    lines,
    columns,
    each,
    size,
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
):
    """Each program's largest block amax that is a number, as bits."""
    whole = tl.zeros((LINES,), tl.int32)
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    for _ in range(rounds):  # a loop over lines would step past the end of 32 bits
        begin, length = _span(line, lines, columns, each, size)
        largest = _in_block(_amax_of(x_pointer, begin, length, size, LINES, WIDTH, IS_BFLOAT16))
        whole = tl.maximum(whole, tl.where(largest > 0x7F800000, 0, largest))
        line += PARTS * LINES
    tl.store(partial + tl.program_id(0), tl.max(whole, axis=0))


@triton.jit
def _e8m0_scale(largest, emax):
    """2^(floor(log2 amax) - emax) of these bits, held to what 8 bits of exponent say; NaN of NaN."""
    # A subnormal is a whole number of 2^-149: as a float32, its exponent is exact.
    whole = (largest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - (127 + 149)
    exponent = tl.where(largest < 0x00800000, whole, (largest >> 23) - 127)
    code = tl.minimum(tl.maximum(exponent - emax, -127), 127) + 127
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(largest > 0x7F800000, largest, bits).to(tl.float32, bitcast=True)


# A key of 1 must stay a number: specialised, it would become a constant without a type.
@triton.jit(do_not_specialize=["first", "second", "u", "emax"])
def _round_lines(
    x_pointer,
    out_pointer,
    scales_pointer,
    lines,
    columns,
    each,
    size,
    first,
    second,
    min_normal,
    spacing,
    unscale,
    unscale_rest,
    finite_over,
    last,
    u,
    partial,
    per_max,
    emax,
    element_max,
    beyond,
    scale_min_normal,
    scale_spacing,
    scale_unscale,
    scale_unscale_rest,
    KIND: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    OFFSET: tl.constexpr,
    MAX_INDEX: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    SCALE_MAX_INDEX: tl.constexpr,
    ODD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    begin, length = _span(line, lines, columns, each, size)
    largest = _amax_of(x_pointer, begin, length, size, LINES, WIDTH, IS_BFLOAT16)
    if KIND == _E8M0:
        scale = _e8m0_scale(_in_block(largest), emax)
    elif KIND == _E4M3:
        largest = _in_block(largest)
        whole = tl.max(tl.load(partial + tl.arange(0, PARTS)), axis=0).to(tl.float32, bitcast=True)
        tensor_scale = tl.where(whole > 0, tl.maximum(tl.div_rn(whole, beyond), _LEAST_TENSOR_SCALE), 1.0)
        share = tl.div_rn(tl.div_rn(largest.to(tl.float32, bitcast=True), element_max), tensor_scale)
        wanted = tl.maximum(share, scale_spacing).to(tl.uint32, bitcast=True)
        # A name of its own: in the loop below `code` has another shape, which Triton takes for the same variable.
        scale_code = magnitude_code(
            wanted,
            (wanted & 0) + _NEAREST,
            1,
            scale_min_normal,
            scale_unscale,
            scale_unscale_rest,
            SCALE_SHIFT,
            SCALE_OFFSET,
        )
        scale_code = tl.minimum(scale_code, SCALE_MAX_INDEX)
        scale = value_of(scale_code, scale_spacing, SCALE_SHIFT, SCALE_OFFSET) * tensor_scale
        scale = tl.where(largest > 0x7F800000, largest.to(tl.float32, bitcast=True), scale)
    else:
        scale = scale_of(largest, per_max, POWER_OF_TWO)
    tl.store(scales_pointer + line, scale, mask=line < lines)
    least = last_code(scale, last, min_normal, spacing, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX)
    top = tl.where(finite_over * scale > last, least, MAX_INDEX)
    place = tl.arange(0, WIDTH)
    for offset in range(0, size, WIDTH):
        inside = (offset + place)[None, :] < length[:, None]
        index = begin[:, None] + (offset + place)[None, :]
        x = load(x_pointer, index, inside, IS_BFLOAT16)
        bits = tl.div_rn(x, tl.broadcast_to(scale[:, None], (LINES, WIDTH))).to(tl.uint32, bitcast=True)
        draw = draw_of(index, first, second, u, STOCHASTIC)
        code = magnitude_code(bits & 0x7FFFFFFF, draw, ODD, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
        value = value_of(tl.minimum(code, top[:, None]), spacing, SHIFT, OFFSET)
        result = signed_like(value, bits) * scale[:, None]
        is_infinite = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) == 0x7F800000
        tl.store(out_pointer + index, tl.where(is_infinite, x, result), mask=inside)


def values_by_lines(x: Tensor, grid: Grid, rounding: Rounding, seed: int | None, lines: Lines) -> tuple[Tensor, Tensor]:
    """x [..., n], contiguous, rounded line by line, float32 of its shape, and the scales [..., lines of a row].

    Saturating; infinities stay.
    """
    columns = x.shape[-1]
    size = lines.size or columns
    each = triton.cdiv(columns, size)
    count = x.numel() // columns * each
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    scales = torch.empty((*x.shape[:-1], each), dtype=torch.float32, device=x.device)
    width = min(ELEMENTS, triton.next_power_of_2(size))
    shape = {"LINES": ELEMENTS // width, "WIDTH": width, "IS_BFLOAT16": x.dtype == torch.bfloat16}
    programs = triton.cdiv(count, ELEMENTS // width)
    source = x.detach().view(torch.int16) if x.dtype == torch.bfloat16 else x.detach()
    parts = None
    if lines.kind == E4M3:
        parts = torch.empty(min(MOST_PARTS, triton.next_power_of_2(programs)), dtype=torch.int32, device=x.device)
        _largest_block[(parts.numel(),)](
            source,
            parts,
            triton.cdiv(programs, parts.numel()),
            count,
            columns,
            each,
            size,
            PARTS=parts.numel(),
            num_warps=WARPS,
            **shape,
        )
    keys = (0, 0)
    if rounding == "stochastic":
        if seed is None:
            raise ValueError("stochastic rounding needs a seed, an integer of up to 64 bits; got None")
        keys = hash_keys(seed)
    is_nearest = rounding == "nearest"
    own = grid if lines.grid is None else lines.grid
    _round_lines[(programs,)](
        source,
        out,
        scales,
        count,
        columns,
        each,
        size,
        *keys,
        grid.min_normal,
        grid.spacing,
        grid.unscale,
        grid.unscale_rest,
        overflow_values(grid, rounding, "saturate")[0],
        last_finite(torch.float32),
        NEAREST_U if is_nearest else 0,
        scales if parts is None else parts,
        lines.per_max,
        lines.emax,
        grid.max_value,
        lines.beyond,
        own.min_normal,
        own.spacing,
        own.unscale,
        own.unscale_rest,
        KIND=lines.kind,
        POWER_OF_TWO=lines.power_of_two,
        PARTS=1 if parts is None else parts.numel(),
        SHIFT=grid.shift,
        OFFSET=grid.offset,
        MAX_INDEX=grid.max_index,
        SCALE_SHIFT=own.shift,
        SCALE_OFFSET=own.offset,
        SCALE_MAX_INDEX=own.max_index,
        ODD=int(is_nearest),
        STOCHASTIC=rounding == "stochastic",
        num_warps=WARPS,
        enable_fp_fusion=False,
        **shape,
    )
    return out, scales
