"""Putting quantized layers into a model and taking them out again, once, before the training loop.

The swap is in place, keeps every Parameter object and its name (so tied weights stay tied and an optimizer built
before or after sees the same ones), and returns the table of what became of each layer, with the reason where one was
left as it was. What share of the model's parameters is quantized stands below it; where a layer that could have been
converted was left, a warning says so.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, cast, overload

from torch import nn

from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.layer_kinds import kind_of, weights_of
from altgrad.quantization.layers import QuantizedEmbedding, QuantizedLinear, obstacle
from altgrad.quantization.ops import mix_seed
from altgrad.quantization.policy import LayerRule, PrecisionPolicy, named_policy
from altgrad.quantization.products import Product
from altgrad.quantization.roles import Role
from altgrad.quantization.weight_roles import WeightRoles
from altgrad.quantization.wrapped_layers import QuantizedLayer

CONVERTED = (QuantizedLinear, QuantizedEmbedding, QuantizedLayer)


@dataclass(frozen=True)
class ConversionRow:
    """What became of one weight; formats are "" where it was skipped or has no such role."""

    name: str
    kind: str
    converted: bool
    weight: str
    activation: str
    gradient: str
    parameters: int
    reason: str


class ConversionTable(Sequence[ConversionRow]):
    """Converted and skipped layers in the model's order; prints as an aligned table, at a prompt by itself."""

    def __init__(self, rows: Sequence[ConversionRow], quantized: int = 0, convertible: int = 0, total: int = 0) -> None:
        self._rows = tuple(rows)
        self.quantized, self.convertible, self.total = quantized, convertible, total

    @property
    def share(self) -> float:
        """Quantized parameters over all of the model's."""
        return self.quantized / self.total if self.total else 0.0

    @property
    def product_share(self) -> float:
        """Quantized parameters over those that layers known to AltGrad multiply by."""
        return self.quantized / self.convertible if self.convertible else 0.0

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
        count = f"{sum(row.converted for row in self._rows)} of {len(self._rows)} layers converted, {self.summary()}"
        return "\n".join([*(line.rstrip() for line in lines), count])

    __repr__ = __str__

    def summary(self) -> str:
        """The shares, in words."""
        return (
            f"{self.share:.1%} of {self.total} parameters quantized "
            f"({self.product_share:.1%} of those in matrix products and convolutions)"
        )


def quantize_model(
    model: nn.Module,
    format: str | FloatFormat | None = None,
    policy: PrecisionPolicy | str | None = None,
    *,
    product: Product = "auto",
    seed: int = 0,
) -> ConversionTable:
    """Swaps the model's layers, in place, for those a policy asks for; returns what became of each.

    Converted are linear layers, convolutions, attentions, experts, routers and what `register_layer` was told of.
    `format` alone means the policy "uniform"; a policy's name needs the format too. An embedding tied to a converted
    layer is converted with it, any other where the policy says `embeddings`. `product` is the linear layers' (see
    `QuantizedLinear`); `seed` keys stochastic roles, each layer's by its place.

    ValueError: neither given, a rule that matches no layer, a model converted before, a model that is itself a layer.
    UserWarning: a layer that could be converted was left.
    """
    rules = _policy(format, policy)
    if kind_of(model) is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be swapped in place; wrap it in a module, or use QuantizedLinear"
        )
    if any(isinstance(module, CONVERTED) for module in model.modules()):
        raise ValueError("this model is quantized already; call dequantize_model first")
    conversion = _Conversion(model, rules, product, seed)
    conversion.check_rules()
    table = conversion.table()
    _swap(model, conversion.swaps)
    if conversion.left and rules.rules:
        warnings.warn(f"{table.summary()}; left: {_some(conversion.left)}", stacklevel=2)
    return table


def dequantize_model(model: nn.Module) -> None:
    """Puts the original layers back, in place, with the present Parameters."""
    converted = {module: module.original() for module in model.modules() if isinstance(module, CONVERTED)}
    _swap(model, cast(dict[nn.Module, nn.Module], converted))


def requantize_layer(model: nn.Module, name: str, format: str) -> None:
    """Moves one converted weight, and an embedding tied to it, to another format; "FP32" leaves it unquantized.

    Every role that had the weight's format takes the new one. The weight belongs to no grid until an optimizer places
    it on one again. ValueError where `name` is no converted layer (or weight of one that has several).
    """
    found = rounded_weights(model)
    if name not in found:
        raise ValueError(f"{name!r} is no converted layer; those are {', '.join(found) or 'none'}")
    roles = found[name]
    if format.upper() != "FP32":
        roles.reformat(format)
        return
    layer = next(m for m in model.modules() if roles in getattr(m, "rounded_weights", {}).values())
    weight = roles.parameter()
    if len(layer.rounded_weights) > 1:
        roles.grid.release()
        layer.rounded_weights = {path: other for path, other in layer.rounded_weights.items() if other is not roles}
        return
    tied: dict[nn.Module, nn.Module] = {
        m: m.original() for m in model.modules() if isinstance(m, QuantizedEmbedding) and m.weight is weight
    }
    _swap(model, {layer: layer.original(), **tied})


def rounded_weights(model: nn.Module) -> dict[str, WeightRoles]:
    """The roles of each weight of converted layers, by layer; of a layer with several, by layer and weight."""
    return {
        _name_of(name, path): roles
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedLayer)
        for path, roles in module.rounded_weights.items()
    }


def quantized_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, FloatFormat]]:
    """Name to (weight, format) of each converted weight; a tied one once, by the layer that multiplies by it."""
    found: dict[nn.Parameter, tuple[str, FloatFormat]] = {}
    for name, roles in rounded_weights(model).items():
        weight = cast(nn.Parameter, getattr(roles.holder, roles.weight_name))
        found.setdefault(weight, (name, roles.weight_format))
    return {name: (parameter, fmt) for parameter, (name, fmt) in found.items()}


class _Conversion:
    """What becomes of each layer of a model, decided before any is swapped."""

    def __init__(self, model: nn.Module, policy: PrecisionPolicy, product: Product, seed: int) -> None:
        self._model, self._policy, self._product, self._seed = model, policy, product, seed
        self.swaps: dict[nn.Module, nn.Module] = {}
        self._rows: dict[str, ConversionRow] = {}
        self._convertible: dict[str, tuple[nn.Parameter | None, bool]] = {}
        self._layers = dict(model.named_modules())
        inside = {part for layer in self._layers.values() for part in _parts_with_weights(layer)}
        self._known = {
            name: layer for name, layer in self._layers.items() if kind_of(layer) is not None and layer not in inside
        }
        self._places = {
            layer: place for place, layer in enumerate(m for m in self._layers.values() if isinstance(m, nn.Linear))
        }
        multiplying = {n: m for n, m in self._known.items() if not _kind(m).is_lookup}
        for name, layer in multiplying.items():
            self._convert(name, layer)
        self._leave_bypassed()
        owners = {id(new.weight): new for new in self.swaps.values() if isinstance(new, QuantizedLinear)}
        for name, layer in self._known.items():
            if name not in multiplying:
                self._convert_embedding(name, cast(nn.Embedding, layer), owners)
        for name, layer in self._layers.items():
            is_new = layer not in self._known.values() and layer not in inside
            if is_new and next(layer.parameters(recurse=False), None) is not None:
                self._skip(name, layer, "not a layer that multiplies by a weight, as far as is known (register_layer)")

    def check_rules(self) -> None:
        """ValueError for a rule whose pattern is found in no layer's name."""
        names = [
            _name_of(name, path)
            for name, layer in self._known.items()
            if self._policy.embeddings or not _kind(layer).is_lookup
            for path in weights_of(layer)
        ]
        for rule in self._policy.rules if names else ():
            if not any(rule.matches(name) for name in names):
                near = difflib.get_close_matches(re.sub(r"[\\^$()|?*+\[\]]", "", rule.pattern), names, n=3, cutoff=0.3)
                raise ValueError(
                    f"rule {rule.pattern!r} matches no layer of this model; "
                    f"{'nearest: ' + ', '.join(near) if near else 'its layers are ' + _some(names)}"
                )

    @property
    def left(self) -> list[str]:
        """Names of weights that could have been converted and were not, largest first."""
        found = {n: self._rows[n] for n, (_, is_quantized) in self._convertible.items() if not is_quantized}
        sized = sorted((row for row in found.values() if not row.converted), key=lambda row: -row.parameters)
        return [f"{row.name} ({row.reason})" for row in sized]

    def table(self) -> ConversionTable:
        """The rows in the model's order, with what they sum up to."""
        order = {name: place for place, name in enumerate(self._layers)}  # "" is the model
        rows = sorted(
            self._rows.items(), key=lambda item: order[item[0]] if item[0] in order else order[_owner(item[0], order)]
        )
        convertible = {p: is_quantized for p, is_quantized in self._convertible.values() if p is not None}
        return ConversionTable(
            [row for _, row in rows],
            sum(p.numel() for p, is_quantized in convertible.items() if is_quantized),
            sum(p.numel() for p in convertible),
            sum(p.numel() for p in self._model.parameters()),
        )

    def _convert(self, name: str, layer: nn.Module) -> None:
        weights = weights_of(layer)
        reason = obstacle(layer, weights)
        rules: dict[str, LayerRule] = {}
        for path in weights:
            own = _name_of(name, path)
            parameter = _parameter(layer, path)
            rule = self._policy.resolve(own)
            if rule is None or reason is not None:
                self._skip(own, layer, reason if rule is not None and reason else "no rule matches its name", parameter)
                self._convertible[own] = parameter, False
                continue
            rules[path] = rule
            self._take(own, layer, rule, parameter)
            self._convertible[own] = parameter, rule.weight is not None
        if rules:
            self.swaps[layer] = self._converted(layer, rules)

    def _converted(self, layer: nn.Module, rules: dict[str, LayerRule]) -> nn.Module:
        if isinstance(layer, nn.Linear):
            key = mix_seed(self._seed, self._places[layer])
            if type(layer).forward is nn.Linear.forward:
                (rule,) = rules.values()
                roles = {"activation": rule.activation, "gradient": rule.gradient}
                return QuantizedLinear(
                    layer, weight=rule.weight or Role(format="BF16"), **roles, product=self._product, key=key
                )
            return QuantizedLayer(layer, rules, key)
        return QuantizedLayer(layer, rules, mix_seed(self._seed, 1, len(self.swaps)))

    def _leave_bypassed(self) -> None:
        """An encoder layer of torch reads its weights past its layers, unless its attention is converted."""
        for encoder in self._layers.values():
            if isinstance(encoder, nn.TransformerEncoderLayer) and encoder.self_attn not in self.swaps:
                for name, layer in self._known.items():
                    if layer in encoder.children() and self.swaps.pop(layer, None) is not None:
                        reason = "TransformerEncoderLayer's fast path reads its weight past the layer"
                        self._skip(name, layer, f"{reason}; convert its self_attn too", layer.weight)  # type: ignore[arg-type]
                        self._convertible[name] = cast(nn.Parameter, layer.weight), False

    def _convert_embedding(self, name: str, embedding: nn.Embedding, owners: dict[int, QuantizedLinear]) -> None:
        owner = owners.get(id(embedding.weight))
        rule = self._policy.resolve(name) if self._policy.embeddings else None
        if owner is None and rule is None:
            self._skip(name, embedding, "an embedding whose weight no converted layer shares", embedding.weight)
            return
        if (reason := obstacle(embedding) or _lookup_obstacle(embedding)) is not None:
            if owner is not None:
                raise ValueError(f"{name} shares its weight with a converted layer and cannot be converted: {reason}")
            self._skip(name, embedding, reason, embedding.weight)
            self._convertible[name] = embedding.weight, False
            return
        if owner is not None:
            self.swaps[embedding] = QuantizedEmbedding(embedding, owner)
            weight = str(owner.weight_quantizer.role)
            count = embedding.weight.numel()
            self._rows[name] = ConversionRow(
                name, type(embedding).__name__, True, weight, "", "", count, "its weight is a converted layer's"
            )
            return
        assert rule is not None
        own = rule.model_copy(update={"activation": None, "gradient": None})
        self.swaps[embedding] = QuantizedLayer(embedding, {"weight": own}, mix_seed(self._seed, 2, len(self.swaps)))
        self._take(name, embedding, own, embedding.weight)
        self._convertible[name] = embedding.weight, rule.weight is not None

    def _take(self, name: str, layer: nn.Module, rule: LayerRule, parameter: nn.Parameter | None) -> None:
        roles = (rule.weight or Role(format="BF16"), rule.activation, rule.gradient)
        texts = ("", "") if _kind(layer).is_lookup else tuple(str(role or "FP32") for role in roles[1:])
        count = 0 if parameter is None else parameter.numel()
        kind = type(layer).__name__
        self._rows[name] = ConversionRow(name, kind, True, str(roles[0]), *texts, count, _rule_text(rule))

    def _skip(self, name: str, layer: nn.Module, reason: str, parameter: nn.Parameter | None = None) -> None:
        own = layer.parameters(recurse=False) if parameter is None else [parameter]
        count = sum(p.numel() for p in own)
        self._rows[name] = ConversionRow(name, type(layer).__name__, False, "", "", "", count, reason)


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


def _kind(layer: nn.Module) -> Any:
    kind = kind_of(layer)
    assert kind is not None
    return kind


def _name_of(layer: str, path: str) -> str:
    """What rules, signals and tables call a weight: its layer, and its own name where it has one of its own."""
    own = path.removesuffix("weight").rstrip("._")
    return ".".join(part for part in (layer, own) if part)


def _owner(name: str, order: Iterable[str]) -> str:
    """The layer of a weight, which may have a name of its own."""
    return max((layer for layer in order if f"{name}.".startswith(f"{layer}.")), key=len, default="")


def _parts_with_weights(layer: nn.Module) -> list[nn.Module]:
    """Modules inside a layer of several weights that hold some of these."""
    ways = (path.rpartition(".")[0] for path in weights_of(layer))
    return [layer.get_submodule(way) for way in ways if way]


def _parameter(layer: nn.Module, path: str) -> nn.Parameter | None:
    way, _, name = path.rpartition(".")
    return layer.get_submodule(way)._parameters.get(name)


def _lookup_obstacle(embedding: nn.Embedding) -> str | None:
    if embedding.max_norm is not None:
        return f"max_norm={embedding.max_norm} rewrites the weights on look-up"
    return "sparse=True: a quantized embedding has a dense gradient" if embedding.sparse else None


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _rule_text(rule: LayerRule) -> str:
    where = f"rule {rule.pattern!r}" if rule.pattern else "rule for every layer"
    return where if rule.weight else f"{where} keeps BF16"


def _swap(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in swaps:
                setattr(parent, child_name, swaps[child].train(child.training))


def _cell(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
