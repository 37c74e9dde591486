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
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

COPIES = frozenset(
    {
        *("__getitem__", "index_select", "contiguous", "to", "type", "float", "bfloat16", "half", "clone", "reshape"),
        *("flatten", "cat", "type_as"),
    }
)
"""Names of functions whose result is the weight, in other memory."""

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


@torch.compiler.disable(reason="AltGrad looks into this layer's own forward pass as it runs")
def intercepted(layer: nn.Module, products: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward pass with its products quantized; `products`: of `wrapped_layers`.

    RuntimeError where a weight was never multiplied by a function of PRODUCTS: it would train unquantized.
    """
    values = {path: products.weight(path, None) for path in products.roles}
    with _in_place_of_parameters(layer, values), _Interception(products, values) as mode:
        y = layer.forward(*args, **kwargs)
    has_input = all(x.numel() for x in args if isinstance(x, Tensor))
    if (missed := set(values) - mode.met) and has_input:
        raise RuntimeError(
            f"{type(layer).__name__} did not multiply by its {', '.join(sorted(missed))} in a function that can be "
            "quantized (linear, matmul, mm, bmm, addmm, baddbmm, conv, grouped_mm); give register_layer a forward of "
            "your own"
        )
    return y


@contextlib.contextmanager
def _in_place_of_parameters(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The layer reads `values`: an attribute of the instance comes before a Parameter of the same name."""
    places = []
    for path, value in values.items():
        *way, name = path.split(".")
        holder = layer.get_submodule(".".join(way)) if way else layer
        places.append((holder.__dict__, name, holder.__dict__.get(name)))
        holder.__dict__[name] = value
    try:
        yield
    finally:
        for attributes, name, before in places:
            if before is None:
                del attributes[name]
            else:
                attributes[name] = before


class _Interception(TorchFunctionMode):
    """Quantizes products of the given weights; `met`: those that were multiplied."""

    def __init__(self, products: Any, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.met: set[str] = set()
        self._products = products
        # The tensors are kept, so that no other gets their memory while it stands for a weight.
        self._known = {_memory(value): (path, value) for path, value in values.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            return self._multiply(func, args, kwargs)
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in COPIES and args:
            first = args[0][0] if isinstance(args[0], tuple | list) and args[0] else args[0]
            path = self._path_of(first)
            if path is not None and isinstance(result, Tensor) and result.is_floating_point():
                self._known.setdefault(_memory(result), (path, result))
        return result

    def _path_of(self, x: Any) -> str | None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        path, _ = self._known.get(_memory(x), (None, None))
        return path

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
        path, weight, x = paths[of_weight], factors[of_weight], factors[1 - of_weight]
        assert path is not None
        self.met.add(path)

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
