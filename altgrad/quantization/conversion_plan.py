"""What is to become of each layer of a model under a policy: decided for all of them, before any is touched."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from altgrad.quantization.conversion_table import ConversionRow, ConversionTable
from altgrad.quantization.interception import intercepted
from altgrad.quantization.layer_kinds import kind_of, weights_of
from altgrad.quantization.layers import obstacle as obstacle_of
from altgrad.quantization.policy import LayerRule, PrecisionPolicy
from altgrad.quantization.roles import Role
from altgrad.quantization.weight_roles import BY_LINES

BF16_WEIGHT = Role(format="BF16")
"""The role of a weight that a rule keeps in BF16."""

UNTIED = "an embedding whose weight no converted layer shares"
BYPASSED = "TransformerEncoderLayer's fast path reads its weight past the layer, unless its self_attn is converted"

AXES = (
    "these scales lie along the axis that is summed over, which is not known of its class (register_layer, contracted)"
)
OWN_FORWARD = "a subclass of MultiheadAttention with a forward pass of its own; see register_layer"

NO_PRODUCT = re.compile(r"(^|_)(pos|positions?|positional|embed|embeddings?|cls|tokens?|query|queries)(_|$)")
"""Names of parameters that have two axes or more and are multiplied by nothing: positions, extra tokens, queries."""


@dataclass(frozen=True)
class PlannedWeight:
    """A weight, the rule that it takes or the reason why it is left; `owner`: the weight of a layer that it shares."""

    name: str
    layer: nn.Module
    path: str
    rule: LayerRule | None
    reason: str
    owner: PlannedWeight | None = None
    is_known: bool = True
    is_asked: bool = False
    """Whether a rule leaves it."""

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
        holder = self.layer.get_submodule(way)
        if parametrize.is_parametrized(holder, name):
            return list(holder.parametrizations[name].parameters(recurse=False))  # type: ignore[index, union-attr]
        own = holder._parameters
        found: tuple[Tensor | None, ...] = (own.get(name), own.get(f"{name}_orig"), own.get(f"{name}_v"))
        return [p for p in found if p is not None][:1]

    @property
    def size(self) -> int:
        """Elements, as far as there are any yet."""
        return sum(0 if is_lazy(p) else p.numel() for p in self.tensors)

    def row(self) -> ConversionRow:
        """The weight in the table."""
        kind, count = type(self.layer).__name__, self.size
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
        self._names: dict[nn.Module, list[str]] = {}
        for name, layer in model.named_modules(remove_duplicate=False):
            self._names.setdefault(layer, []).append(name)
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
        of_model = self._model.parameters()
        sizes = (sum(0 if is_lazy(p) else p.numel() for p in own) for own in (quantized, convertible, of_model))
        return ConversionTable([w.row() for w in self.weights], *sizes)

    def left(self) -> list[str]:
        """What could have been converted, or may have to be made known, and was left; the largest first."""
        found = [w for w in self.weights if w.rule is None and not w.is_asked and self._is_missed(w)]
        found.sort(key=lambda w: -w.size)
        return [f"{w.name} ({type(w.layer).__name__}: {w.reason})" for w in found]

    def _is_missed(self, weight: PlannedWeight) -> bool:
        if weight.is_lookup or isinstance(weight.layer, nn.EmbeddingBag):
            return self._policy.embeddings
        return weight.is_known or _may_multiply(weight.layer)

    def _check_rules(self, known: dict[str, nn.Module]) -> None:
        names, lookups = (
            [
                name_of(name, path)
                for layer in known.values()
                if _is_lookup(layer) == is_lookup
                for name in self._names[layer]
                for path in weights_of(layer)
            ]
            for is_lookup in (False, True)
        )
        names += lookups if self._policy.embeddings else []
        for rule in self._policy.rules:
            if any(map(rule.matches, names)):
                continue
            plain = re.sub(r"[\\^$()|?*+\[\]]", "", rule.pattern)
            near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3)
            hint = f"nearest: {', '.join(near)}" if near else f"its layers are {some(names) or 'none that are known'}"
            if any(map(rule.matches, lookups)):
                hint = "an embedding that it matches needs embeddings=True"
            raise ValueError(f"rule {rule.pattern!r} matches no layer of this model; {hint}")

    def _resolve(self, layer: nn.Module, path: str) -> LayerRule | None:
        """The first rule that matches any name of the layer: one that is in two places has two."""
        names = [name_of(name, path) for name in self._names[layer]]
        return next((rule for rule in self._policy.rules if any(map(rule.matches, names))), None)

    def _decide(self, layer_name: str, layer: nn.Module, path: str) -> PlannedWeight:
        name = name_of(layer_name, path)
        is_lookup = _is_lookup(layer)
        rule = None if is_lookup and not self._policy.embeddings else self._resolve(layer, path)
        if rule is None:
            reason = UNTIED if is_lookup else "no rule matches its name"
            return PlannedWeight(name, layer, path, None, reason)
        if rule.leave:
            return PlannedWeight(name, layer, path, None, f"{_text(rule)} leaves it", is_asked=True)
        obstacle = _obstacle(layer)
        if obstacle is None and not weights_of(layer)[path] and rule.weight and rule.weight.scale.kind in BY_LINES:
            obstacle = AXES
        if obstacle is not None:
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
        return replace(weight, rule=rule, owner=owner, reason="its weight is a converted layer's")


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
    kind = kind_of(layer)
    if isinstance(layer, nn.MultiheadAttention) and kind is not None and kind.forward is intercepted:
        return OWN_FORWARD
    return obstacle_of(layer, weights_of(layer))


def _may_multiply(layer: nn.Module) -> bool:
    """Whether a layer that is not known has matrices that look like weights of products."""
    is_table = type(layer).__name__.endswith(("Embedding", "Embeddings"))
    return not is_table and any(
        not is_lazy(p) and sum(length > 1 for length in p.shape) > 1 and not NO_PRODUCT.search(name)
        for name, p in layer.named_parameters(recurse=False)
    )


def _parts_with_weights(layer: nn.Module) -> list[nn.Module]:
    """Modules inside a layer of several weights that hold some of these."""
    ways = (path.rpartition(".")[0] for path in weights_of(layer))
    return [layer.get_submodule(way) for way in ways if way]


def _text(rule: LayerRule) -> str:
    where = f"rule {rule.pattern!r}" if rule.pattern else "rule for every layer"
    return where if rule.weight or rule.leave else f"{where} keeps BF16"
