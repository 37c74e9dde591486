"""The forward pass of nn.MultiheadAttention in quantized roles.

torch's own computes the input projections from one fused Parameter within a function that cannot be looked into, so it
is written out here: project, split into heads, attend, project. The products of attention itself, which have no
weights, stay as they are. Arguments, shapes and results are torch's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def attend(
    layer: Any,
    products: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As nn.MultiheadAttention(...)(query, key, value, ...); `layer` is one, `products` multiply in its roles."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # torch's own words
    is_batched = query.dim() == 3
    is_self = key is query and value is key
    if not is_batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif layer.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = _project(layer, products, query, key, value, is_self)
    mask = _joined(layer, attn_mask, key_padding_mask, q, k)
    if layer.bias_k is not None:
        repeated = (bias.expand(1, k.shape[1], -1) for bias in (layer.bias_k, layer.bias_v))
        k, v = (torch.cat([x, more.to(x.dtype)]) for x, more in zip((k, v), repeated, strict=True))
    q, k, v = (_heads(x, layer.num_heads) for x in (q, k, v))
    if layer.add_zero_attn:
        k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    if mask is not None and (added := k.shape[2] - mask.shape[-1]):
        mask = functional.pad(mask, (0, added))  # what was added may always be attended to
    dropout = layer.dropout if layer.training else 0.0
    weights = None
    if need_weights:
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = (logits if mask is None else logits + mask).softmax(-1)
        weights = functional.dropout(weights, dropout) if dropout else weights
        y = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if is_batched else weights.squeeze(0)
    else:
        y = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
    y = y.permute(2, 0, 1, 3).flatten(2)  # [length, batch, width]
    y = _multiplied(products, "out_proj.weight", y, layer.out_proj.weight, layer.out_proj.bias)
    if not is_batched:
        return y.squeeze(1), weights
    return y.transpose(0, 1) if layer.batch_first else y, weights


def _project(
    layer: Any, products: Any, query: Tensor, key: Tensor, value: Tensor, is_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [length, batch, width] each."""
    bias = layer.in_proj_bias
    if layer.in_proj_weight is None:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        named = zip(("q", "k", "v"), (query, key, value), biases, strict=True)
        q, k, v = (
            _multiplied(products, f"{n}_proj_weight", x, getattr(layer, f"{n}_proj_weight"), b) for n, x, b in named
        )
        return q, k, v
    path, weight = "in_proj_weight", layer.in_proj_weight
    if is_self:
        q, k, v = _multiplied(products, path, query, weight, bias).chunk(3, -1)
        return q, k, v
    rounded = products.weight(path, weight)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    q, k, v = (
        _multiply(products, path, x, w, b)
        for x, w, b in zip((query, key, value), rounded.chunk(3), biases, strict=True)
    )
    return q, k, v


def _multiplied(products: Any, path: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _multiply(products, path, x, products.weight(path, weight), bias)


def _multiply(products: Any, path: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    def linear(x: Tensor, weight: Tensor) -> Any:
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    y: Tensor = products.multiply(path, x, weight, linear)
    return y


def _heads(x: Tensor, heads: int) -> Tensor:
    """[length, batch, width] -> [batch, heads, length, width of a head]."""
    parts: Tensor = x.unflatten(-1, (heads, -1))
    return parts.permute(1, 2, 0, 3)


def _joined(
    layer: Any, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """Both masks as one that is added to the logits, broadcast to [batch, heads, queries, keys]; True is -inf."""
    (queries, batch, _), keys = q.shape, k.shape[0]
    _check_mask("attn_mask", attn_mask, (queries, keys), (batch * layer.num_heads, queries, keys))
    _check_mask("key_padding_mask", key_padding_mask, (batch, keys))
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        if mask.dim() == 3:
            mask = mask.unflatten(0, (q.shape[1], layer.num_heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if tuple(mask.shape) not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point()):
        allowed = " or ".join(map(str, shapes))
        raise RuntimeError(
            f"{name} of shape {tuple(mask.shape)} and {mask.dtype}: bool or floating point of {allowed} is expected"
        )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    return mask.to(dtype)
