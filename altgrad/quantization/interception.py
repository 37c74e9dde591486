"""Quantized products inside a forward pass that somebody else wrote.

Experts and routers come in dozens of classes, each with a forward pass of its own. Such a layer runs as it is, with two
things changed. Its weights are replaced, for the time of the call, by their rounded values; and of every function of
torch that multiplies one of these with another tensor, that tensor and the gradient of the output are rounded too.
Other products, such as those of attention, are left alone.

Views of a weight share its memory, by which it is known; the functions in COPIES hand it on. What is computed from a
weight in any other way is an activation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

COPIES = frozenset(
    {
        *("__getitem__", "index_select", "contiguous", "to", "type", "float", "bfloat16", "half", "clone", "reshape"),
        *("flatten", "type_as"),
    }
)
"""Names of functions whose result is the weight, in other memory."""

CASTS = frozenset({"to", "type", "float", "bfloat16", "half", "type_as"})
"""Those that change no more than the dtype."""

PRODUCTS: dict[Any, tuple[str, str]] = {
    functional.linear: ("input", "weight"),
    torch.matmul: ("input", "other"),
    Tensor.matmul: ("self", "other"),
    Tensor.__matmul__: ("self", "other"),
    Tensor.__rmatmul__: ("self", "other"),
    torch.mm: ("input", "mat2"),
    Tensor.mm: ("self", "mat2"),
    torch.bmm: ("input", "mat2"),
    Tensor.bmm: ("self", "mat2"),
    torch.addmm: ("mat1", "mat2"),
    Tensor.addmm: ("mat1", "mat2"),
    torch.baddbmm: ("batch1", "batch2"),
    Tensor.baddbmm: ("batch1", "batch2"),
    torch.conv1d: ("input", "weight"),
    torch.conv2d: ("input", "weight"),
    torch.conv3d: ("input", "weight"),
    torch._grouped_mm: ("self", "mat2"),
}
"""Functions that multiply, with the names of their factors."""

if hasattr(functional, "grouped_mm"):  # torch 2.10
    PRODUCTS[functional.grouped_mm] = ("mat_a", "mat_b")

ADDED_FIRST = (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def intercepted(layer: Any, products: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward pass with its products quantized; `products`: of `wrapped_layers`.

    RuntimeError where no weight was multiplied by a function of PRODUCTS: the layer would train unquantized.
    """
    values = {path: products.weight(path, _plain(layer, path)) for path in products.roles}
    narrow = {path: value.to(_plain(layer, path).dtype) for path, value in values.items()}
    with _in_place_of_parameters(layer, narrow), _Interception(products, values, narrow) as mode:
        y = layer.altgrad_class.forward(layer, *args, **kwargs)
    has_input = all(x.numel() for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    if not (mode.met or isinstance(layer, nn.Embedding)) and has_input:
        raise RuntimeError(
            f"{layer.altgrad_class.__name__} did not multiply by its {', '.join(values)} in a function that can be "
            "quantized (linear, matmul, mm, bmm, addmm, baddbmm, conv, grouped_mm); give register_layer a forward of "
            "your own, or leave the layer out by a rule with leave=True"
        )
    return y


def _plain(layer: Any, path: str) -> Tensor:
    found = layer._parameters.get(path)
    weight: Tensor = layer.__dict__[path] if found is None else found
    return weight


_STANDING_IN = threading.local()
"""(id of a layer, name) to what its forward pass reads in place of the Parameter, in each thread by itself."""


@contextlib.contextmanager
def _in_place_of_parameters(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    before = getattr(_STANDING_IN, "values", {})
    _STANDING_IN.values = before | {(id(layer), name): value for name, value in values.items()}
    try:
        yield
    finally:
        _STANDING_IN.values = before


def property_of(name: str) -> property:
    """The attribute of a layer's weight: what stands in its place within the forward pass, else the Parameter."""

    def read(layer: Any) -> Any:
        found = getattr(_STANDING_IN, "values", {}).get((id(layer), name))
        if found is not None:
            return found
        if name in layer._parameters:
            return layer._parameters[name]
        if name in layer.__dict__:
            return layer.__dict__[name]
        raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")

    def write(layer: Any, value: Any) -> None:
        layer.__dict__[name] = value

    def delete(layer: Any) -> None:
        del layer.__dict__[name]

    return property(read, write, delete)


class _Interception(TorchFunctionMode):
    """Quantizes products of the given weights; `met`: those that were multiplied."""

    def __init__(self, products: Any, values: Mapping[str, Tensor], narrow: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.met: set[str] = set()
        self._products, self._around = products, _saving()
        # What the layer sees has the Parameter's dtype; what is multiplied are the values, in float32. The tensors are
        # kept, so that no other gets their memory while it stands for a weight.
        self._known = {_memory(narrow[path]): (path, narrow[path], value) for path, value in values.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            return self._multiply(func, args, kwargs)
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in COPIES and args and isinstance(result, Tensor) and result.is_floating_point():
            first = args[0]
            path = self._path_of(first)
            if path is not None and _memory(result) not in self._known:
                wide = self._wide_of(first)
                wide = wide if name in CASTS else func(wide, *args[1:], **kwargs)
                self._known[_memory(result)] = path, result, wide
        return result

    def _path_of(self, x: Any) -> str | None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        path, _, _ = self._known.get(_memory(x), (None, None, None))
        return path

    def _wide_of(self, view: Tensor) -> Tensor:
        """The values in float32 that a view of a weight, or of a copy of it, stands for."""
        _, known, wide = self._known[_memory(view)]
        if known is wide:
            return view
        if view.shape == known.shape and view.stride() == known.stride():
            return wide
        return wide.contiguous().as_strided(view.shape, view.stride(), view.storage_offset())

    def _multiply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = 1 if func in ADDED_FIRST else 0
        factors: list[Any] = [kwargs.get(name) for name in PRODUCTS[func]]
        for place in range(2):
            if len(args) > start + place:
                factors[place] = args[start + place]
        paths = [self._path_of(factor) for factor in factors]
        if (paths[0] is None) == (paths[1] is None):
            return func(*args, **kwargs)  # of two activations, or of two weights
        of_weight = 0 if paths[1] is None else 1
        path, weight, x = paths[of_weight], self._wide_of(factors[of_weight]), factors[1 - of_weight]
        assert path is not None
        self.met.add(path)
        if _saving() != self._around:
            raise RuntimeError(
                "a part of this layer's forward pass is checkpointed, or its tensors are saved elsewhere: recomputed "
                "by itself it would multiply unquantized; checkpoint the whole layer, from outside of it"
            )

        def function(x: Tensor, weight: Tensor) -> Tensor:
            both = [weight, x] if of_weight == 0 else [x, weight]
            own_args, own_kwargs = [_wide(a) for a in args], {name: _wide(value) for name, value in kwargs.items()}
            for place, (name, factor) in enumerate(zip(PRODUCTS[func], both, strict=True)):
                if len(args) > start + place:
                    own_args[start + place] = factor
                else:
                    own_kwargs[name] = factor
            y: Tensor = func(*own_args, **own_kwargs)
            return y

        axis = _feature_axis(func, x, weight, is_left=(of_weight == 0) != (func is Tensor.__rmatmul__))
        return self._products.multiply(path, x, weight, function, axis=axis)


def _saving() -> Any:
    """Changes within torch.utils.checkpoint: its hooks on saved tensors, or the gradient mode that it runs in."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def _feature_axis(func: Any, x: Tensor, weight: Tensor, *, is_left: bool) -> int:
    """The axis of x that is summed over, which is the one of the output's features too; `is_left`: weight @ x."""
    if func in CONVOLUTIONS:
        return 1 - weight.dim()
    return -2 if is_left and x.dim() > 1 and func is not functional.linear else -1


def _wide(value: Any) -> Any:
    """A bias in float32, as the factors are."""
    return value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value


def _memory(x: Tensor) -> int:
    """The storage, not its address: a tensor that torch only traces with has none."""
    return int(x.untyped_storage()._cdata)
