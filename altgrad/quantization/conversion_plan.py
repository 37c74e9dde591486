"""What is to become of each layer of a model under a policy: decided for all of them, before any is touched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from altgrad.quantization.conversion_table import ConversionRow, ConversionTable
from altgrad.quantization.layer_kinds import kind_of, weights_of
from altgrad.quantization.layers import obstacle as obstacle_of
from altgrad.quantization.policy import LayerRule, PrecisionPolicy
from altgrad.quantization.roles import Role

BF16_WEIGHT = Role(format="BF16")
"""The role of a weight that a rule keeps in BF16."""

UNTIED = "an embedding whose weight no converted layer shares"
BYPASSED = "TransformerEncoderLayer's fast path reads its weight past the layer, unless its self_attn is converted"

NO_PRODUCT = re.compile("pos|embed|token|norm|query", re.IGNORECASE)
"""Names of parameters that have two axes or more and are multiplied by nothing: positions, extra tokens, queries."""


@dataclass(frozen=True)
class PlannedWeight:
    """A weight, the rule that it takes or the reason why it is left; `owner`: the layer whose weight it shares."""

    name: str
    layer: nn.Module
    path: str
    rule: LayerRule | None
    reason: str
    owner: nn.Module | None = None
    is_known: bool = True

    @property
    def is_lookup(self) -> bool:
        """Whether rows of it are looked up."""
        kind = kind_of(self.layer)
        return kind is not None and kind.is_lookup

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The Parameter, or what it is made from; of a layer that is not known all that it has."""
        if not self.is_known:
            return list(self.layer.parameters(recurse=False))
        way, _, name = self.path.rpartition(".")
        own = self.layer.get_submodule(way)._parameters
        found: tuple[Tensor | None, ...] = (own.get(name), own.get(f"{name}_orig"), own.get(f"{name}_v"))
        return [p for p in found if p is not None][:1]

    def row(self) -> ConversionRow:
        """The weight in the table."""
        kind, count = type(self.layer).__name__, sum(p.numel() for p in self.tensors)
        if self.rule is None:
            return ConversionRow(self.name, kind, False, "", "", "", count, self.reason)
        beside = (self.rule.activation, self.rule.gradient)
        activation, gradient = ("" if self.is_lookup else str(role or "FP32") for role in beside)
        weight = str(self.rule.weight or BF16_WEIGHT)
        return ConversionRow(self.name, kind, True, weight, activation, gradient, count, self.reason)


class ConversionPlan:
    """`weights`: what is decided, in the model's order. ValueError for a rule that matches no layer."""

    def __init__(self, model: nn.Module, policy: PrecisionPolicy) -> None:
        self._model, self._policy = model, policy
        layers = dict(model.named_modules())
        parts = {part for layer in layers.values() for part in _parts_with_weights(layer)}
        known = {n: m for n, m in layers.items() if m not in parts and kind_of(m) is not None}
        self._check_rules(known)
        weights = [self._decide(name, layer, path) for name, layer in known.items() for path in weights_of(layer)]
        weights = self._without_bypassed(weights, list(layers.values()))
        owners = {id(p): w for w in weights if w.rule is not None and not w.is_lookup for p in w.tensors}
        weights = [self._tied(w, owners.get(id(w.tensors[0]))) if w.is_lookup and w.tensors else w for w in weights]
        covered = parts | set(known.values())
        others = [
            PlannedWeight(name, layer, "", None, "no product with its parameters is known", is_known=False)
            for name, layer in layers.items()
            if layer not in covered and any(True for _ in layer.parameters(recurse=False))
        ]
        place = {layer: number for number, layer in enumerate(layers.values())}
        self.weights = sorted([*weights, *others], key=lambda w: place[w.layer])

    def table(self) -> ConversionTable:
        """The weights as rows, and what they sum up to."""
        multiplied = [w for w in self.weights if w.is_known and (not w.is_lookup or w.rule is not None)]
        convertible = {p: 0 for w in multiplied for p in w.tensors}
        quantized = {p for w in multiplied if w.rule is not None and w.rule.weight is not None for p in w.tensors}
        return ConversionTable(
            [w.row() for w in self.weights],
            sum(p.numel() for p in quantized),
            sum(p.numel() for p in convertible),
            sum(p.numel() for p in self._model.parameters()),
        )

    def left(self) -> list[str]:
        """What could have been converted, or may have to be made known, and was left; the largest first."""
        found = [
            w
            for w in self.weights
            if w.rule is None and (self._policy.embeddings if w.is_lookup else w.is_known or _may_multiply(w.layer))
        ]
        found.sort(key=lambda w: -sum(p.numel() for p in w.tensors))
        return [f"{w.name} ({type(w.layer).__name__}: {w.reason})" for w in found]

    def _check_rules(self, known: dict[str, nn.Module]) -> None:
        names = [
            name_of(name, path)
            for name, layer in known.items()
            if self._policy.embeddings or not _is_lookup(layer)
            for path in weights_of(layer)
        ]
        for rule in self._policy.rules if names else ():
            if not any(rule.matches(name) for name in names):
                plain = re.sub(r"[\\^$()|?*+\[\]]", "", rule.pattern)
                near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3)
                hint = f"nearest: {', '.join(near)}" if near else f"its layers are {some(names)}"
                raise ValueError(f"rule {rule.pattern!r} matches no layer of this model; {hint}")

    def _decide(self, layer_name: str, layer: nn.Module, path: str) -> PlannedWeight:
        name = name_of(layer_name, path)
        is_lookup = _is_lookup(layer)
        rule = None if is_lookup and not self._policy.embeddings else self._policy.resolve(name)
        if rule is None:
            reason = UNTIED if is_lookup else "no rule matches its name"
            return PlannedWeight(name, layer, path, None, reason)
        if (obstacle := _obstacle(layer)) is not None:
            return PlannedWeight(name, layer, path, None, obstacle)
        if is_lookup:
            rule = rule.model_copy(update={"activation": None, "gradient": None})
        return PlannedWeight(name, layer, path, rule, _text(rule))

    @staticmethod
    def _without_bypassed(weights: list[PlannedWeight], layers: list[nn.Module]) -> list[PlannedWeight]:
        """An encoder layer of torch reads its weights past its layers, unless its attention is converted."""
        converted = {w.layer for w in weights if w.rule is not None}
        bypassed = {
            child
            for layer in layers
            if isinstance(layer, nn.TransformerEncoderLayer) and layer.self_attn not in converted
            for child in layer.children()
        }
        return [replace(w, rule=None, reason=BYPASSED) if w.layer in bypassed and w.rule else w for w in weights]

    @staticmethod
    def _tied(weight: PlannedWeight, owner: PlannedWeight | None) -> PlannedWeight:
        """An embedding goes with the layer that multiplies by its weight."""
        if owner is None or owner.rule is None:
            return weight
        if (reason := _obstacle(weight.layer)) is not None:
            raise ValueError(
                f"{weight.name} shares its weight with a converted layer and cannot be converted: {reason}"
            )
        rule = owner.rule.model_copy(update={"activation": None, "gradient": None})
        return replace(weight, rule=rule, owner=owner.layer, reason="its weight is a converted layer's")


def name_of(layer: str, path: str) -> str:
    """What rules, signals and tables call a weight: its layer, and its own name where that is not "weight"."""
    own = path.removesuffix("weight").rstrip("._")
    return ".".join(part for part in (layer, own) if part)


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _is_lookup(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    return kind is not None and kind.is_lookup


def _obstacle(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"max_norm={layer.max_norm} rewrites the weights on look-up"
    if isinstance(layer, nn.Embedding) and layer.sparse:
        return "sparse=True: a quantized embedding has a dense gradient"
    return obstacle_of(layer, weights_of(layer))


def _may_multiply(layer: nn.Module) -> bool:
    """Whether a layer that is not known has matrices that look like weights of products."""
    return any(
        sum(length > 1 for length in p.shape) > 1 and not NO_PRODUCT.search(f"{type(layer).__name__} {name}")
        for name, p in layer.named_parameters(recurse=False)
    )


def _parts_with_weights(layer: nn.Module) -> list[nn.Module]:
    """Modules inside a layer of several weights that hold some of these."""
    ways = (path.rpartition(".")[0] for path in weights_of(layer))
    return [layer.get_submodule(way) for way in ways if way]


def _text(rule: LayerRule) -> str:
    where = f"rule {rule.pattern!r}" if rule.pattern else "rule for every layer"
    return where if rule.weight else f"{where} keeps BF16"
