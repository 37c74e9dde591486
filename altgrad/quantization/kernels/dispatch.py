"""Which kernel a tensor gets, and the same calls as torch.library ops.

Contiguous tensors of float32, bfloat16 and float16 under a scalar scale go to the numba kernels on the CPU and to the
Triton kernels (rounding and codes) on a GPU, everything else to the torch reference. The environment variable
ALTGRAD_KERNEL=reference|numba|triton names the one kernel that may be used beside the reference: forced, it must be
installed, and tensors it cannot take go to the reference.

Where something records torch's calls or stands in for tensors (torch.compile, torch.export, make_fx, jit.trace,
fake tensors), a CPU tensor's call becomes one op of the graph, `altgrad::quantize` and its like, which runs the
kernel: torch cannot look into numba code, and need not. On other devices the reference is traced and fuses with its
neighbours, but for numbered draws (`Drawn`), whose seed a graph does not know. Eager calls do not pass through the
ops, whose dispatch costs more than a small tensor's rounding.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format, unknown_message
from altgrad.quantization.kernels import (
    KERNEL_DTYPES,
    Drawn,
    Grid,
    Overflow,
    Rounding,
    Seed,
    finite_bound,
    fitting,
    grid_of,
    reference,
    seed_of,
)

Scale = float | Tensor
_PLAIN = (Tensor, torch.nn.Parameter)
FORCIBLE = ("", "numba", "triton", "reference")


def rounded(x: Tensor, fmt: FloatFormat, scale: Scale, rounding: Rounding, overflow: Overflow, seed: Seed) -> Tensor:
    """round(x / scale) * scale, x's shape and dtype."""
    if is_traced(x) and (x.device.type == "cpu" or isinstance(seed, Drawn)):
        key, number = (seed.key, seed.number) if isinstance(seed, Drawn) else (seed, None)
        arguments = as_tensor(scale), fmt.name, rounding, overflow, as_int64(key), number
        return cast(Tensor, _quantize_op(x, *arguments))
    return _rounded_now(x, fmt, scale, rounding, overflow, seed_of(seed))


def _rounded_now(
    x: Tensor, fmt: FloatFormat, scale: Scale, rounding: Rounding, overflow: Overflow, seed: int | None
) -> Tensor:
    """`rounded`, where nothing records it."""
    return with_its_zeros(_rounded_signed(x, fmt, scale, rounding, overflow, seed), fmt)


def with_its_zeros(values: Tensor, fmt: FloatFormat) -> Tensor:
    """A kernel's result, in which a negative zero becomes the one zero of a format that has one, in place.

    Kernels keep every sign; -0 + 0 is 0, and any other sum with 0 is what it was.
    """
    return values if fmt.has_negative_zero else values.add_(0.0)


def _rounded_signed(
    x: Tensor, fmt: FloatFormat, scale: Scale, rounding: Rounding, overflow: Overflow, seed: int | None
) -> Tensor:
    if x.dtype == torch.float64:
        return reference.quantize(x, scale, grid_of(fmt), rounding, overflow, seed)
    grid, number = _reaching(fmt, x.dtype, scale, overflow), scalar(scale)
    carrier = x if number is not None and x.dtype in KERNEL_DTYPES else x.to(torch.float32)
    if (triton := triton_for(x, scale)) is not None:
        result = torch.empty_like(x)
        triton.quantize(x, scale, grid, rounding, overflow, seed, result)
        return result
    kernel = numba_for(carrier)
    if kernel is None or (number is None and not _all_fit(grid, x.dtype, scale)):
        return reference.quantize(x.to(torch.float32), scale, grid, rounding, overflow, seed, x.dtype).to(x.dtype)
    result = torch.empty_like(carrier)
    if number is not None:
        kernel.quantize(carrier, number, grid, rounding, overflow, seed, result)
    else:
        kernel.quantize((carrier / scale).contiguous(), 1.0, grid, rounding, overflow, seed, result)
        result.mul_(scale)
    return result.to(x.dtype)


def round_into(
    x: Tensor, fmt: FloatFormat, scale: Scale, rounding: Rounding, overflow: Overflow, seed: int | None, out: Tensor
) -> Tensor:
    """`rounded`, written to `out` (may be x) without a tensor between where a kernel can."""
    is_direct = out.is_contiguous() and not out.is_neg() and not is_traced(x) and _is_same_or_apart(x, out)
    if is_direct and (triton := triton_for(x, scale)) is not None:
        triton.quantize(x, scale, grid_of(fmt), rounding, overflow, seed, out)
        return with_its_zeros(out, fmt)
    kernel = numba_for(x) if is_direct else None
    number = scalar(scale) if is_direct else None
    if kernel is None or number is None:
        return out.copy_(rounded(x, fmt, scale, rounding, overflow, seed))
    kernel.quantize(x, number, _reaching(fmt, x.dtype, number, overflow), rounding, overflow, seed, out)
    return with_its_zeros(out, fmt)


def grid_values(x: Tensor, fmt: FloatFormat, scale: Scale, rounding: Rounding, seed: Seed) -> Tensor:
    """round(x / scale), saturating, in bfloat16, which has to hold the format's values; infinities stay."""
    if (triton := triton_for(x, scale)) is not None:
        out = torch.empty_like(x, dtype=torch.bfloat16)
        triton.grid_values(x, scale, grid_of(fmt), rounding, seed_of(seed), out)
        return with_its_zeros(out, fmt)
    y = reference.quotient(x, scale)
    return torch.where(y.isinf(), y, rounded(y, fmt, 1.0, rounding, "saturate", seed)).to(torch.bfloat16)


def scaled(y: Tensor, factors: Sequence[Tensor], dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """y [M, N], float32, times 0-d factors, plus a bias [N], rounded once to float32 or bfloat16."""
    bias = None if bias is None else bias.detach().to(torch.float32)
    fits = bias is None or bias.shape == y.shape[-1:]
    if (factors or bias is not None) and fits and (triton := triton_for(y, 1.0)) is not None:
        out = torch.empty_like(y, dtype=dtype)
        triton.scaled(y, list(factors), out, None if bias is None else bias.contiguous())
        return out
    for factor in factors:
        y = y * factor
    return (y if bias is None else y + bias).to(dtype)


def transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The contiguous transpose of x [rows, columns] in a dtype that holds its values exactly."""
    triton = triton_for(x, 1.0)
    return x.T.to(dtype).contiguous() if triton is None else cast(Tensor, triton.transposed(x, dtype))


def largest_value(fmt: FloatFormat, dtype: torch.dtype, scale: Scale, device: torch.device) -> Scale:
    """Where saturation stops for elements of a dtype, before the product with the scale."""
    if dtype == torch.float64:
        return fmt.max
    if not isinstance(scale, Tensor) and not torch.compiler.is_compiling():
        return fitting(grid_of(fmt), dtype, scale).max_value
    grid = grid_of(fmt)
    return reference.magnitude_value(reference.last_index(grid, dtype, scale, device), grid)


def code_index(x: Tensor, fmt: FloatFormat, scale: Scale) -> Tensor:
    """Signed code of the value nearest to x / scale, int32, saturating; NaN gives 0."""
    if is_traced(x) and x.device.type == "cpu":
        return cast(Tensor, _code_index_op(x, as_tensor(scale), fmt.name))
    return _code_index_now(x, fmt, scale)


def _code_index_now(x: Tensor, fmt: FloatFormat, scale: Scale) -> Tensor:
    grid, kernel = grid_of(fmt), numba_for(x)
    if (triton := triton_for(x, scale)) is not None:
        out = torch.empty(x.shape, dtype=torch.int32, device=x.device)
        triton.code_index(x, scale, grid, out)
        return out
    if kernel is None:
        return reference.code_index(x, scale, grid)
    number = scalar(scale)
    if number is None:
        x, number = (x.to(torch.float32) / scale).contiguous(), 1.0
    out = torch.empty(x.shape, dtype=torch.int32)
    kernel.code_index(x, number, grid, out)
    return out


def index_to_value(index: Tensor, fmt: FloatFormat, scale: Scale) -> Tensor:
    """Value of a signed code times scale, float32; codes beyond the last are clamped to it."""
    if is_traced(index) and index.device.type == "cpu":
        return cast(Tensor, _index_to_value_op(index, as_tensor(scale), fmt.name))
    return _index_to_value_now(index, fmt, scale)


def _index_to_value_now(index: Tensor, fmt: FloatFormat, scale: Scale) -> Tensor:
    kernel, number = numba_for(index, (torch.int32,)), scalar(scale)
    if kernel is None or number is None:
        return reference.index_to_value(index, scale, grid_of(fmt))
    out = torch.empty(index.shape, dtype=torch.float32)
    kernel.index_to_value(index, number, grid_of(fmt), out)
    return out


def ulp(x: Tensor, fmt: FloatFormat, scale: Scale) -> Tensor:
    """Spacing of the scaled grid at x, float32; NaN where x / scale is."""
    if is_traced(x) and x.device.type == "cpu":
        return cast(Tensor, _ulp_op(x, as_tensor(scale), fmt.name))
    return _ulp_now(x, fmt, scale)


def _ulp_now(x: Tensor, fmt: FloatFormat, scale: Scale) -> Tensor:
    kernel, number = numba_for(x), scalar(scale)
    if kernel is None or number is None:
        return reference.ulp(x, scale, grid_of(fmt))
    out = torch.empty(x.shape, dtype=torch.float32)
    kernel.ulp(x, number, grid_of(fmt), out)
    return out


def uniform(size: torch.Size, seed: int, device: torch.device) -> Tensor:
    """The draws in [0, 1) of a seed, 24 bits each, float32."""
    out = torch.empty(size, dtype=torch.float32, device=device)
    kernel = numba_for(out)
    if kernel is None:
        return reference.uniform(size, seed, device)
    kernel.uniform(seed, out)
    return out


def kernel_in_use(tensor: Tensor) -> Literal["numba", "triton", "reference"]:
    """Which kernel rounds a tensor of this device, layout and dtype, under one scale."""
    if triton_for(tensor, 1.0) is not None:
        return "triton"
    return "reference" if numba_for(tensor) is None else "numba"


def check_kernels() -> None:
    """ValueError or ModuleNotFoundError, naming the variable, where the environment asks for kernels that can't run."""
    forced = os.environ.get("ALTGRAD_KERNEL", "")
    disabled = os.environ.get("NUMBA_DISABLE_JIT", "0")
    if _may_use("numba", forced) and disabled.strip() not in ("", "0"):
        raise ValueError(
            f"NUMBA_DISABLE_JIT: {disabled!r} is not allowed with numba's kernels, which are nothing uncompiled; "
            "ALTGRAD_KERNEL=reference does without them"
        )


def kernel_report() -> list[tuple[str, str]]:
    """The kernel each kind of device gets on this machine and why, in words; errors as in using one."""
    forced = os.environ.get("ALTGRAD_KERNEL", "")
    installed = {name: importlib.util.find_spec(name) is not None for name in ("numba", "triton")}
    rows = []
    for device, package in (("CPU", "numba"), ("GPU", "triton")):
        kernel = package if _may_use(package, forced) else "reference"
        state = "installed" if installed[package] else "not installed"
        reason = f"ALTGRAD_KERNEL={forced}" if forced else f"{package} is {state}"
        rows.append((f"kernel on {device}", f"{kernel} ({reason})"))
    if not torch.cuda.is_available():
        rows[1] = ("kernel on GPU", f"{rows[1][1]}; no GPU here")
    choice = f"{forced} is forced" if forced else "not set; reference, numba or triton forces one"
    triton = _import_report("triton") if installed["triton"] else "not installed (extra gpu)"
    return [*rows, ("ALTGRAD_KERNEL", choice), ("triton", triton)]


def _import_report(package: str) -> str:
    try:
        return f"{importlib.import_module(package).__version__}, importable"
    except ImportError as error:
        return f"installed, but its import fails: {error}"


def triton_for(x: Tensor, scale: Scale) -> ModuleType | None:
    """The Triton kernels if they can take this tensor under this scale, else None."""
    is_plain = x.dtype in KERNEL_DTYPES and x.is_contiguous() and x.numel() > 0
    if x.device.type != "cuda" or not is_plain or is_traced(x) or x.is_neg():
        return None
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return None
    return _triton_kernels(os.environ.get("ALTGRAD_KERNEL", ""))


def numba_for(x: Tensor, dtypes: Sequence[torch.dtype] = KERNEL_DTYPES) -> ModuleType | None:
    """The numba kernels if they can take this tensor, else None."""
    if x.device.type != "cpu" or x.dtype not in dtypes or not x.is_contiguous() or torch.compiler.is_compiling():
        return None
    return numba_kernels(os.environ.get("ALTGRAD_KERNEL", ""))


def scalar(scale: Scale) -> float | None:
    """The scale as one number, None where it is none or lies on a device that would have to be waited for."""
    if not isinstance(scale, Tensor):
        return scale
    return float(scale.item()) if scale.numel() == 1 and scale.device.type == "cpu" else None


def _is_same_or_apart(x: Tensor, out: Tensor) -> bool:
    """Whether no element is written before it is read, for contiguous tensors of one size."""
    distance = abs(x.data_ptr() - out.data_ptr())
    return distance == 0 or distance >= x.numel() * x.element_size()


def _reaching(fmt: FloatFormat, dtype: torch.dtype, scale: Scale, overflow: Overflow) -> Grid:
    """The grid to round on, shortened to what is finite in the dtype where saturation under one scale needs it."""
    number = None if torch.compiler.is_compiling() or overflow == "inf" else scalar(scale)
    return grid_of(fmt) if number is None else fitting(grid_of(fmt), dtype, number)


def _all_fit(grid: Grid, dtype: torch.dtype, scale: Scale) -> bool:
    """Whether the whole grid is finite in the dtype under every one of these scales; False where one is NaN."""
    assert isinstance(scale, Tensor)
    return scale.numel() == 0 or grid.max_value * float(scale.max()) < finite_bound(dtype)


@cache
def numba_kernels(forced: str) -> ModuleType | None:
    """The numba kernels, or None where numba is not installed or another kernel is asked for."""
    if not _may_use("numba", forced):
        return None
    return importlib.import_module("altgrad.quantization.kernels.cpu")


@cache
def _triton_kernels(forced: str) -> ModuleType | None:
    """The Triton kernels, or None where triton is not installed or another kernel is asked for."""
    if not _may_use("triton", forced):
        return None
    return importlib.import_module("altgrad.quantization.kernels.gpu")


def _may_use(package: str, forced: str) -> bool:
    """Whether a package's kernels are installed and not ruled out; ModuleNotFoundError where forced and absent."""
    if forced not in FORCIBLE:
        raise ValueError(unknown_message("ALTGRAD_KERNEL", forced, FORCIBLE[1:]))
    is_installed = importlib.util.find_spec(package) is not None
    if forced == package and not is_installed:
        raise ModuleNotFoundError(
            f"ALTGRAD_KERNEL={package} asks for {package}, which is not installed: pip install {package}"
        )
    return is_installed and forced in ("", package)


def is_traced(x: Tensor) -> bool:
    """Whether something records or replaces torch's calls on x: a kernel would escape it, or meet no memory."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def as_tensor(scale: Scale) -> Tensor:
    """The scale as an op takes it, 0-d where it is a number."""
    return scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32)


def as_int64(seed: int | None) -> int | None:
    """The same 64 bits as a signed integer, which is what an op's arguments can hold."""
    return None if seed is None else (seed if seed < 1 << 63 else seed - (1 << 64))


@torch.library.custom_op("altgrad::quantize", mutates_args=())
def _quantize_op(
    x: Tensor, scale: Tensor, fmt: str, rounding: str, overflow: str, seed: int | None, number: Tensor | None = None
) -> Tensor:
    modes = cast(Rounding, rounding), cast(Overflow, overflow)
    drawn = seed if seed is None or number is None else seed_of(Drawn(seed, number))
    return _rounded_now(x, get_format(fmt), scale, *modes, drawn).contiguous()


@_quantize_op.register_fake
def _quantize_shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None, None, None


_quantize_op.register_autograd(_straight_through)


@torch.library.custom_op("altgrad::code_index", mutates_args=())
def _code_index_op(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return _code_index_now(x, get_format(fmt), scale).contiguous()


@_code_index_op.register_fake
def _code_index_shape(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int32, device=x.device)


@torch.library.custom_op("altgrad::index_to_value", mutates_args=())
def _index_to_value_op(index: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return _index_to_value_now(index, get_format(fmt), scale).contiguous()


@torch.library.custom_op("altgrad::ulp", mutates_args=())
def _ulp_op(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return _ulp_now(x, get_format(fmt), scale).contiguous()


@_index_to_value_op.register_fake
@_ulp_op.register_fake
def _float32_shape(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)
