"""The rounding rule as numba loops: contiguous float32 on the CPU at memory speed, without a compiler
installed.

Loops are free of branches, or LLVM does not vectorise them, and every integer step is cast back to 32 bits,
as numba widens to 64. They release the interpreter lock and use one thread: callers own the threads.

Compiled code is kept on disk so that worker processes load it. The folder carries a hash of this package's
sources, for numba notices an edit in a kernel's own file only; where neither the package nor the user's cache
folder can be written, kernels are compiled anew in each process.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import config, types
from numba.extending import intrinsic
from torch import Tensor

from altgrad.quantization.kernels import NEAREST_U, Grid, Overflow, Rounding, hash_keys, overflow_values

_U32 = np.uint32
_F32 = np.float32


def _cache_folder() -> str | None:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    own = f"numba-{digest.hexdigest()[:16]}"
    asked = os.environ.get("NUMBA_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    parents = [Path(asked)] if asked else [Path(__file__).parent / "__pycache__", user / "altgrad"]
    for folder in (parent / own for parent in parents):
        if _is_writable(folder):
            return str(folder)
    return None


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


_FOLDER = _cache_folder()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled on its first call, cached in our folder without moving anyone else's cache."""
    before = config.CACHE_DIR
    config.CACHE_DIR = _FOLDER or ""
    try:
        kernel: Callable[..., Any] = numba.njit(nogil=True, cache=_FOLDER is not None)(function)
        return kernel
    finally:
        config.CACHE_DIR = before


@intrinsic
def _bits(typingctx, number):  # type: ignore[no-untyped-def]
    """The bits of a float32 as uint32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic
def _float(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 of those bits."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@numba.njit
def _split(y, shift, offset, min_normal, unscale, unscale_rest):  # type: ignore[no-untyped-def]
    """Code below |y| and the 31-bit fraction of the way to the next."""
    bits = _U32(_bits(y) & _U32(0x7FFFFFFF))
    magnitude = _float(bits)
    is_normal = magnitude >= min_normal
    steps = (_F32(0.0) if is_normal else magnitude) * unscale * unscale_rest
    whole = np.int32(steps)
    below = _U32(_U32(bits >> shift) - offset) if is_normal else _U32(whole)
    low = _U32(_U32(bits << _U32(_U32(32) - shift)) >> _U32(1))
    part = _U32(np.int32((steps - _F32(whole)) * _F32(2147483648.0)))
    return below, low if is_normal else part


@numba.njit
def _value(index, shift, offset, spacing):  # type: ignore[no-untyped-def]
    """Value of a magnitude code."""
    normal = _float(_U32(_U32(index + offset) << shift))
    return normal if index >= _U32(_U32(1) << _U32(_U32(23) - shift)) else _F32(np.int32(index)) * spacing


@numba.njit
def _finish(y, index, shift, offset, spacing, max_index, finite_over, infinite_over):  # type: ignore[no-untyped-def]
    """Signed value of a rounded magnitude code, with the overflow and NaN policies."""
    bits = _bits(y)
    exponent_and_mantissa = _U32(bits & _U32(0x7FFFFFFF))
    value = _value(min(index, max_index), shift, offset, spacing)
    value = finite_over if index > max_index else value
    value = infinite_over if exponent_and_mantissa == _U32(0x7F800000) else value
    signed = _U32(_bits(value) | _U32(bits & _U32(0x80000000)))
    return _float(bits if exponent_and_mantissa > _U32(0x7F800000) else signed)


@numba.njit
def _hash(counter, key, second_key):  # type: ignore[no-untyped-def]
    """32 hashed bits of a counter, as in the reference."""
    h = _U32(counter ^ key)
    h = _U32(_U32(h ^ _U32(h >> _U32(16))) * _U32(0x7FEB352D))
    h = _U32(_U32(h ^ _U32(h >> _U32(15))) ^ second_key)
    h = _U32(h * _U32(0x846CA68B))
    return _U32(h ^ _U32(h >> _U32(16)))


@_compiled
def _round_fixed(  # type: ignore[no-untyped-def]
    x, out, scale, shift, offset, min_normal, spacing, unscale, unscale_rest, max_index, finite_over,
    infinite_over, u, odd,
):  # fmt: skip
    scale, min_normal, spacing = _F32(scale), _F32(min_normal), _F32(spacing)
    unscale, unscale_rest = _F32(unscale), _F32(unscale_rest)
    finite_over, infinite_over = _F32(finite_over), _F32(infinite_over)
    shift, offset, max_index, u, odd = _U32(shift), _U32(offset), _U32(max_index), _U32(u), _U32(odd)
    for i in range(x.size):
        y = _F32(x[i] / scale)
        below, fraction = _split(y, shift, offset, min_normal, unscale, unscale_rest)
        index = _U32(below + _U32(_U32(fraction + _U32(u + _U32(below & odd))) >> _U32(31)))
        out[i] = _finish(y, index, shift, offset, spacing, max_index, finite_over, infinite_over) * scale


@_compiled
def _round_stochastic(  # type: ignore[no-untyped-def]
    x, out, scale, shift, offset, min_normal, spacing, unscale, unscale_rest, max_index, finite_over,
    infinite_over, key, second_key,
):  # fmt: skip
    scale, min_normal, spacing = _F32(scale), _F32(min_normal), _F32(spacing)
    unscale, unscale_rest = _F32(unscale), _F32(unscale_rest)
    finite_over, infinite_over = _F32(finite_over), _F32(infinite_over)
    shift, offset, max_index = _U32(shift), _U32(offset), _U32(max_index)
    key, second_key = _U32(key), _U32(second_key)
    for i in range(x.size):
        h = _hash(_U32(i), key, second_key)
        y = _F32(x[i] / scale)
        below, fraction = _split(y, shift, offset, min_normal, unscale, unscale_rest)
        index = _U32(below + _U32(_U32(fraction + _U32(h >> _U32(1))) >> _U32(31)))
        out[i] = _finish(y, index, shift, offset, spacing, max_index, finite_over, infinite_over) * scale


@_compiled
def _index(x, out, scale, shift, offset, min_normal, unscale, unscale_rest, max_index, u):  # type: ignore[no-untyped-def]
    scale, min_normal = _F32(scale), _F32(min_normal)
    unscale, unscale_rest = _F32(unscale), _F32(unscale_rest)
    shift, offset, max_index, u = _U32(shift), _U32(offset), _U32(max_index), _U32(u)
    for i in range(x.size):
        y = _F32(x[i] / scale)
        bits = _bits(y)
        below, fraction = _split(y, shift, offset, min_normal, unscale, unscale_rest)
        index = _U32(below + _U32(_U32(fraction + _U32(u + _U32(below & _U32(1)))) >> _U32(31)))
        index = min(index, max_index)
        index = _U32(0) if (bits & _U32(0x7FFFFFFF)) > _U32(0x7F800000) else index
        out[i] = np.int32(-np.int32(index) if bits >= _U32(0x80000000) else np.int32(index))


@_compiled
def _value_of_index(index, out, scale, shift, offset, spacing, max_index):  # type: ignore[no-untyped-def]
    scale, spacing = _F32(scale), _F32(spacing)
    shift, offset, max_index = _U32(shift), _U32(offset), np.int32(max_index)
    for i in range(index.size):
        clamped = np.int32(min(max(np.int32(index[i]), np.int32(-max_index)), max_index))
        value = _value(_U32(np.int32(abs(clamped))), shift, offset, spacing)
        out[i] = (-value if clamped < 0 else value) * scale


@_compiled
def _spacing_at(x, out, scale, lowest, highest, mantissa_step):  # type: ignore[no-untyped-def]
    scale, mantissa_step = _F32(scale), _F32(mantissa_step)
    lowest, highest = _U32(lowest), _U32(highest)
    for i in range(x.size):
        y = _F32(x[i] / scale)
        exponent = min(max(_U32(_bits(y) & _U32(0x7F800000)), lowest), highest)
        out[i] = _float(exponent) * mantissa_step * scale if y == y else y


@_compiled
def _uniform(out, key, second_key):  # type: ignore[no-untyped-def]
    key, second_key = _U32(key), _U32(second_key)
    for i in range(out.size):
        out[i] = _F32(np.int32(_hash(_U32(i), key, second_key) >> _U32(8))) * _F32(2.0**-24)


def quantize(
    x: Tensor, scale: float, grid: Grid, rounding: Rounding, overflow: Overflow, seed: int | None, out: Tensor
) -> None:
    """round(x / scale) * scale into `out`; both contiguous float32 CPU tensors, possibly the same one."""
    finite_over, infinite_over = overflow_values(grid, rounding, overflow)
    arguments = (
        _flat(x), _flat(out), scale, grid.shift, grid.offset, grid.min_normal, grid.spacing, grid.unscale,
        grid.unscale_rest, grid.max_index, finite_over, infinite_over,
    )  # fmt: skip
    if rounding == "stochastic":
        if seed is None:
            raise ValueError("stochastic rounding needs a seed, an integer of up to 64 bits; got None")
        _round_stochastic(*arguments, *hash_keys(seed))
    elif rounding == "nearest":
        _round_fixed(*arguments, NEAREST_U, 1)
    else:
        _round_fixed(*arguments, 0, 0)


def code_index(x: Tensor, scale: float, grid: Grid, out: Tensor) -> None:
    """Signed code nearest to x / scale into the int32 `out`."""
    _index(
        _flat(x), _flat(out), scale, grid.shift, grid.offset, grid.min_normal, grid.unscale,
        grid.unscale_rest, grid.max_index, NEAREST_U,
    )  # fmt: skip


def index_to_value(index: Tensor, scale: float, grid: Grid, out: Tensor) -> None:
    """Value of the signed int32 code times scale into the float32 `out`."""
    _value_of_index(_flat(index), _flat(out), scale, grid.shift, grid.offset, grid.spacing, grid.max_index)


def ulp(x: Tensor, scale: float, grid: Grid, out: Tensor) -> None:
    """Spacing of the scaled grid at x into the float32 `out`."""
    _spacing_at(
        _flat(x), _flat(out), scale, grid.min_exponent_bits, grid.max_exponent_bits, grid.mantissa_step
    )


def uniform(seed: int, out: Tensor) -> None:
    """The draws in [0, 1) of a seed, 24 bits each, into the float32 `out`."""
    _uniform(_flat(out), *hash_keys(seed))


def _flat(x: Tensor) -> Any:
    return x.detach().view(-1).numpy()
