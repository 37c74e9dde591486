"""Layers that compute with quantized numbers, and the one call that puts them into a model.

A linear layer multiplies three times: y = x W^T, dx = g W and dW = g^T x. `QuantizedLinear` rounds the weight
to its format, the input to the activation's and the gradient arriving at its output to the gradient's, and
uses these same numbers in all products: a backward pass through the unrounded weight would train another
network than the one that is evaluated. Products are exact in float32 and its sums stand for the accumulator;
the output is rounded to BF16, what a low-precision GEMM writes. The weight's gradient passes straight through
to the Parameter, which stays the very object the optimizer holds, under its own name.

The weight's scale is the Parameter's `grid_scale` (0-d tensor) where an optimizer has set one: that optimizer
keeps the weights on the grid, and the layer then changes none of them. Otherwise it follows the weight's
current amax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from altgrad.quantization.formats import FORMATS, FloatFormat, get_format
from altgrad.quantization.ops import quantize
from altgrad.quantization.policy import LayerRule, PrecisionPolicy, named_policy
from altgrad.quantization.scaling import format_scale

BF16 = FORMATS["BF16"]


class QuantizedLinear(nn.Module):
    """An nn.Linear in the given formats, sharing its Parameters; None leaves that role in float32."""

    def __init__(
        self,
        linear: nn.Linear,
        *,
        weight: str | FloatFormat,
        activation: str | FloatFormat | None = "BF16",
        gradient: str | FloatFormat | None = "BF16",
    ) -> None:
        super().__init__()
        self.weight_format = get_format(weight)
        self.activation_format = None if activation is None else get_format(activation)
        self.gradient_format = None if gradient is None else get_format(gradient)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._original = (linear,)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        numerics = (self.weight_format, self.activation_format, self.gradient_format)
        return cast(Tensor, _QuantizedProduct.apply(x, self.weight, self.bias, *numerics))

    def quantized_weight(self) -> Tensor:
        """The weight this layer multiplies by, float32, without gradient."""
        return quantized_weight(self.weight, self.weight_format)

    def original(self) -> nn.Linear:
        """The wrapped layer, holding the present Parameters."""
        (linear,) = self._original
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Shapes, then each role's format."""
        return f"{self.in_features} -> {self.out_features}, {self.numerics()}"

    def numerics(self) -> str:
        """Each role's format, as in "E5M2 weight · BF16 activation · BF16 gradient"."""
        roles = {
            "weight": self.weight_format,
            "activation": self.activation_format,
            "gradient": self.gradient_format,
        }
        return " · ".join(f"{_name(fmt)} {role}" for role, fmt in roles.items())


class QuantizedEmbedding(nn.Module):
    """An nn.Embedding tied to a converted linear layer: looks up the same quantized weight."""

    def __init__(self, embedding: nn.Embedding, *, weight: str | FloatFormat) -> None:
        if embedding.max_norm is not None:
            raise ValueError(
                f"max_norm={embedding.max_norm} rewrites the weights on look-up; not with a quantized one"
            )
        super().__init__()
        self.weight_format = get_format(weight)
        self.weight = embedding.weight
        self._original = (embedding,)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., width]; gradient straight through."""
        (embedding,) = self._original
        rows = functional.embedding(
            tokens, self.weight, embedding.padding_idx,
            scale_grad_by_freq=embedding.scale_grad_by_freq, sparse=embedding.sparse,
        )  # fmt: skip
        return quantize(rows, self.weight_format, weight_scale(self.weight, self.weight_format))

    def original(self) -> nn.Embedding:
        """The wrapped layer, holding the present Parameter."""
        (embedding,) = self._original
        embedding.weight = self.weight
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        """Shape and format."""
        rows, width = self.weight.shape
        return f"{rows}, {width}, {self.weight_format.name} weight"


def weight_scale(weight: Tensor, fmt: FloatFormat) -> Tensor:
    """The scale a layer rounds its weight with: the Parameter's `grid_scale`, else the current one; 0-d."""
    own = getattr(weight, "grid_scale", None)
    return format_scale(weight, fmt) if own is None else cast(Tensor, own)


def quantized_weight(weight: Tensor, fmt: FloatFormat) -> Tensor:
    """The weight rounded under its scale, without gradient."""
    return quantize(weight.detach(), fmt, weight_scale(weight, fmt))


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weight_format: FloatFormat,
        activation_format: FloatFormat | None, gradient_format: FloatFormat | None,
    ) -> Tensor:  # fmt: skip
        rounded_weight = quantized_weight(weight, weight_format).to(torch.float32)
        rounded_x = _rounded(x.to(torch.float32), activation_format)
        ctx.save_for_backward(rounded_x, rounded_weight)
        ctx.gradient_format, ctx.dtypes = (
            gradient_format,
            (x.dtype, weight.dtype, None if bias is None else bias.dtype),
        )
        product = functional.linear(
            rounded_x, rounded_weight, None if bias is None else bias.to(torch.float32)
        )
        return (product if activation_format is None else _rounded(product, BF16)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradient = _rounded(gradient.to(torch.float32), ctx.gradient_format)
        rows = gradient.reshape(-1, gradient.shape[-1])
        grad_x = (gradient @ weight).to(x_dtype) if wants_x else None
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight_dtype) if wants_weight else None
        grad_bias = rows.sum(0).to(bias_dtype) if wants_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _rounded(x: Tensor, fmt: FloatFormat | None) -> Tensor:
    """x in the format under its current scale; BF16 by the native cast, which keeps infinities as signals."""
    if fmt is None:
        return x
    if fmt == BF16:
        return x.to(torch.bfloat16).to(torch.float32)
    return quantize(x, fmt, format_scale(x, fmt))


@dataclass(frozen=True)
class ConversionRow:
    """What became of one layer; formats are "" where the layer was skipped or has no such role."""

    name: str
    kind: str
    converted: bool
    weight: str
    activation: str
    gradient: str
    reason: str


class ConversionTable(Sequence[ConversionRow]):
    """Converted and skipped layers in the model's order; prints as an aligned table."""

    def __init__(self, rows: Sequence[ConversionRow]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> ConversionRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ConversionRow]: ...
    def __getitem__(self, index: int | slice) -> ConversionRow | Sequence[ConversionRow]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ConversionRow]:
        return iter(self._rows)

    def __str__(self) -> str:
        header = tuple(field.name for field in fields(ConversionRow))
        body = [tuple(_cell(value) for value in astuple(row)) for row in self._rows]
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in [header, *body]
        )
        return "\n".join(line.rstrip() for line in lines)


def quantize_model(
    model: nn.Module, format: str | FloatFormat | None = None, policy: PrecisionPolicy | str | None = None
) -> ConversionTable:
    """Swaps the model's linear layers, in place, for those a policy asks for; returns what became of each
    layer.

    `format` alone means the policy "uniform"; a policy's name needs the format too. An embedding tied to a
    converted layer is converted with it. ValueError: neither given, a model converted before, a model that is
    itself a layer.
    """
    rules = _policy(format, policy)
    if isinstance(model, nn.Linear | nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} cannot be swapped in place; wrap it in a module, or use QuantizedLinear"
        )
    if any(isinstance(module, QuantizedLinear | QuantizedEmbedding) for module in model.modules()):
        raise ValueError("this model is quantized already; call dequantize_model first")
    swaps: dict[nn.Module, nn.Module] = {}
    rows = {name: _convert_linear(name, module, rules, swaps) for name, module in _layers(model, nn.Linear)}
    formats = {
        id(new.weight): new.weight_format for new in swaps.values() if isinstance(new, QuantizedLinear)
    }
    rows |= {
        name: _convert_embedding(name, module, formats, swaps)
        for name, module in _layers(model, nn.Embedding)
    }
    others = {
        name: _skipped(name, module, "not a linear layer")
        for name, module in _layers(model, nn.Module)
        if name not in rows and next(module.parameters(recurse=False), None) is not None
    }
    ordered = [(rows | others)[name] for name, _ in model.named_modules() if name in rows or name in others]
    _swap(model, swaps)
    return ConversionTable(ordered)


def dequantize_model(model: nn.Module) -> None:
    """Puts the original layers back, in place, with the present Parameters."""
    converted: dict[nn.Module, nn.Module] = {
        m: m.original() for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)
    }
    _swap(model, converted)


def quantized_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, FloatFormat]]:
    """Layer name to (weight, format) of each converted layer; a tied weight once, by its linear layer."""
    found: dict[nn.Parameter, tuple[str, FloatFormat]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found.setdefault(cast(nn.Parameter, module.weight), (name, module.weight_format))
    return {name: (parameter, fmt) for parameter, (name, fmt) in found.items()}


def _policy(format: str | FloatFormat | None, policy: PrecisionPolicy | str | None) -> PrecisionPolicy:
    if isinstance(policy, PrecisionPolicy):
        if format is not None:
            raise ValueError(
                f"a PrecisionPolicy says every format by itself; format={format!r} has no meaning beside it"
            )
        return policy
    if format is None:
        raise ValueError("quantize_model needs format='E5M2', or policy=PrecisionPolicy(...)")
    return named_policy(policy or "uniform", format.name if isinstance(format, FloatFormat) else format)


def _layers(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def _convert_linear(
    name: str, linear: nn.Linear, policy: PrecisionPolicy, swaps: dict[nn.Module, nn.Module]
) -> ConversionRow:
    if type(linear) is not nn.Linear:
        return _skipped(name, linear, "a subclass of Linear, with a forward pass of its own")
    rule = policy.resolve(name)
    if rule is None:
        return _skipped(name, linear, "no rule matches its name")
    new = QuantizedLinear(
        linear, weight=rule.weight or BF16, activation=rule.activation, gradient=rule.gradient
    )
    swaps[linear] = new
    roles = (new.weight_format, new.activation_format, new.gradient_format)
    return ConversionRow(
        name, "Linear", True, _name(roles[0]), _name(roles[1]), _name(roles[2]), _rule_text(rule)
    )


def _convert_embedding(
    name: str, embedding: nn.Embedding, formats: dict[int, FloatFormat], swaps: dict[nn.Module, nn.Module]
) -> ConversionRow:
    fmt = formats.get(id(embedding.weight))
    if fmt is None:
        return _skipped(name, embedding, "an embedding whose weight no converted layer shares")
    swaps[embedding] = QuantizedEmbedding(embedding, weight=fmt)
    return ConversionRow(
        name, type(embedding).__name__, True, fmt.name, "", "", "its weight is a converted layer's"
    )


def _rule_text(rule: LayerRule) -> str:
    where = f"rule {rule.pattern!r}" if rule.pattern else "rule for every layer"
    return where if rule.weight else f"{where} keeps BF16"


def _skipped(name: str, module: nn.Module, reason: str) -> ConversionRow:
    return ConversionRow(name, type(module).__name__, False, "", "", "", reason)


def _swap(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in swaps:
                setattr(parent, child_name, swaps[child].train(child.training))


def _name(fmt: FloatFormat | None) -> str:
    return "FP32" if fmt is None else fmt.name


def _cell(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
