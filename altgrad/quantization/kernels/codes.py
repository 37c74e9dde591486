"""Bit patterns: what a format stores, and back.

Both directions can refuse their input for what it holds (a NaN without a code, a pattern of too many bits), which a
traced graph cannot; where calls are recorded they are therefore ops of the graph, on every device, and refuse there.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.kernels import Overflow, grid_of, reference
from altgrad.quantization.kernels.dispatch import Scale, as_tensor, is_traced

_WIDTHS = {torch.uint8: 8, torch.int8: 8, torch.int16: 16}


def code_dtype(fmt: FloatFormat) -> torch.dtype:
    """uint8, or int16 (the same bits) for formats wider than 8 bits."""
    return torch.uint8 if fmt.total_bits <= 8 else torch.int16


def encode(x: Tensor, fmt: FloatFormat, scale: Scale, overflow: Overflow) -> Tensor:
    """Bit patterns of the values nearest to x / scale; ValueError for NaN where the format has no code."""
    if is_traced(x):
        return cast(Tensor, _encode_op(x, as_tensor(scale), fmt.name, overflow))
    return _encode_now(x, fmt, scale, overflow)


def _encode_now(x: Tensor, fmt: FloatFormat, scale: Scale, overflow: Overflow) -> Tensor:
    y = reference.quotient(x, scale)
    is_nan = torch.isnan(y)
    if not fmt.has_nan and bool(is_nan.any()):
        raise ValueError(f"{int(is_nan.sum())} NaN to encode, and {fmt.name} has no code for NaN")
    beyond = fmt.max_index + (1 if overflow == "inf" else 0)
    code = reference.rounded_magnitude(y, grid_of(fmt), "nearest").clamp(max=beyond)
    negative = torch.signbit(y) if fmt.has_negative_zero else torch.signbit(y) & (code > 0)
    if fmt.variant == "integer":
        return torch.where(negative, fmt.num_codes - code, code).to(code_dtype(fmt))
    if fmt.has_nan:
        code = torch.where(is_nan, fmt.nan_code, code)
    return (code | negative * (fmt.num_codes // 2)).to(code_dtype(fmt))


def decode(codes: Tensor, fmt: FloatFormat, scale: Scale) -> Tensor:
    """Values of bit patterns times scale, float32; ValueError for patterns the format does not have."""
    if is_traced(codes):
        return cast(Tensor, _decode_op(codes, as_tensor(scale), fmt.name))
    return _decode_now(codes, fmt, scale)


def _decode_now(codes: Tensor, fmt: FloatFormat, scale: Scale) -> Tensor:
    patterns = codes.to(torch.int64)
    if _WIDTHS.get(codes.dtype) == fmt.total_bits:
        patterns = patterns & (fmt.num_codes - 1)  # signed or not, the same bits
    elif bool(((patterns < 0) | (patterns >= fmt.num_codes)).any()):
        worst = int(patterns.min() if patterns.min() < 0 else patterns.max())
        raise ValueError(f"{fmt.name} has the codes 0 to {fmt.num_codes - 1}; got {worst}")
    if fmt.unused_code is not None and bool((patterns == fmt.unused_code).any()):
        raise ValueError(f"{fmt.name} has the values {-fmt.max_index} to {fmt.max_index}; got {-fmt.unused_code}")
    return _values(fmt).to(codes.device)[patterns] * scale


@cache
def _values(fmt: FloatFormat) -> Tensor:
    reals = [torch.nan if code == fmt.unused_code else fmt.to_real(code) for code in range(fmt.num_codes)]
    return torch.tensor(reals, dtype=torch.float32)


@torch.library.custom_op("altgrad::encode", mutates_args=())
def _encode_op(x: Tensor, scale: Tensor, fmt: str, overflow: str) -> Tensor:
    return _encode_now(x, get_format(fmt), scale, cast(Overflow, overflow)).contiguous()


@_encode_op.register_fake
def _encode_shape(x: Tensor, scale: Tensor, fmt: str, overflow: str) -> Tensor:
    return torch.empty(x.shape, dtype=code_dtype(get_format(fmt)), device=x.device)


@torch.library.custom_op("altgrad::decode", mutates_args=())
def _decode_op(codes: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return _decode_now(codes, get_format(fmt), scale).contiguous()


@_decode_op.register_fake
def _decode_shape(codes: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
