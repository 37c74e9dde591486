"""Putting quantized layers into a model and taking them out again, once, before the training loop.

The swap is in place, keeps every Parameter object and its name (so tied weights stay tied and an optimizer built
before or after sees the same ones), and returns the table of what became of each layer, with the reason where one was
left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, cast, overload

from torch import nn

from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.layers import QuantizedEmbedding, QuantizedLinear, obstacle
from altgrad.quantization.ops import mix_seed
from altgrad.quantization.policy import LayerRule, PrecisionPolicy, named_policy
from altgrad.quantization.products import Product
from altgrad.quantization.roles import Role


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
    """Converted and skipped layers in the model's order; prints as an aligned table, at a prompt by itself."""

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
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *body]
        )
        count = f"{sum(row.converted for row in self._rows)} of {len(self._rows)} layers converted"
        return "\n".join([*(line.rstrip() for line in lines), count])

    __repr__ = __str__


def quantize_model(
    model: nn.Module,
    format: str | FloatFormat | None = None,
    policy: PrecisionPolicy | str | None = None,
    *,
    product: Product = "auto",
    seed: int = 0,
) -> ConversionTable:
    """Swaps the model's linear layers, in place, for those a policy asks for; returns what became of each layer.

    `format` alone means the policy "uniform"; a policy's name needs the format too. An embedding tied to a converted
    layer is converted with it. `product` is the layers' (see `QuantizedLinear`); `seed` keys stochastic roles, each
    layer's by its place. ValueError: neither given, a model converted before, a model that is itself a layer.
    """
    rules = _policy(format, policy)
    if isinstance(model, nn.Linear | nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} cannot be swapped in place; wrap it in a module, or use QuantizedLinear"
        )
    if any(isinstance(module, QuantizedLinear | QuantizedEmbedding) for module in model.modules()):
        raise ValueError("this model is quantized already; call dequantize_model first")
    swaps: dict[nn.Module, nn.Module] = {}
    rows: dict[str, ConversionRow] = {}
    encoders = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    bypassed = {child for encoder in encoders for child in encoder.children()}
    for place, (name, linear) in enumerate(_layers(model, nn.Linear)):
        if linear in bypassed:
            rows[name] = _skipped(name, linear, "TransformerEncoderLayer's fast path reads its weight past the layer")
            continue
        rows[name], new = _convert_linear(name, linear, rules, product, mix_seed(seed, place))
        if new is not None:
            swaps[linear] = new
    owners = {id(new.weight): new for new in swaps.values() if isinstance(new, QuantizedLinear)}
    rows |= {name: _convert_embedding(name, module, owners, swaps) for name, module in _layers(model, nn.Embedding)}
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


def requantize_layer(model: nn.Module, name: str, format: str) -> None:
    """Moves one converted layer, and an embedding tied to it, to another format; "FP32" puts the originals back.

    Every role that had the weight's format takes the new one. The weight belongs to no grid until an optimizer places
    it on one again. ValueError where `name` is no converted layer.
    """
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, QuantizedLinear):
        converted = ", ".join(n for n, m in model.named_modules() if isinstance(m, QuantizedLinear))
        raise ValueError(f"{name!r} is no converted layer; those are {converted or 'none'}")
    if format.upper() != "FP32":
        layer.reformat(format)
        return
    tied: dict[nn.Module, nn.Module] = {
        m: m.original() for m in model.modules() if isinstance(m, QuantizedEmbedding) and m.weight is layer.weight
    }
    _swap(model, {layer: layer.original(), **tied})


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
    name: str, linear: nn.Linear, policy: PrecisionPolicy, product: Product, key: int
) -> tuple[ConversionRow, QuantizedLinear | None]:
    rule = policy.resolve(name)
    if rule is None:
        return _skipped(name, linear, "no rule matches its name"), None
    if (reason := obstacle(linear)) is not None:
        return _skipped(name, linear, reason), None
    if type(linear) is not nn.Linear:
        return _skipped(name, linear, "a subclass of Linear, with a forward pass of its own"), None
    weight = rule.weight or Role(format="BF16")
    roles = {"weight": weight, "activation": rule.activation, "gradient": rule.gradient}
    new = QuantizedLinear(linear, **roles, product=product, key=key)  # type: ignore[arg-type]
    names = {role: str(value or "FP32") for role, value in roles.items()}
    return ConversionRow(name, "Linear", True, **names, reason=_rule_text(rule)), new


def _convert_embedding(
    name: str, embedding: nn.Embedding, owners: dict[int, QuantizedLinear], swaps: dict[nn.Module, nn.Module]
) -> ConversionRow:
    owner = owners.get(id(embedding.weight))
    if owner is None:
        return _skipped(name, embedding, "an embedding whose weight no converted layer shares")
    if (reason := obstacle(embedding)) is not None:
        raise ValueError(f"{name} shares its weight with a converted layer and cannot be converted: {reason}")
    swaps[embedding] = QuantizedEmbedding(embedding, owner)
    weight = str(owner.weight_quantizer.role)
    return ConversionRow(name, type(embedding).__name__, True, weight, "", "", "its weight is a converted layer's")


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


def _cell(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
