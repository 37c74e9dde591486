"""Block formats: small elements that share a scale with their neighbours along the last axis.

MX (OCP Microscaling Formats 1.0) gives every 32 elements one scale 2^k, stored as E8M0 (code k + 127, 255 is
NaN), with

    k = floor(log2(block amax)) - emax,    emax = floor(log2(largest element value)),    -127 <= k <= 127

which brings the block's amax into the elements' top binade; what the top binade lacks there (E4M3 stops at 448
of 512, E2M1 at 6 of 8) saturates, as the specification has it. NVFP4 gives every 16 E2M1 elements a scale in
E4M3, and the tensor one in float32:

    tensor scale = amax / (448 * 6)      block scale = E4M3(block amax / 6 / tensor scale)

and an element stands for code * (block scale * tensor scale), all in float32. A block scale that would round to
zero is E4M3's smallest value 2^-9 instead, and a tensor scale is at least 2^-126, so no scale is ever zero.

MXINT8 has E0M7 for its element: the specification's int8 grid, an integer from -127 to 127, with the binary point
one place further up and k therefore one larger. Its extra code -128 is not used, so the grid is symmetric.

Edge cases. A NaN makes its whole block NaN, through the scale, in every format: elements of 4 and 6 bits have no
NaN of their own. An infinity counts in the amaxes as the largest power of two of its dtype (2^127 in float32) and
saturates: so large a number shows that the training has failed, where one fitted to its finite neighbours would
hide it. A block of zeros has the smallest scale and keeps its signs. A last block that is short has the scale of
what it holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from altgrad.quantization.formats import FloatFormat, get_format, unknown_message
from altgrad.quantization.kernels import Rounding
from altgrad.quantization.ops import StraightThrough, decode, encode, quantize, quantize_blocks

BlockScale = Literal["E8M0", "E4M3"]
DEFAULT_SIZE: dict[BlockScale, int] = {"E8M0": 32, "E4M3": 16}

E8M0_BIAS = 127
E8M0_NAN = 255
LEAST_E4M3 = get_format("E4M3").min_spacing
LEAST_TENSOR_SCALE = 2.0**-126


@dataclass(frozen=True)
class BlockFormat:
    """Elements, how many share a scale, and the scale's own format; ValueError where no such format exists.

    E4M3 scales come with the tensor's float32 scale.
    """

    element: FloatFormat
    scale: BlockScale = "E8M0"
    size: int = 0

    def __post_init__(self) -> None:
        if self.scale not in get_args(BlockScale):
            raise ValueError(unknown_message("block scale", self.scale, get_args(BlockScale)))
        if self.element.total_bits > 8:
            raise ValueError(f"elements of a block have 4 to 8 bits; {self.element.name} has more")
        if self.size < 0:
            raise ValueError(f"block size must be positive (0: {DEFAULT_SIZE[self.scale]}), got {self.size}")
        if self.size == 0:
            object.__setattr__(self, "size", DEFAULT_SIZE[self.scale])

    @property
    def emax(self) -> int:
        """Exponent of the elements' top binade."""
        return math.frexp(self.element.max)[1] - 1

    @property
    def bits_per_element(self) -> float:
        """Storage of an element with its part of the block's scale (the tensor's not counted)."""
        return self.element.total_bits + 8 / self.size


BLOCK_FORMATS: dict[str, BlockFormat] = {
    "MXFP8_E4M3": BlockFormat(get_format("E4M3")),
    "MXFP8_E5M2": BlockFormat(get_format("E5M2")),
    "MXFP6_E3M2": BlockFormat(get_format("E3M2")),
    "MXFP6_E2M3": BlockFormat(get_format("E2M3")),
    "MXFP4_E2M1": BlockFormat(get_format("E2M1")),
    "MXINT8": BlockFormat(get_format("E0M7")),
    "NVFP4": BlockFormat(get_format("E2M1"), "E4M3"),
}
"""The block formats of the OCP specification, and NVIDIA's."""


class BlockCodes(NamedTuple):
    """What a block format stores."""

    codes: Tensor
    """Element bit patterns, one a byte: uint8 of the tensor's shape."""
    scales: Tensor
    """Scale bit patterns: uint8 [..., number of blocks]."""
    tensor_scale: Tensor
    """0-d float32; 1 where the format has none."""


def get_block_format(name: str | BlockFormat) -> BlockFormat:
    """The block format of a name ("MXFP8_E4M3", "NVFP4"); a BlockFormat passes through, else ValueError."""
    if isinstance(name, BlockFormat):
        return name
    canonical = name.strip().upper()
    if canonical not in BLOCK_FORMATS:
        raise ValueError(unknown_message("block format", name, tuple(BLOCK_FORMATS)))
    return BLOCK_FORMATS[canonical]


def block_quantize(
    x: Tensor,
    fmt: str | BlockFormat,
    *,
    rounding: Rounding = "nearest",
    seed: int | None = None,
    ste: StraightThrough = "identity",
) -> Tensor:
    """x [..., n] rounded to what the block format holds, same shape and dtype; gradient straight through.

    Equals `block_decode(block_encode(x))` when rounding to nearest. `rounding`, `seed`, `ste` are those of
    `quantize` and concern the elements; scales are always found as the module says. ValueError for a 0-d x.
    """
    fmt = get_block_format(fmt)
    return quantize_blocks(x, fmt.element, block_scale(x, fmt), rounding=rounding, seed=seed, ste=ste)


def block_encode(x: Tensor, fmt: str | BlockFormat) -> BlockCodes:
    """Codes of the elements nearest to x [..., n], and of their blocks' scales; a NaN is its block's scale."""
    fmt = get_block_format(fmt)
    scales, tensor_scale = _scales(x, fmt)
    values = _over_elements(scales * tensor_scale, fmt, x.shape[-1])
    held = torch.where(torch.isnan(values), 0.0, x.detach().to(torch.float32))
    codes = encode(held, fmt.element, values.nan_to_num(1.0))
    return BlockCodes(codes, _scale_codes(scales, fmt), tensor_scale)


def block_decode(stored: BlockCodes, fmt: str | BlockFormat) -> Tensor:
    """Values [..., n] of `block_encode`'s codes, float32. ValueError where codes and scales do not fit."""
    fmt = get_block_format(fmt)
    codes, scales, tensor_scale = stored
    if codes.dim() == 0 or scales.shape != (*codes.shape[:-1], -(-codes.shape[-1] // fmt.size)):
        raise ValueError(
            f"blocks of {fmt.size} do not fit codes {tuple(codes.shape)} with scales {tuple(scales.shape)}"
        )
    values = _scale_values(scales, fmt) * tensor_scale
    return decode(codes, fmt.element) * _over_elements(values, fmt, codes.shape[-1])


def block_scale(x: Tensor, fmt: str | BlockFormat) -> Tensor:
    """The scale each element of x [..., n] is rounded under, its block's times the tensor's: float32 of x's
    shape, positive or NaN."""
    fmt = get_block_format(fmt)
    scales, tensor_scale = _scales(x, fmt)
    return _over_elements(scales * tensor_scale, fmt, x.shape[-1])


def _scales(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Every block's scale, float32 [..., number of blocks], and the tensor's, 0-d."""
    largest = _block_amax(x, fmt.size)
    if fmt.scale == "E8M0":
        # frexp's mantissa lies in [1/2, 1), so its exponent is one above floor(log2); log2 itself is inexact.
        exponent = torch.frexp(largest).exponent - (1 + fmt.emax)
        codes = torch.where(largest > 0, exponent, -E8M0_BIAS).clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS
        whole = torch.ones((), dtype=torch.float32, device=x.device)
        return _e8m0_values(torch.where(torch.isnan(largest), E8M0_NAN, codes)), whole
    known = torch.where(torch.isnan(largest), 0.0, largest)
    whole = known.max() if known.numel() else known.new_zeros(())
    # Divisors on the tensor's device: by a number, a GPU multiplies with its rounded inverse.
    beyond, end = (
        torch.full((), value, dtype=torch.float32, device=x.device)
        for value in (get_format(fmt.scale).max * fmt.element.max, fmt.element.max)
    )
    tensor_scale = torch.where(whole > 0, (whole / beyond).clamp(min=LEAST_TENSOR_SCALE), 1.0)
    scales = (largest / end / tensor_scale).clamp(min=LEAST_E4M3)
    return quantize(scales, fmt.scale), tensor_scale


def _scale_codes(scales: Tensor, fmt: BlockFormat) -> Tensor:
    if fmt.scale != "E8M0":
        return encode(scales, fmt.scale)
    # 2^-127, code 0, is a float32 subnormal: its exponent bits are those of code 0 too.
    return torch.where(torch.isnan(scales), E8M0_NAN, scales.view(torch.int32) >> 23).to(torch.uint8)


def _scale_values(codes: Tensor, fmt: BlockFormat) -> Tensor:
    return _e8m0_values(codes.to(torch.int32)) if fmt.scale == "E8M0" else decode(codes, fmt.scale)


def _e8m0_values(codes: Tensor) -> Tensor:
    bits = torch.where(codes == 0, 0x00400000, codes << 23).to(torch.int32)
    return torch.where(codes == E8M0_NAN, math.nan, bits.view(torch.float32))


def _over_elements(scales: Tensor, fmt: BlockFormat, length: int) -> Tensor:
    # A tensor of counts, not a slice of equal ones or an index i // size: torch 2.13's inductor loses the tail of
    # those loops and leaves the elements of a short last block unwritten.
    starts = torch.arange(0, length, fmt.size, device=scales.device)
    return scales.repeat_interleave((length - starts).clamp(max=fmt.size), -1, output_size=length)


def _block_amax(x: Tensor, size: int) -> Tensor:
    """[..., number of blocks], float32; NaN if any element is, an infinity as what it counts for."""
    if x.dim() == 0:
        raise ValueError("blocks run along the last axis, and a 0-d tensor has none")
    if not x.is_floating_point():
        raise ValueError(f"expected a floating-point tensor, got {x.dtype}")
    magnitude = functional.pad(x.detach().abs(), (0, -x.shape[-1] % size)).to(torch.float32)
    largest = magnitude.view(*x.shape[:-1], magnitude.shape[-1] // size, size).amax(-1)
    return torch.where(torch.isinf(largest), _largest_power(x.dtype), largest)


def _largest_power(dtype: torch.dtype) -> float:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)
