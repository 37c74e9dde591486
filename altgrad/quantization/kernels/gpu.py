"""The rounding rule as Triton kernels: one read and one write of the tensor, which is the floor on a GPU.

The rule is the package's; see its docstring. Three things keep the results those of the other kernels bit for bit:
the division is the correctly rounded one (`div_rn`: Triton's own float32 division on a GPU is not), every other
float operation is exact by construction, and the stochastic draw is the same counter hash of (seed, flat index).
float16 and bfloat16 are widened on load and rounded on store, without a float32 tensor between; bfloat16 by its bits,
which say the same on every device (the interpreter's own conversion truncates).

Without a GPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.quantization.kernels import (
    LARGEST_SCALE,
    NEAREST_U,
    SMALLEST_SCALE,
    Grid,
    Overflow,
    Rounding,
    hash_keys,
    last_finite,
    overflow_values,
)

BLOCK, WARPS, TILE = 2048, 4, 64
"""Elements a program rounds: enough of them that a thread's own preparations cost little."""
_LEAST, _MOST = tl.constexpr(SMALLEST_SCALE), tl.constexpr(LARGEST_SCALE)


@triton.jit
def _hash(index, first, second):
    """32 hashed bits of the flat index under two keys, uint32."""
    h = index ^ first
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) ^ second
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _load(pointer, index, mask, IS_BFLOAT16: tl.constexpr):
    """The elements as float32; bfloat16 comes as its bits."""
    x = tl.load(pointer + index, mask=mask, other=0)
    if IS_BFLOAT16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, index, value, mask, IS_BFLOAT16: tl.constexpr):
    """Rounds to the tensor's dtype, ties to even."""
    if IS_BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        tl.store(pointer + index, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
    else:
        tl.store(pointer + index, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _magnitude_code(bits, u, odd, min_normal, unscale, unscale_rest, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
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
def _value(code, spacing, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """Value of a magnitude code, float32."""
    normal = ((code + OFFSET) << SHIFT).to(tl.float32, bitcast=True)
    return tl.where(code >= (1 << (23 - SHIFT)), normal, code.to(tl.int32).to(tl.float32) * spacing)


@triton.jit
def _last_code(
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
    code = tl.minimum(_magnitude_code(quotient, none, 0, min_normal, unscale, unscale_rest, SHIFT, OFFSET), MAX_INDEX)
    above = tl.minimum(code + 1, MAX_INDEX)
    code = tl.where(_value(above, spacing, SHIFT, OFFSET) * scale <= last, above, code)
    return tl.where(_value(code, spacing, SHIFT, OFFSET) * scale > last, code - 1, code)


@triton.jit
def _largest(x_pointer, cell, elements, IS_BFLOAT16: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the largest magnitude, above infinity's where there is a NaN."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = _load(x_pointer, index, index < elements, IS_BFLOAT16).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(cell, tl.max(bits.to(tl.int32), axis=0))


@triton.jit
def _scale_of(bits, per_max, POWER_OF_TWO: tl.constexpr):
    """`scale_of_amax` of the magnitude with these int32 bits."""
    scale = tl.minimum(tl.maximum(bits.to(tl.float32, bitcast=True) * per_max, _LEAST), _MOST)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), scale, 1.0)


@triton.jit
def _scaled(
    y_pointer,
    first,
    second,
    out_pointer,
    elements,
    HAS_SECOND: tl.constexpr,
    WRITES_BFLOAT16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    y = tl.load(y_pointer + index, mask=mask, other=0.0) * tl.load(first)
    if HAS_SECOND:
        y = y * tl.load(second)
    _store(out_pointer, index, y, mask, WRITES_BFLOAT16)


@triton.jit
def _transposed(x_pointer, out_pointer, rows, columns, IS_BFLOAT16: tl.constexpr, TILE: tl.constexpr):
    """[rows, columns] as [columns, rows] in the type of `out`, which holds the values exactly."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    mask = (row < rows) & (column < columns)
    values = tl.trans(_load(x_pointer, row * columns + column, mask, IS_BFLOAT16)).to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + tl.trans(column) * rows + tl.trans(row), values, mask=tl.trans(mask))


# A key of 1 must stay a number: specialised, it would become a constant without a type.
@triton.jit(do_not_specialize=["first", "second", "u"])
def _round(
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
    cell,
    per_max,
    FROM_AMAX: tl.constexpr,
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
    if FROM_AMAX:
        scale = _scale_of(tl.load(cell), per_max, POWER_OF_TWO)
        if tl.program_id(0) == 0:
            tl.store(scale_pointer, scale)
    else:
        scale = tl.load(scale_pointer)
    y = tl.div_rn(_load(x_pointer, index, mask, IS_BFLOAT16), scale)
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if STOCHASTIC:  # noqa: SIM108 (Triton compiles a branch on a constant away, but both sides of a conditional)
        draw = _hash(index.to(tl.uint32), first.to(tl.uint32), second.to(tl.uint32)) >> 1
    else:
        draw = u.to(tl.uint32)
    code = _magnitude_code(magnitude, draw, ODD, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    if UNSCALED:
        value = _value(tl.minimum(code, MAX_INDEX), spacing, SHIFT, OFFSET)
        value = tl.where(magnitude == 0x7F800000, float("inf"), value)
    elif SATURATES:
        top = tl.full((), MAX_INDEX, tl.uint32)
        if finite_over * scale > last:
            top = _last_code(scale, last, min_normal, spacing, unscale, unscale_rest, SHIFT, OFFSET, MAX_INDEX)
        value = _value(tl.minimum(code, top), spacing, SHIFT, OFFSET)
    else:
        value = _value(tl.minimum(code, MAX_INDEX), spacing, SHIFT, OFFSET)
        value = tl.where(code > MAX_INDEX, finite_over, value)
        value = tl.where(magnitude == 0x7F800000, infinite_over, value)
    signed = value.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    result = tl.where(magnitude > 0x7F800000, bits, signed).to(tl.float32, bitcast=True)
    if not UNSCALED:
        result = result * scale
    _store(out_pointer, index, result, mask, WRITES_BFLOAT16)


@triton.jit(do_not_specialize=["u"])
def _index(
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
    y = tl.div_rn(_load(x_pointer, index, mask, IS_BFLOAT16), tl.load(scale_pointer))
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = _magnitude_code(magnitude, u.to(tl.uint32), 1, min_normal, unscale, unscale_rest, SHIFT, OFFSET)
    code = tl.where(magnitude > 0x7F800000, 0, tl.minimum(code, MAX_INDEX)).to(tl.int32)
    tl.store(out_pointer + index, tl.where(bits >= 0x80000000, -code, code), mask=mask)


def quantize(
    x: Tensor, scale: float | Tensor, grid: Grid, rounding: Rounding, overflow: Overflow, seed: int | None, out: Tensor
) -> None:
    """round(x / scale) * scale into `out`; contiguous tensors of one floating dtype, possibly the same one."""
    _launch(x, _scale_on(x, scale), grid, rounding, overflow, seed, out)


def grid_values(
    x: Tensor, scale: float | Tensor, grid: Grid, rounding: Rounding, seed: int | None, out: Tensor
) -> None:
    """round(x / scale), saturating, into the bfloat16 `out`; infinities stay."""
    _launch(x, _scale_on(x, scale), grid, rounding, "saturate", seed, out, is_unscaled=True)


def grid_values_by_amax(
    x: Tensor, grid: Grid, rounding: Rounding, seed: int | None, out: Tensor, *, headroom: float, power_of_two: bool
) -> Tensor:
    """`grid_values` under the scale of x's amax, which is returned, 0-d float32."""
    cell = torch.zeros((), dtype=torch.int32, device=x.device)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    _largest[_programs(x)](
        _plain(x), cell, x.numel(), IS_BFLOAT16=x.dtype == torch.bfloat16, BLOCK=BLOCK, num_warps=WARPS
    )
    _launch(
        x,
        scale,
        grid,
        rounding,
        "saturate",
        seed,
        out,
        is_unscaled=True,
        cell=cell,
        per_max=headroom / grid.max_value,
        power_of_two=power_of_two,
    )
    return scale


def scaled(y: Tensor, factors: list[Tensor], out: Tensor) -> None:
    """y times one or two 0-d factors into `out`, float32 or bfloat16; y is float32 and contiguous."""
    _scaled[_programs(y)](
        y,
        factors[0],
        factors[-1],
        _plain(out),
        y.numel(),
        HAS_SECOND=len(factors) > 1,
        WRITES_BFLOAT16=out.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The contiguous transpose of a contiguous [rows, columns] in a dtype that holds its values exactly."""
    rows, columns = x.shape
    out = torch.empty(columns, rows, dtype=dtype, device=x.device)
    _transposed[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
        _plain(x), out, rows, columns, IS_BFLOAT16=x.dtype == torch.bfloat16, TILE=TILE
    )
    return out


def _launch(
    x: Tensor,
    scale: Tensor,
    grid: Grid,
    rounding: Rounding,
    overflow: Overflow,
    seed: int | None,
    out: Tensor,
    *,
    is_unscaled: bool = False,
    cell: Tensor | None = None,
    per_max: float = 0.0,
    power_of_two: bool = False,
) -> None:
    finite_over, infinite_over = overflow_values(grid, rounding, overflow)
    is_stochastic = rounding == "stochastic"
    if is_stochastic and seed is None:
        raise ValueError("stochastic rounding needs a seed, an integer of up to 64 bits; got None")
    first, second = hash_keys(seed or 0) if is_stochastic else (0, 0)
    is_nearest = rounding == "nearest"
    _round[_programs(x)](
        _plain(x),
        _plain(out),
        scale,
        x.numel(),
        first,
        second,
        grid.min_normal,
        grid.spacing,
        grid.unscale,
        grid.unscale_rest,
        finite_over,
        infinite_over,
        last_finite(x.dtype),
        NEAREST_U if is_nearest else 0,
        scale if cell is None else cell,
        per_max,
        FROM_AMAX=cell is not None,
        POWER_OF_TWO=power_of_two,
        SHIFT=grid.shift,
        OFFSET=grid.offset,
        MAX_INDEX=grid.max_index,
        ODD=int(is_nearest),
        STOCHASTIC=is_stochastic,
        SATURATES=overflow == "saturate",
        UNSCALED=is_unscaled,
        IS_BFLOAT16=x.dtype == torch.bfloat16,
        WRITES_BFLOAT16=out.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def code_index(x: Tensor, scale: float | Tensor, grid: Grid, out: Tensor) -> None:
    """Signed code nearest to x / scale into the int32 `out`."""
    _index[_programs(x)](
        _plain(x),
        out,
        _scale_on(x, scale),
        x.numel(),
        grid.min_normal,
        grid.unscale,
        grid.unscale_rest,
        NEAREST_U,
        SHIFT=grid.shift,
        OFFSET=grid.offset,
        MAX_INDEX=grid.max_index,
        IS_BFLOAT16=x.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _plain(x: Tensor) -> Tensor:
    return x.detach().view(torch.int16) if x.dtype == torch.bfloat16 else x.detach()


def _programs(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), BLOCK),)


def _scale_on(x: Tensor, scale: float | Tensor) -> Tensor:
    """The scale as a float32 tensor on x's device: read by the kernel, so that nobody waits for it."""
    if isinstance(scale, Tensor):
        return scale.to(x.device, torch.float32).reshape(())
    return torch.full((), scale, dtype=torch.float32, device=x.device)
