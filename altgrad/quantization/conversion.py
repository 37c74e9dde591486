"""Putting quantized layers into a model and taking them out again, once, before the training loop.

The swap is in place, keeps every Parameter object and its name (so tied weights stay tied and an optimizer built
before or after sees the same ones), and returns the table of what became of each layer, with the reason where one was
left as it was. What share of the model's parameters is quantized stands below it; where a layer that could have been
converted was left, a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from altgrad.quantization.conversion_plan import BF16_WEIGHT, ConversionPlan, PlannedWeight, name_of, some
from altgrad.quantization.conversion_table import ConversionTable
from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.layer_kinds import KINDS, kind_of, weights_of
from altgrad.quantization.layers import QuantizedLinear, obstacle
from altgrad.quantization.ops import mix_seed
from altgrad.quantization.policy import LayerRule, PrecisionPolicy, named_policy
from altgrad.quantization.products import Product
from altgrad.quantization.weight_roles import WeightRoles
from altgrad.quantization.wrapped_layers import QuantizedLayer, convert_layer, restore_layer, state_of_roles, weights_in

CONVERTED = (QuantizedLinear, QuantizedLayer)


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
    plan = ConversionPlan(model, rules)
    table, left = plan.table(), plan.left()
    _convert(model, plan, product, seed)
    if rules.rules and left:
        warnings.warn(f"{table.summary()}; left: {some(left)}", stacklevel=2)
    return table


def check_policy(model: nn.Module, policy: PrecisionPolicy) -> None:
    """ValueError where `quantize_model` would raise one; the model stays as it is."""
    ConversionPlan(model, policy)


def dequantize_model(model: nn.Module) -> None:
    """Puts the original layers back, in place, with the present Parameters."""
    _restore(model, [module for module in model.modules() if isinstance(module, CONVERTED)])


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
    layer = next(m for m in _converted_layers(model).values() if roles in weights_in(m).values())
    if isinstance(layer, QuantizedLayer) and layer.altgrad is not None and len(layer.altgrad.weights) > 1:
        roles.leave()
        layer.altgrad.weights = {path: own for path, own in layer.altgrad.weights.items() if own is not roles}
        return
    lookups = (m for m in model.modules() if isinstance(m, QuantizedLayer) and m is not layer)
    _restore(model, [layer, *(m for m in lookups if m.altgrad is not None and m.altgrad.owner is roles)])


def rounded_weights(model: nn.Module) -> dict[str, WeightRoles]:
    """The roles of each weight of converted layers, by layer; of a layer with several, by layer and weight."""
    return {
        name_of(name, path): roles
        for name, layer in _converted_layers(model).items()
        for path, roles in weights_in(layer).items()
    }


def role_state(model: nn.Module) -> dict[str, Tensor]:
    """What of a converted model's state a plain one does not have: histories and draws of its roles."""
    layers = _converted_layers(model).items()
    return {
        key: value for name, layer in layers for key, value in state_of_roles(layer, f"{name}." if name else "").items()
    }


def quantized_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, FloatFormat]]:
    """Name to (weight, format) of each converted weight; a tied one once, by the layer that multiplies by it."""
    found: dict[nn.Parameter, tuple[str, FloatFormat]] = {}
    for name, roles in rounded_weights(model).items():
        found.setdefault(cast(nn.Parameter, roles.tensor()), (name, roles.weight_format))
    return {name: (parameter, fmt) for parameter, (name, fmt) in found.items()}


def _convert(model: nn.Module, plan: ConversionPlan, product: Product, seed: int) -> None:
    """Each layer as planned; the model is as before where one can't be."""
    planned: dict[nn.Module, list[PlannedWeight]] = {}
    for weight in plan.weights:
        if weight.rule is not None:
            planned.setdefault(weight.layer, []).append(weight)
    linear = (module for module in model.modules() if isinstance(module, nn.Linear))
    places = {layer: place for place, layer in enumerate(linear)}
    done: dict[nn.Module, QuantizedLinear | QuantizedLayer] = {}
    try:
        for number, (layer, weights) in enumerate(planned.items()):
            rules = {weight.path: weight.rule for weight in weights if weight.rule is not None and weight.owner is None}
            key = mix_seed(seed, places[layer]) if layer in places else mix_seed(seed, 1, number)
            if rules:
                done[layer] = _converted(layer, rules, product, key)
        for layer, (first, *_) in planned.items():
            if first.owner is not None:
                owner = weights_in(done[first.owner.layer])[first.owner.path]
                done[layer] = convert_layer(layer, {}, owner=owner)
    except BaseException:
        for converted in done.values():
            restore_layer(converted) if isinstance(converted, QuantizedLayer) else converted.original()
        raise
    _swap(model, {layer: new for layer, new in done.items() if new is not layer})
    for encoder in model.modules():
        # Nested tensors, in which torch packs a padded batch at evaluation, have no products in roles.
        if isinstance(encoder, nn.TransformerEncoder) and any(isinstance(m, CONVERTED) for m in encoder.modules()):
            encoder.__dict__.setdefault("_nests_unconverted", encoder.use_nested_tensor)
            encoder.use_nested_tensor = False


def _converted(
    layer: nn.Module, rules: dict[str, LayerRule], product: Product, key: int
) -> QuantizedLinear | QuantizedLayer:
    if kind_of(layer) is not KINDS[nn.Linear]:
        return convert_layer(layer, rules, key)
    rule = rules["weight"]
    roles = {"activation": rule.activation, "gradient": rule.gradient}
    weight = rule.weight or BF16_WEIGHT
    return QuantizedLinear(cast(nn.Linear, layer), weight=weight, **roles, product=product, key=key)


def _restore(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    swaps: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, QuantizedLayer):
            restore_layer(layer)
        else:
            assert isinstance(layer, QuantizedLinear)
            swaps[layer] = layer.original()
    _swap(model, swaps)
    for encoder in model.modules():
        is_free = not any(isinstance(module, CONVERTED) for module in encoder.modules())
        if isinstance(encoder, nn.TransformerEncoder) and "_nests_unconverted" in encoder.__dict__ and is_free:
            encoder.use_nested_tensor = encoder.__dict__.pop("_nests_unconverted")


def multiplied_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to weight of each product of a model that is not converted, by the names that conversion would give them."""
    return {
        name_of(name, path): layer.get_parameter(path)
        for name, layer in model.named_modules()
        if (kind := kind_of(layer)) is not None and not kind.is_lookup and obstacle(layer, weights_of(layer)) is None
        for path in weights_of(layer)
    }


def embedded_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights whose rows are looked up, converted or not."""
    lookups = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {cast(nn.Parameter, module.weight) for module in lookups}


def _converted_layers(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedLayer)}


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


def _swap(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in swaps:
                setattr(parent, child_name, swaps[child].train(child.training))
