"""Which layers multiply by a weight, where it lies, and how they run in quantized roles.

A kind says for a class of layers which Parameters are weights of products, which of their axes a product sums over, and
how the forward pass looks when weights, inputs and output gradients are rounded. nn.Linear is not among them: it has a
class of its own, `QuantizedLinear`. One call of `register_layer` adds a class.

| layer | weights | summed axes |
| --- | --- | --- |
| Conv1d, Conv2d, Conv3d | weight [out, in, *window] | window, then channels in |
| Conv1D of transformers | weight [in, out] | 0 |
| MultiheadAttention | in_proj (or q_proj, k_proj, v_proj), out_proj | last |
| *Experts of transformers >= 5 | every 3-d Parameter, [experts, out, in], or [experts, in, out] where transposed | in |
| *Router, *Gate of transformers | weight [experts, in] | last |
| Embedding, where asked for | weight [rows, width] | none: its rows are looked up |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from altgrad.quantization.attention import attend
from altgrad.quantization.interception import intercepted

Forward = Callable[..., Any]
"""(layer, products, *the layer's arguments) -> the layer's output; `products`: see `wrapped_layers.Products`."""


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: its weights by path, each with the axes a product sums over, and its forward pass."""

    weights: Callable[[nn.Module], Mapping[str, tuple[int, ...]]]
    forward: Forward = intercepted
    attributes: dict[str, Any] = field(default_factory=dict)
    """What the converted layer says in place of the original."""
    is_lookup: bool = False
    """Whether rows of the weight are looked up, not multiplied."""


def register_layer(
    layer: type[nn.Module], *weights: str, contracted: int | tuple[int, ...] = -1, forward: Forward | None = None
) -> None:
    """Lets `quantize_model` convert layers of this class, whose Parameters `weights` multiply its input.

    `contracted`: the axes of the weights that the product sums over. By default the class' own forward pass runs, and
    its products by these weights (linear, matmul, conv, ...) are quantized; `forward(layer, products, *args)` stands in
    its place: it calls `w = products.weight("weight", layer.weight)`, then
    `products.multiply("weight", x, w, lambda x, w: x @ w.T)` for each product.

    TypeError: not a class of modules, or no weights.
    """
    if not (inspect.isclass(layer) and issubclass(layer, nn.Module)) or not weights:
        raise TypeError(
            f"register_layer takes a class of modules and the names of its weights; got {layer!r}, {weights}"
        )
    axes = (contracted,) if isinstance(contracted, int) else tuple(contracted)
    KINDS[layer] = LayerKind(lambda _: dict.fromkeys(weights, axes), forward or intercepted)


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind of a layer, by its class or one that it inherits from; None for a layer that is not known."""
    for base in type(layer).__mro__:
        if base in KINDS:
            kind = KINDS[base]
            is_same = type(layer).forward is base.forward
            return kind if is_same else LayerKind(kind.weights, attributes=kind.attributes, is_lookup=kind.is_lookup)
    return next((kind for fits, kind in _BY_LOOK if fits(layer)), None)


def weights_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path of each weight that products of this layer are made with, to the axes they sum over."""
    kind = kind_of(layer)
    return {} if kind is None else dict(kind.weights(layer))


def _convolution(layer: Any, products: Any, x: Tensor) -> Any:
    bias = _wide(layer.bias)
    weight = products.weight("weight", layer.weight)
    features = -layer.weight.dim() + 1  # of an image without a batch axis too
    return products.multiply("weight", x, weight, lambda x, w: layer._conv_forward(x, w, bias), axis=features)


def _transposed_linear(layer: Any, products: Any, x: Tensor) -> Any:
    bias = _wide(layer.bias)
    weight = products.weight("weight", layer.weight)
    return products.multiply("weight", x, weight, lambda x, w: x @ w + bias)


def _linear(layer: Any, products: Any, x: Tensor) -> Any:
    bias = _wide(layer.bias)
    weight = products.weight("weight", layer.weight)
    return products.multiply("weight", x, weight, lambda x, w: functional.linear(x, w, bias))


def _embedding(layer: Any, products: Any, tokens: Tensor) -> Tensor:
    weight = products.weight("weight", layer.weight).to(layer.weight.dtype)
    scaled = layer.scale_grad_by_freq
    return functional.embedding(tokens, weight, layer.padding_idx, scale_grad_by_freq=scaled)


def _of_experts(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    axis = -2 if getattr(layer, "is_transposed", False) else -1
    return {name: (axis,) for name, parameter in layer.named_parameters(recurse=False) if parameter.dim() == 3}


def _of_attention(layer: Any) -> dict[str, tuple[int, ...]]:
    own = ("in_proj_weight",) if layer._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return dict.fromkeys((*own, "out_proj.weight"), (-1,))


def _has(layer: nn.Module, *axes: int) -> bool:
    """Whether the layer itself holds floating-point Parameters of these numbers of axes."""
    own = [p for p in layer.parameters(recurse=False) if p.is_floating_point()]
    return all(any(p.dim() == n for p in own) for n in axes)


def _is_transposed_linear(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and "nf" in vars(layer) and layer._parameters.keys() == {"weight", "bias"}


def _is_router(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return type(layer).__name__.endswith(("Router", "Gate")) and weight is not None and weight.dim() == 2


_WEIGHT = {"weight": (-1,)}

KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(lambda _: _WEIGHT, _linear),
    nn.Conv1d: LayerKind(lambda _: {"weight": (2, 1)}, _convolution),
    nn.Conv2d: LayerKind(lambda _: {"weight": (2, 3, 1)}, _convolution),
    nn.Conv3d: LayerKind(lambda _: {"weight": (2, 3, 4, 1)}, _convolution),
    # Encoder layers go past an attention that has one width for queries, keys and values; not past any other.
    nn.MultiheadAttention: LayerKind(_of_attention, attend, {"_qkv_same_embed_dim": False}),
    nn.Embedding: LayerKind(lambda _: _WEIGHT, _embedding, is_lookup=True),
}
"""Kinds by class."""

_BY_LOOK: list[tuple[Callable[[nn.Module], bool], LayerKind]] = [
    (
        lambda layer: (
            type(layer).__name__ == "Conv1D" and {"nf", "weight", "bias"} <= {*vars(layer), *layer._parameters}
        ),
        LayerKind(lambda _: {"weight": (0,)}, _transposed_linear),
    ),
    (lambda layer: type(layer).__name__.endswith("Experts") and _has(layer, 3), LayerKind(_of_experts)),
    (_is_router, LayerKind(lambda _: _WEIGHT)),
]
"""Kinds of classes that only a package that may not be there defines, by their looks."""


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.float32)
