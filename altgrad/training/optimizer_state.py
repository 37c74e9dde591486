"""The one place where an optimizer's state becomes what the step's kernels take.

State comes from anywhere: a checkpoint of another precision, a file of flat tensors, a user's hand. Kernels read it by
address, so its dtype, shape, layout and device must be exactly what they expect. What can be converted without losing a
bit is converted; the rest is a ValueError that names the parameter, the key, what came and what is allowed.

Parameters that are sharded (`torch.distributed.tensor.DTensor`, as `fully_shard` makes them) keep sharded state, as
torch's own optimizers do. Their step is that of the whole tensor: a scale, a mean spacing and a draw belong to all of
it. So it is gathered, stepped alike on every process, and each keeps its shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a parameter may be: the step is computed in float32 and stored in the parameter's dtype."""

LARGEST_STEP = 2**24
"""Steps that float32 counts exactly."""

SCALE_RANGE = (2.0**-149, 2.0**127)


@dataclass(frozen=True)
class Entry:
    """One kind of state: its dtype, whether it has the parameter's shape or is one number, and what it may be."""

    dtype: torch.dtype
    is_shaped: bool = False
    allowed: str = ""
    test: Callable[[float], bool] | None = None


ENTRIES: dict[str, Entry] = {
    "step": Entry(
        torch.float32,
        allowed=f"a whole number from 0 to {LARGEST_STEP}",
        test=lambda value: 0 <= value <= LARGEST_STEP and value == int(value),
    ),
    "exp_avg": Entry(torch.float32, is_shaped=True),
    "exp_avg_sq": Entry(torch.float32, is_shaped=True),
    "carry": Entry(torch.float32, is_shaped=True),
    "mean_spacing": Entry(torch.float64, allowed="a finite number >= 0", test=lambda value: 0 <= value < math.inf),
    "grid_scale": Entry(
        torch.float32, allowed="a positive float32 number", test=lambda value: SCALE_RANGE[0] <= value <= SCALE_RANGE[1]
    ),
    "overflow_streak": Entry(torch.int64, allowed="a whole number >= 0", test=lambda value: value >= 0),
}
"""All the state that kernels read; other keys belong to somebody else and are carried along."""

_EXPECTED = {key: (entry.dtype, entry.is_shaped) for key, entry in ENTRIES.items()}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory is what it stands for."""
    return type(tensor) in (Tensor, nn.Parameter)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; imports torch's distributed tensors only where there may be one."""
    if not isinstance(tensor, Tensor) or is_plain(tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Any) -> Tensor:
    """The tensor itself, or all of a sharded one (a collective: every process must call it)."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


@torch.no_grad()
def put_back(tensor: Any, values: Tensor) -> None:
    """Writes a whole tensor's values into it; a sharded one takes its own part."""
    if not is_sharded(tensor):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(values.to(tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(part.to_local())


def zeros_like(parameter: Tensor) -> Tensor:
    """State of a parameter's shape, float32: contiguous, or sharded as the parameter is."""
    if is_sharded(parameter):
        return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)


def number_like(parameter: Tensor, key: str, value: float = 0.0) -> Tensor:
    """State of one number, 0-d, where the parameter is."""
    return torch.full((), value, dtype=ENTRIES[key].dtype, device=parameter.device)


def check_parameter(parameter: Any, name: str) -> None:
    """ValueError where no step could be taken on it exactly."""
    if not is_plain(parameter) and not is_sharded(parameter):
        kind = type(parameter).__name__
        raise ValueError(f"{name} is a {kind}; allowed: a Parameter, or a DTensor (fully_shard)")
    if parameter.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{name} has dtype {_short(parameter.dtype)}; allowed: {', '.join(map(_short, WEIGHT_DTYPES))} "
            "(steps are computed in float32)"
        )


def check_gradient(parameter: Tensor, grad: Tensor, name: str) -> None:
    """ValueError where a gradient does not belong to the parameter as it is now."""
    if grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {name} is {_short(grad.layout)}; dense ones are needed (nn.Embedding(sparse=False))"
        )
    if grad.shape != parameter.shape or grad.device != parameter.device or grad.is_complex():
        raise ValueError(
            f"the gradient of {name} is {describe(grad)}; the parameter is {describe(parameter)} now: "
            "call zero_grad() after changing it"
        )


def is_usual(parameter: Tensor, grad: Tensor) -> bool:
    """Whether nothing is to be said about a parameter and its gradient; the look that every step takes."""
    return (
        type(parameter) is nn.Parameter
        and type(grad) is Tensor
        and parameter.dtype in WEIGHT_DTYPES
        and grad.layout is torch.strided
        and grad.shape == parameter.shape
        and grad.device == parameter.device
    )


def misfits(state: dict[str, Any], parameter: Tensor, own: dict[str, Tensor]) -> list[str]:
    """Keys whose state kernels cannot take as it is, or that somebody else put there: not what is in `own`.

    Every step looks at all of it, so this is one flat loop.
    """
    found: list[str] = []
    shape, device, is_cpu = parameter.shape, parameter.device, parameter.is_cpu
    for key, value in state.items():
        # A grid's scale is checked with its grid.
        if key in ENTRIES and key != "grid_scale":
            dtype, is_shaped = _EXPECTED[key]
            if (
                own.get(key) is not value
                or type(value) is not Tensor
                or value.dtype is not dtype
                or (value.shape != shape or not value.is_contiguous() if is_shaped else value.dim())
                or not (value.is_cpu if is_cpu else value.device == device)
                or value.is_neg()
            ):
                found.append(key)
    return found


@torch.no_grad()
def admitted(value: Any, key: str, parameter: Tensor, name: str) -> Tensor:
    """A tensor of its own that kernels can take, equal to the value; ValueError where there is none."""
    entry = ENTRIES[key]
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise _refusal(name, key, f"a {type(value).__name__}", entry, parameter)
    found = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    if is_sharded(found) != (is_sharded(parameter) and entry.is_shaped):
        found = whole(found)
        if is_sharded(parameter) and entry.is_shaped:
            _check_shape(found, key, parameter, name, value)
            sharded = zeros_like(parameter)
            put_back(sharded, _exact(found, key, parameter, name, value))
            return sharded
    if is_sharded(found):
        _check_shape(found, key, parameter, name, value)
        own: Any = zeros_like(parameter)
        own.to_local().copy_(_exact(found.to_local(), key, parameter, name, value))  # type: ignore[attr-defined]
        return cast(Tensor, own)
    if not is_plain(found) or found.layout != torch.strided or found.is_meta != parameter.is_meta:
        raise _refusal(name, key, describe(value), entry, parameter)
    if not entry.is_shaped and found.numel() == 1:
        found = found.reshape(())
    _check_shape(found, key, parameter, name, value)
    exact = _exact(found, key, parameter, name, value)
    if entry.test is not None and not exact.is_meta and not entry.test(float(exact)):
        raise _refusal(name, key, str(float(exact)), entry, parameter)
    # A copy: what came may be shared with others, mapped read-only, or a view of something else.
    return torch.empty_like(exact, memory_format=torch.contiguous_format).copy_(exact)


def _check_shape(found: Tensor, key: str, parameter: Tensor, name: str, value: Any) -> None:
    entry = ENTRIES[key]
    if found.shape != (parameter.shape if entry.is_shaped else ()):
        raise _refusal(name, key, describe(value), entry, parameter)


def _exact(found: Tensor, key: str, parameter: Tensor, name: str, value: Any) -> Tensor:
    """In the dtype and on the device of the entry, with no bit lost."""
    entry = ENTRIES[key]
    if found.is_complex() or found.dtype == torch.bool or found.is_quantized:
        raise _refusal(name, key, describe(value), entry, parameter)
    found = found.resolve_neg().to(parameter.device)
    exact = found.to(entry.dtype)
    widest = torch.float64 if found.is_floating_point() or exact.is_floating_point() else torch.int64
    is_kept = (exact.to(widest) == found.to(widest)) | (found != found)
    if found.dtype != entry.dtype and not found.is_meta and not bool(is_kept.all()):
        raise _refusal(name, key, f"{describe(value)}, which {_short(entry.dtype)} cannot hold", entry, parameter)
    return exact


def describe(value: Any) -> str:
    """A tensor in words: dtype, shape, layout and device where they are unusual."""
    if not isinstance(value, Tensor):
        return repr(value)
    words = [_short(value.dtype), str(tuple(value.shape))]
    if value.layout != torch.strided:
        words.append(_short(value.layout))
    if value.device.type != "cpu":
        words.append(f"on {value.device}")
    if not is_plain(value):
        words.append(f"({type(value).__name__})")
    return " ".join(words)


def _refusal(name: str, key: str, came: str, entry: Entry, parameter: Tensor) -> ValueError:
    shape = f"{tuple(parameter.shape)}, the parameter's shape" if entry.is_shaped else entry.allowed or "one number"
    return ValueError(
        f"state {key!r} of {name}: got {came}; allowed: {_short(entry.dtype)}, or what converts to it exactly: {shape}"
    )


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")
