"""Matrix products of quantized operands: on the hardware's own 8-bit units, or emulated with the same operands.

An operand is a tensor of exact grid values under one scale per tensor. Three kinds of pairs have hardware:

* E4M3/fn and E5M2/ieee are torch's native float8 dtypes: `torch._scaled_mm`, on GPUs of compute capability 8.9 and
  above; two E5M2 operands have no kernel there.
* INT8, INT4, E0M7 and E1M6/finite are integers in -127 ... 127 times a power of two: `torch._int_mm` adds them exactly
  in int32 (K up to 133 000), on GPUs of compute capability 8.0 and above.
* everything else is emulated: products of exact values, exact in float32, and summed in float32.

Native and emulated products see the same operands, so they differ only by the order and width of their sums: at
most about K · 2^-24 relative to the sum of the magnitudes in float32, and a native float8 accumulator may keep fewer
bits. On the CPU emulation is the faster one and the default; both exist there, which is how they are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format, unknown_message
from altgrad.quantization.kernels import dispatch

Product = Literal["auto", "native", "emulated"]

FLOAT8_DTYPES: dict[FloatFormat, torch.dtype] = {
    get_format("E4M3/fn"): torch.float8_e4m3fn,
    get_format("E5M2/ieee"): torch.float8_e5m2,
}
INTEGER_FORMATS = frozenset(map(get_format, ("E0M7", "E1M6/finite", "INT8", "INT4")))
FLOAT8_CAPABILITY, INT8_CAPABILITY = (8, 9), (8, 0)


BF16_DEVICES = {"cuda"}
"""Where operands are carried as bfloat16 grid values: there the matrix units are many times as fast in it."""


@dataclass(frozen=True)
class Operand:
    """Values on the grid of `fmt` times `scale` (0-d float32): `values` [rows, K] times `factor`.

    Without a factor they are the scaled values themselves, float32; with one they are grid values, bfloat16. BF16 has
    neither scale nor factor and comes in either dtype.
    """

    values: Tensor
    fmt: FloatFormat | None
    scale: Tensor | None
    factor: Tensor | None = None

    @property
    def numbers(self) -> Tensor:
        """What the operand stands for, float32."""
        values = self.values.to(torch.float32)
        return values if self.factor is None else values * self.factor

    @property
    def transposed(self) -> Operand:
        return self.with_values(self.values.T)

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale holds for all values, which is what the native products take."""
        return self.scale is None or self.scale.numel() == 1

    @property
    def without_values(self) -> Operand:
        """What describes the values, without keeping them alive."""
        return Operand(cast(Tensor, None), self.fmt, self.scale, self.factor)

    def with_values(self, values: Tensor) -> Operand:
        """The same operand in another shape."""
        return Operand(values, self.fmt, self.scale, self.factor)


def is_carried_in_bf16(x: Tensor, fmt: FloatFormat) -> bool:
    """Whether a tensor of this device and format becomes bfloat16 grid values, which then are exact."""
    return x.device.type in BF16_DEVICES and fmt.mantissa_bits <= 7


def check_product(product: str) -> Product:
    """The product's kind, or a ValueError that says what is allowed."""
    if product not in get_args(Product):
        raise ValueError(unknown_message("product", product, get_args(Product)))
    return cast(Product, product)


def matmul_transposed(
    a: Operand, b: Operand, product: Product = "auto", dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> Tensor:
    """a [M, K] · b [N, K]ᵀ + bias [N], [M, N], summed in float32 and rounded to `dtype`, float32 or bfloat16.

    ValueError where 'native' is asked for and the pair has no unit.
    """
    device = a.values.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return matmul_transposed(a, b, product, dtype, bias)
    kind = native_kind(a.fmt, b.fmt) if a.is_per_tensor and b.is_per_tensor else None
    if product == "emulated" or (product == "auto" and not _is_worth_it(kind, a.values, b.values)):
        return _emulated(a, b, dtype, bias)
    if kind is None:
        names = " and ".join("FP32" if fmt is None else fmt.name for fmt in (a.fmt, b.fmt))
        raise ValueError(
            f"product='native': no hardware multiplies {names}; allowed: two of E4M3 and E5M2 (not both "
            "E5M2), or two of INT8, INT4, E0M7 and E1M6, one scale a tensor; otherwise 'emulated'"
        )
    if bias is not None:
        y = _float8(a, b, torch.float32) if kind == "float8" else _int8(a, b)
        return dispatch.scaled(y, [], dtype, bias)
    return _float8(a, b, dtype) if kind == "float8" else _int8(a, b).to(dtype)


def native_kind(a: FloatFormat | None, b: FloatFormat | None) -> Literal["float8", "int8"] | None:
    """The unit that multiplies these two formats, if there is one."""
    if a in INTEGER_FORMATS and b in INTEGER_FORMATS:
        return "int8"
    are_float8 = a in FLOAT8_DTYPES and b in FLOAT8_DTYPES
    both_e5m2 = a == b == get_format("E5M2")
    return "float8" if are_float8 and not both_e5m2 else None


def _is_worth_it(kind: str | None, a: Tensor, b: Tensor) -> bool:
    """Whether the device has the unit and the shapes suit it (multiples of 16, and rows enough for int8)."""
    if kind is None or a.device.type != "cuda":
        return False
    needed = FLOAT8_CAPABILITY if kind == "float8" else INT8_CAPABILITY
    fits = a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0 and a.shape[0] % 16 == 0 and a.shape[0] > 16
    return fits and torch.cuda.get_device_capability(a.device) >= needed


def _emulated(a: Operand, b: Operand, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """Exact products summed in float32."""
    if a.values.dtype != torch.bfloat16 or b.values.dtype != torch.bfloat16:
        return dispatch.scaled(a.numbers @ b.numbers.T, [], dtype, bias)
    factors = [factor for factor in (a.factor, b.factor) if factor is not None]
    if a.values.device.type != "cuda":
        return dispatch.scaled(a.values.to(torch.float32) @ b.values.to(torch.float32).T, factors, dtype, bias)
    is_final = not factors and bias is None
    y = torch.mm(a.values, b.values.T, out_dtype=dtype if is_final else torch.float32)
    return y if is_final else dispatch.scaled(y, factors, dtype, bias)


def _codes(operand: Operand, dtype: torch.dtype, unit: float = 1.0) -> Tensor:
    """The values without their scale in steps of `unit`, contiguous."""
    values = operand.values if operand.factor is not None else operand.values / _scaled(operand)
    if dtype == torch.int8:
        return (values.to(torch.float32) / unit).round().to(dtype).contiguous()
    return values.to(dtype) if values.is_contiguous() else dispatch.transposed(values.T, dtype)


def _float8(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    left, right = (_codes(operand, FLOAT8_DTYPES[operand.fmt]) for operand in (a, b))  # type: ignore[index]
    return torch._scaled_mm(left, right.T, scale_a=_scaled(a), scale_b=_scaled(b), out_dtype=dtype)


def _int8(a: Operand, b: Operand) -> Tensor:
    steps = [_scaled(operand) * operand.fmt.min_spacing for operand in (a, b)]  # type: ignore[union-attr]
    codes = [_codes(operand, torch.int8, operand.fmt.min_spacing) for operand in (a, b)]  # type: ignore[union-attr]
    return torch._int_mm(codes[0], codes[1].T).to(torch.float32) * (steps[0] * steps[1])


def _scaled(operand: Operand) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=operand.values.device) if operand.scale is None else operand.scale
