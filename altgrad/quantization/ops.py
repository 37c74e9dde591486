"""Fake quantization, codes and spacings of tensors, under one law.

`quantize(x, fmt, scale)` is round(x / scale) * scale, every step in float32, with the straight-through
gradient. Rounding is to nearest with ties to the even code unless asked otherwise; beyond the largest value
it saturates, or becomes infinite where asked and the format has an infinity, and infinite inputs follow the
same policy; NaN stays NaN even where the format has none, for a NaN turned into a number hides the signal
that training has failed; the sign of zero is kept where the format has two zeros, and so are subnormals. A scale
other than a power of two rounds in the division and in the product, as hardware does; so do values whose quotient
falls below float32's normals (2^-126). float64 is divided and multiplied as float64 and rounded once.

The same law holds on every path: `kernels.dispatch` says which kernel a tensor gets, and how calls look where torch
records them. The transforms of torch.func and forward-mode differentiation are refused: kernels cannot see through
their wrappers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from altgrad.quantization.formats import FloatFormat, get_format, unknown_message
from altgrad.quantization.kernels import (
    MAX_HASHED_ELEMENTS,
    Drawn,
    Overflow,
    Rounding,
    Seed,
    dispatch,
    mix_seed,
    seed_of,
)
from altgrad.quantization.kernels import codes as bit_patterns
from altgrad.quantization.kernels.dispatch import Scale, kernel_in_use

__all__ = [
    "code_index",
    "decode",
    "encode",
    "hash_uniform",
    "index_to_value",
    "kernel_in_use",
    "mix_seed",
    "quantize",
    "ulp",
]

StraightThrough = Literal["identity", "clipped"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Element types that can be rounded. torch's float8 types are too narrow for most products with a scale."""


def quantize(
    x: Tensor,
    fmt: str | FloatFormat,
    scale: Scale = 1.0,
    *,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    seed: Seed = None,
    ste: StraightThrough = "identity",
    out: Tensor | None = None,
) -> Tensor:
    """x rounded to scale * (values of fmt), same shape and dtype; gradient straight through, none for the
    scale.

    `scale`: a float or a tensor that broadcasts to x. `rounding`: nearest | stochastic | toward_zero; stochastic takes
    the draw of flat element i from (seed, i) alone. `overflow`: saturate, at the largest value whose product with the
    scale is finite in x's dtype (E6M1 stops at 49152 in float16, which ends at 65504) | inf. `ste`: "clipped" zeroes
    the gradient where |x / scale| exceeds that value. `out` (may be x) receives the result without gradient.

    ValueError: unknown names, a dtype that is none of DTYPES, no seed, inf without an infinity, a scale that is no
    positive float32. NotImplementedError: a transform of torch.func, or forward-mode differentiation. A scale tensor is
    checked on the CPU only: on a device that would wait for it, and in a graph it is not there yet; there a scale that
    is zero, negative or NaN makes NaN or nonsense, and nobody says so.
    """
    x, fmt = _checked(x), get_format(fmt)
    _check_choice("rounding", rounding, get_args(Rounding))
    _check_choice("overflow", overflow, get_args(Overflow))
    _check_choice("ste", ste, get_args(StraightThrough))
    if overflow == "inf" and not fmt.has_inf:
        raise ValueError(f"overflow='inf' needs a format with an infinity, {fmt.name} has none; use 'saturate'")
    if rounding == "stochastic":
        _check_seed(x.numel(), seed)
    scale = _as_scale(scale, x)
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    if out is not None:
        return _quantize_into(x, fmt, scale, rounding, overflow, seed_of(seed), out, wants_gradient)
    if wants_gradient:
        refuse_script_tracing("the straight-through gradient of quantize")
        return cast(Tensor, _StraightThrough.apply(x, fmt, scale, rounding, overflow, seed, ste == "clipped"))
    return dispatch.rounded(x.detach(), fmt, scale, rounding, overflow, seed)


def quantize_blocks(
    x: Tensor, fmt: FloatFormat, scale: Tensor, *, rounding: Rounding, seed: Seed, ste: StraightThrough
) -> Tensor:
    """`quantize` under scales that a block format found in x itself: positive, or NaN, which makes NaN."""
    x = _checked(x)
    _check_choice("rounding", rounding, get_args(Rounding))
    _check_choice("ste", ste, get_args(StraightThrough))
    if rounding == "stochastic":
        _check_seed(x.numel(), seed)
    if x.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _StraightThrough.apply(x, fmt, scale, rounding, "saturate", seed, ste == "clipped"))
    return dispatch.rounded(x.detach(), fmt, scale, rounding, "saturate", seed)


def grid_values(
    x: Tensor, fmt: FloatFormat, scale: Scale, *, rounding: Rounding = "nearest", seed: Seed = None
) -> Tensor:
    """The values of fmt that `quantize` would multiply with the scale, bfloat16 and without gradient.

    For formats of up to 7 mantissa bits, which bfloat16 holds. Infinities stay, for they say that training has failed.
    """
    _check_choice("rounding", rounding, get_args(Rounding))
    if rounding == "stochastic":
        _check_seed(x.numel(), seed)
    return dispatch.grid_values(x.detach(), fmt, _as_scale(scale, x), rounding, seed)


def encode(x: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0, *, overflow: Overflow = "saturate") -> Tensor:
    """Bit patterns of the values nearest to x / scale: uint8, or int16 (same bits) for formats wider than 8
    bits; two's complement in INT8 and its like, whose `.view(torch.int8)` are the integers.

    ValueError where x / scale holds a NaN and the format has no code for it.
    """
    x, fmt = _checked(x), get_format(fmt)
    _check_choice("overflow", overflow, get_args(Overflow))
    if overflow == "inf" and not fmt.has_inf:
        raise ValueError(f"overflow='inf' needs a format with an infinity, {fmt.name} has none; use 'saturate'")
    return bit_patterns.encode(x.detach(), fmt, _as_scale(scale, x), overflow)


def decode(codes: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> Tensor:
    """Values of bit patterns times scale, float32; inverse of `encode` on the grid.

    ValueError for a pattern without a value: too many bits, or the -128 of INT8.
    """
    _check_integers("codes", codes)
    return bit_patterns.decode(codes, get_format(fmt), _as_scale(scale, codes))


def code_index(x: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> Tensor:
    """Place of x on the ordered grid: sign times magnitude code of the nearest value, int32; both zeros and
    NaN are 0.

    Differences of indices count grid steps; values beyond the largest have its index.
    """
    x = _checked(x)
    return dispatch.code_index(x.detach(), get_format(fmt), _as_scale(scale, x))


def index_to_value(index: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> Tensor:
    """Value at a signed place of the ordered grid times scale, float32; clamped to its ends."""
    _check_integers("codes", index)
    return dispatch.index_to_value(index, get_format(fmt), _as_scale(scale, index))


def ulp(x: Tensor, fmt: str | FloatFormat, scale: Scale = 1.0) -> Tensor:
    """Spacing the scaled grid has at x, max(2^floor(log2|x/scale|), 2^emin) * 2^-M * scale, float32.

    Zeros and subnormals have the smallest spacing, values beyond the largest that of the top binade, NaN has
    NaN.
    """
    x = _checked(x)
    return dispatch.ulp(x.detach(), get_format(fmt), _as_scale(scale, x))


def hash_uniform(shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draws in [0, 1), float32 of 24 bits, hashed from (seed, flat index) as stochastic rounding does."""
    size, device = torch.Size(shape), torch.device(device)
    _check_seed(size.numel(), seed)
    return dispatch.uniform(size, seed, device)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fmt: FloatFormat,
        scale: Scale,
        rounding: Rounding,
        overflow: Overflow,
        seed: Seed,
        clipped: bool,
    ) -> Tensor:
        if clipped:
            fits = overflow == "saturate"
            largest = dispatch.largest_value(fmt, x.dtype, scale, x.device) if fits else fmt.max
            ctx.save_for_backward((_wide(x) / scale).abs() <= largest)
        return dispatch.rounded(x.detach(), fmt, scale, rounding, overflow, seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient = gradients[0]
        if ctx.saved_tensors:
            gradient = torch.where(ctx.saved_tensors[0], gradient, 0.0)
        return (gradient, None, None, None, None, None, None)


def _quantize_into(
    x: Tensor,
    fmt: FloatFormat,
    scale: Scale,
    rounding: Rounding,
    overflow: Overflow,
    seed: int | None,
    out: Tensor,
    wants_gradient: bool,
) -> Tensor:
    if wants_gradient:
        raise ValueError("out= has no gradient; detach x, or call under torch.no_grad()")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be {x.dtype} {tuple(x.shape)} on {x.device}; got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    return dispatch.round_into(x.detach(), fmt, scale, rounding, overflow, seed, out)


def _as_scale(scale: Scale, x: Tensor) -> Scale:
    """The scale of x rounded to float32 and checked; values not on a device (it would be waited for) or in a graph."""
    if isinstance(scale, Tensor):
        rounded = _broadcastable(scale, x)
        if rounded.device.type == "cpu" and not dispatch.is_traced(rounded):
            _check_scales(rounded)
        return rounded
    if not hasattr(scale, "__float__"):
        raise TypeError(f"scale must be a number or a tensor, got {scale!r}")
    number = float(scale) if torch.compiler.is_compiling() else _float32(float(scale))
    if not 0.0 < number < math.inf:
        raise ValueError(f"{_SCALE_MESSAGE}; got {scale!r}")
    return number


def _broadcastable(scale: Tensor, x: Tensor) -> Tensor:
    """The scale in float32. It may have fewer axes than x, or axes of one, and never makes x larger."""
    if scale.numel() == 1:
        return scale.detach().to(torch.float32).reshape(())
    padded = (1,) * (x.dim() - scale.dim()) + tuple(scale.shape)
    fits = len(padded) == x.dim() and all(a in (1, b) for a, b in zip(padded, x.shape, strict=True))
    if not fits:
        raise ValueError(f"scale of shape {tuple(scale.shape)} does not broadcast to x of shape {tuple(x.shape)}")
    return scale.detach().to(torch.float32)


_SCALE_MESSAGE = "scale must be a positive number within float32's range"


def _check_scales(scale: Tensor) -> None:
    if scale.numel() == 1:
        number = scale.item()
        if not 0.0 < number < math.inf:
            raise ValueError(f"{_SCALE_MESSAGE}; got {number!r}")
        return
    is_bad = ~((scale > 0) & (scale < math.inf))
    if bool(is_bad.any()):
        raise ValueError(
            f"{_SCALE_MESSAGE}; got {scale[is_bad][0].item()!r} in {int(is_bad.sum())} of {scale.numel()} places"
        )


@lru_cache(maxsize=256)
def _float32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32).item())


def _check_choice(what: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(unknown_message(what, given, allowed))


def _checked(x: Tensor) -> Tensor:
    """x, once it is known to be what kernels can take; a lazily negated view is written out."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"expected a floating-point tensor, got {x.dtype}; allowed: {allowed}")
    if torch.compiler.is_compiling():
        return x
    refuse_transforms("quantize and its like", x)
    return x.resolve_neg()


def refuse_transforms(what: str, *tensors: Tensor) -> None:
    """NotImplementedError where torch.func or forward-mode differentiation wraps one of the tensors."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    for x in tensors:
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
        if is_wrapped or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None):
            raise NotImplementedError(
                f"{what} cannot run under vmap, jvp, torch.func.grad or forward-mode differentiation; use reverse mode "
                "(backward, torch.autograd.grad) over a whole batch"
            )


def refuse_script_tracing(what: str) -> None:
    """NotImplementedError under torch.jit.trace, whose programs hold no autograd function of Python."""
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            f"torch.jit.trace cannot record {what}; use torch.export or torch.compile, or quantize outside of it"
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _check_integers(what: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor of {what}, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"expected an integer tensor of {what}, got {x.dtype}")


def _check_seed(elements: int, seed: Seed) -> None:
    if seed is None:
        raise ValueError("stochastic rounding needs a seed, an integer of up to 64 bits; got None")
    if not isinstance(seed, int | Drawn):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if elements > MAX_HASHED_ELEMENTS:
        raise ValueError(f"stochastic rounding takes up to {MAX_HASHED_ELEMENTS} elements a call; got {elements}")
