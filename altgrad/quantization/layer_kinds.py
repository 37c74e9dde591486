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
from dataclasses import dataclass, field, replace
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
    own = own_class(layer)
    for base in own.__mro__:
        if base in KINDS:
            kind = KINDS[base]
            # A forward pass of its own is looked into.
            return kind if own.forward is base.forward else replace(kind, forward=intercepted)
    look = look_of(layer)
    return None if look is None else kind_at(look)


def own_class(layer: nn.Module) -> Any:
    """The class that a layer had before it was converted."""
    return getattr(type(layer), "altgrad_class", type(layer))


def look_of(layer: nn.Module) -> int | None:
    """The place of a layer's kind among those that are known by their looks; None for one that its class tells."""
    own = own_class(layer)
    if any(base in KINDS for base in own.__mro__):
        return None
    return next((place for place, (fits, _) in enumerate(_BY_LOOK) if fits(layer, own.__name__)), None)


def kind_at(look: int) -> LayerKind:
    """The kind at a place of `look_of`."""
    return _BY_LOOK[look][1]


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


def _embedding(layer: Any, products: Any, tokens: Tensor) -> Tensor:
    weight = products.weight("weight", layer.weight).to(layer.weight.dtype)
    scaled = layer.scale_grad_by_freq
    return functional.embedding(tokens, weight, layer.padding_idx, scale_grad_by_freq=scaled)


def _of_experts(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of classes that do not say how their weights lie, the summed axes are not known: ()."""
    transposed = getattr(layer, "is_transposed", True if "Llama4" in type(layer).__name__ else None)
    axes = () if transposed is None else ((-2,) if transposed else (-1,))
    return {name: axes for name, parameter in _own_weights(layer).items() if parameter.dim() == 3}


def _own_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    own = layer.named_parameters(recurse=False)
    return {name: p for name, p in own if p.is_floating_point() and "bias" not in name}


def _of_attention(layer: Any) -> dict[str, tuple[int, ...]]:
    is_fused = layer._parameters.get("in_proj_weight") is not None
    own = ("in_proj_weight",) if is_fused else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return dict.fromkeys((*own, "out_proj.weight"), (-1,))


def _is_experts(layer: nn.Module, name: str) -> bool:
    return name.endswith("Experts") and any(p.dim() == 3 for p in _own_weights(layer).values())


def _is_transposed_linear(layer: nn.Module, name: str) -> bool:
    return name == "Conv1D" and "nf" in vars(layer) and layer._parameters.keys() == {"weight", "bias"}


def _is_router(layer: nn.Module, name: str) -> bool:
    chooses = any("expert" in own or "top_k" in own for own in vars(layer))
    weight = layer._parameters.get("weight")
    return name.endswith(("Router", "Gate")) and chooses and weight is not None and weight.dim() == 2


_WEIGHT = {"weight": (-1,)}

KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(lambda _: _WEIGHT),  # of its subclasses with a forward pass of their own
    nn.Conv1d: LayerKind(lambda _: {"weight": (2, 1)}, _convolution),
    nn.Conv2d: LayerKind(lambda _: {"weight": (2, 3, 1)}, _convolution),
    nn.Conv3d: LayerKind(lambda _: {"weight": (2, 3, 4, 1)}, _convolution),
    # Encoder layers go past an attention that has one width for queries, keys and values; not past any other.
    nn.MultiheadAttention: LayerKind(_of_attention, attend, {"_qkv_same_embed_dim": False}),
    nn.Embedding: LayerKind(lambda _: _WEIGHT, _embedding, is_lookup=True),
}
"""Kinds by class."""

_BY_LOOK: list[tuple[Callable[[nn.Module, str], bool], LayerKind]] = [
    (_is_transposed_linear, LayerKind(lambda _: {"weight": (0,)}, _transposed_linear)),
    (_is_experts, LayerKind(_of_experts)),
    (_is_router, LayerKind(lambda _: _WEIGHT)),
]
"""Kinds of classes that only a package that may not be there defines, by their looks and their names."""


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.float32)
