"""Any layer in quantized roles: its own forward pass, over rounded weights, inputs and gradients.

`QuantizedLinear` is the layer that most products of a network are in, and is made fast. Here is everything else:
convolutions, Hugging Face's Conv1D, attentions with fused inputs, stacked experts, routers, embeddings, layers of
one's own. The numbers follow the same law. Of each product the weight, the input and the gradient that arrives at the
output are rounded once, in their roles, and these numbers are used forward and backward; sums are float32, and the
output is rounded to BF16 after the bias, unless the input is left in float32.

Such a layer stays the object that it is: only its class changes, to one that is derived from its own. So whatever
others read of it, set on it or ask of its type holds as before.

Scales per channel or per block hold along the axes that are summed over. Of a weight these are the `contracted` axes of
its kind, in order; of an input and of an output's gradient one axis: features, or the channels of an image, so that a
block is 32 channels of one pixel, as the GEMM of a convolution over channels-last images sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.interception import intercepted, property_of
from altgrad.quantization.layer_kinds import LayerKind, kind_at, kind_of, look_of, weights_of
from altgrad.quantization.layer_products import StraightThrough, refuse_second_derivative
from altgrad.quantization.layers import QuantizedLinear, obstacle
from altgrad.quantization.ops import mix_seed, refuse_script_tracing, refuse_transforms
from altgrad.quantization.policy import LayerRule
from altgrad.quantization.products import Operand
from altgrad.quantization.roles import Role, RoleQuantizer
from altgrad.quantization.weight_roles import BY_LINES, WeightRoles, values_in_role

Watch = Callable[[str, Tensor], None]
"""(role, tensor): told of a product's input and of its output's gradient before they are rounded."""


class LayerWeight(WeightRoles):
    """The roles of one of a layer's weights; `contracted`: its axes that the product sums over, in order."""

    def __init__(
        self,
        holder: nn.Module,
        weight_name: str,
        contracted: tuple[int, ...],
        weight: str | FloatFormat | Role,
        activation: str | FloatFormat | Role | None,
        gradient: str | FloatFormat | Role | None,
        key: int,
    ) -> None:
        self._holder, self.weight_name, self._contracted = holder, weight_name, contracted
        self.watch: Watch | None = None
        self.take_roles(weight, activation, gradient, key)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"watch": None}

    @property
    def holder(self) -> nn.Module:
        return self._holder

    def weight_operand(self, *, advance: bool = False) -> Operand:
        """The weight in its role, without gradient; `scale` broadcasts to it."""
        own_scale = self.own_scale()
        if own_scale is not None or self.weight_quantizer.role.scale.kind not in BY_LINES:
            return self.weight_quantizer.operand(self.tensor(), advance=advance, own_scale=own_scale)
        operand = self.weight_quantizer.operand(self.as_rows(self.tensor().detach()), advance=advance)
        scale = None if operand.scale is None else self.from_rows(operand.scale)
        return Operand(self.from_rows(operand.values), operand.fmt, scale)

    def as_rows(self, x: Tensor) -> Tensor:
        order, kept = self._order()
        moved = x.permute(order)
        return moved.reshape(moved.shape[:kept].numel(), moved.shape[kept:].numel()).contiguous()

    def from_rows(self, rows: Tensor) -> Tensor:
        order, kept = self._order()
        shape = [self.tensor().shape[axis] for axis in order]
        summed = [1] * (len(shape) - kept) if rows.shape[1] == 1 else shape[kept:]
        back = [order.index(axis) for axis in range(len(order))]
        return rows.reshape(*shape[:kept], *summed).permute(back).contiguous()

    def _order(self) -> tuple[list[int], int]:
        """The weight's axes, those summed over last, and how many are not."""
        axes = self.tensor().dim()
        contracted = [axis % axes for axis in self._contracted]
        kept = [axis for axis in range(axes) if axis not in contracted]
        return kept + contracted, len(kept)

    def product(
        self, x: Tensor, weight: Tensor, function: Callable[[Tensor, Tensor], Tensor], *, axis: int, advance: bool
    ) -> Tensor:
        """function(x, weight) of x in its role and a weight that is `rounded`; its output is rounded, in x's dtype.

        `axis`: of x that is summed over, and of the output's features.
        """
        if self.watch is not None:
            self.watch("activation", x.detach())
        values = values_in_role(x, self.activation_quantizer, advance=advance, axis=axis)
        with _without_autocast(x.device.type):
            y = function(cast(Tensor, StraightThrough.apply(x, values)), weight)
            rounds = self.activation_quantizer is not None
            y = cast(Tensor, _Written.apply(y, self.gradient_quantizer, rounds, axis, advance, self.watch))
        return y if y.dtype == x.dtype else y.to(x.dtype)


class Conversion:
    """What a converted layer keeps of its conversion, under one name, so that the layer's own names stay its own.

    `weights`: the roles of its weights, by path; `owner`: those of the layer whose weight it looks up; `look`: place of
    its kind among those known by their looks, which surgery may change.
    """

    def __init__(self, look: int | None, owner: WeightRoles | None, replaced: dict[str, Any], hook: int) -> None:
        self.weights: dict[str, LayerWeight] = {}
        self.look, self.owner, self.replaced, self.hook = look, owner, replaced, hook

    def __getattr__(self, name: str) -> Any:
        """The roles of a weight, its path without dots: torch's distributed checkpoints walk by attributes."""
        if name.startswith("__") or "weights" not in self.__dict__:
            raise AttributeError(name)
        found = {path.replace(".", "_"): roles for path, roles in self.weights.items()}
        if name not in found:
            raise AttributeError(name)
        return found[name]


class QuantizedLayer(nn.Module):
    """What the class of a converted layer has beside its own; see `convert_layer` and `restore_layer`."""

    altgrad: Conversion | None = None
    """None for a layer that the class itself was asked for."""
    altgrad_class: type[nn.Module]
    """The layer's own class."""
    altgrad_shadowed: tuple[str, ...]
    """Names of Parameters in whose place the layer's own forward pass reads rounded values."""
    altgrad_look_into: Callable[..., Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for roles in weights_in(self).values():
            roles.enter()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made anew from the layer's own, for it stands in no module."""
        return _blank, (self.altgrad_class, self.altgrad_shadowed), self.__getstate__()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        conversion = self.altgrad
        if conversion is None:
            return self.altgrad_class.forward(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            refuse_transforms("a quantized layer", *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
            refuse_script_tracing("a quantized layer")
        owner = conversion.owner
        roles: Mapping[str, WeightRoles] = conversion.weights if owner is None else {"weight": owner}
        advance = owner is None and self.training and torch.is_grad_enabled()
        kind = _kind_of(self, conversion.look)
        run = type(self).altgrad_look_into if self.altgrad_shadowed else kind.forward
        return run(self, Products(roles, advance=advance, is_lookup=kind.is_lookup), *args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= state_of_roles(self, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for path, roles in weights_in(self).items():
            roles.load(state_dict, _prefix(prefix, path))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        """The layer's own, then each weight's roles."""
        roles = weights_in(self)
        texts = [r.in_full() if len(roles) == 1 else f"{path}: {r.in_full()}" for path, r in roles.items()]
        if self.altgrad is not None and self.altgrad.owner is not None:
            texts.append(f"{self.altgrad.owner.weight_quantizer.role.in_full} weight")
        return ", ".join([text for text in (super().extra_repr(),) if text] + texts)


def weights_in(layer: QuantizedLinear | QuantizedLayer) -> Mapping[str, WeightRoles]:
    """The roles of a converted layer's weights, by path."""
    if isinstance(layer, QuantizedLinear):
        return {"weight": layer}
    return {} if layer.altgrad is None else layer.altgrad.weights


def state_of_roles(layer: QuantizedLinear | QuantizedLayer, prefix: str) -> dict[str, Tensor]:
    """What the roles of a layer keep from step to step, under their names in its state."""
    if isinstance(layer, QuantizedLinear):
        return layer.saved(prefix)
    saved = (roles.saved(_prefix(prefix, path)) for path, roles in weights_in(layer).items())
    return {name: value for own in saved for name, value in own.items()}


def convert_layer(
    layer: nn.Module, rules: Mapping[str, LayerRule], key: int = 0, *, owner: WeightRoles | None = None
) -> QuantizedLayer:
    """Converts a layer in place, with its weights (paths of `weights_of`) in the roles of `rules`.

    `owner`: the roles of the layer whose weight it looks up, in place of rules. ValueError for a layer of no known kind
    and one that conversion would break.
    """
    kind, weights = kind_of(layer), weights_of(layer)
    if kind is None:
        raise ValueError(f"{type(layer).__name__} is no layer that is known; see register_layer")
    if (reason := obstacle(layer, weights)) is not None:
        raise ValueError(f"this {type(layer).__name__} cannot be converted: {reason}")
    own: Any = type(layer)
    try:
        derived = _class_of(own, _direct(weights) if kind.forward is intercepted else ())
    except Exception as error:
        raise ValueError(
            f"this {own.__name__} cannot be converted: no class derives from it ({error}); leave it out by a rule with "
            "leave=True"
        ) from error
    look = look_of(layer)
    layer.__class__ = derived
    converted = cast(QuantizedLayer, layer)
    handle = converted.register_load_state_dict_post_hook(_meet_loaded)
    replaced = {name: layer.__dict__[name] for name in kind.attributes}
    conversion = Conversion(look, owner, replaced, handle.id)
    converted.__dict__ |= {"altgrad": conversion} | kind.attributes
    try:
        for place, (path, contracted) in enumerate(weights.items()):
            if path in rules:
                *way, name = path.split(".")
                rule = rules[path]
                roles = rule.weight or Role(format="BF16"), rule.activation, rule.gradient
                holder = layer.get_submodule(".".join(way))
                conversion.weights[path] = LayerWeight(holder, name, contracted, *roles, mix_seed(key, place))
    except BaseException:
        restore_layer(converted)
        raise
    return converted


def restore_layer(layer: QuantizedLayer) -> None:
    """Makes it a layer of its own class again; ValueError if it was parametrized since."""
    if parametrize.is_parametrized(layer):
        raise ValueError(
            "a converted layer was parametrized since (torch.nn.utils.parametrize); call remove_parametrizations first"
        )
    conversion = layer.__dict__.pop("altgrad", None)
    if conversion is not None:
        for roles in conversion.weights.values():
            roles.leave()
        layer.__dict__ |= conversion.replaced
        layer._load_state_dict_post_hooks.pop(conversion.hook, None)
    layer.__class__ = layer.altgrad_class  # type: ignore[assignment]


class Products:
    """What a kind's forward pass multiplies with: the layer's weights in their roles, by path.

    A weight that no rule quantizes is multiplied as it is.
    """

    def __init__(self, roles: Mapping[str, WeightRoles], *, advance: bool, is_lookup: bool) -> None:
        self.roles, self._advance, self._is_lookup = roles, advance, is_lookup

    def weight(self, path: str, plain: Tensor) -> Tensor:
        """The weight at `path` rounded, float32, gradient straight through; `plain` where it has no roles."""
        if path not in self.roles:
            return plain
        if self._is_lookup:
            self._has_run(self.roles[path])
        return self.roles[path].rounded(plain, advance=self._advance)

    def multiply(
        self, path: str, x: Tensor, weight: Tensor, function: Callable[[Tensor, Tensor], Tensor], *, axis: int = -1
    ) -> Tensor:
        """function(x, weight), with x and the output's gradient in the roles of `path`; `weight`: from `weight`.

        `axis`: of x that is summed over, and of the output's features.
        """
        roles = self.roles.get(path)
        if not isinstance(roles, LayerWeight):
            return function(x, weight)
        self._has_run(roles)
        return roles.product(x, weight, function, axis=axis, advance=self._advance)

    def _has_run(self, roles: WeightRoles) -> None:
        if self._advance and not roles.has_run:
            roles.has_run = True


class _Written(torch.autograd.Function):
    """A product's output as hardware writes it, in BF16, and the gradient that arrives there in its role."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gradient: RoleQuantizer | None, rounds: bool, axis: int, advance: bool, watch: Watch | None
    ) -> Tensor:
        ctx.role = gradient, axis, advance, watch
        return y.to(torch.bfloat16).to(y.dtype) if rounds else y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        refuse_second_derivative(g)
        quantizer, axis, advance, watch = ctx.role
        if watch is not None:
            watch("gradient", g.detach())
        values = values_in_role(g, quantizer, advance=advance, axis=axis)
        return values.to(g.dtype), None, None, None, None, None


@cache
def _class_of(own: Any, shadowed: tuple[str, ...]) -> Any:
    """The class of converted layers of the class `own`."""
    attributes: dict[str, Any] = {"altgrad_class": own, "altgrad_shadowed": shadowed}
    attributes |= {name: property_of(name) for name in shadowed}
    if shadowed:
        # Not where it is defined, for it loads torch's compiler.
        reason = "AltGrad looks into this layer's own forward pass as it runs"
        attributes["altgrad_look_into"] = staticmethod(torch.compiler.disable(intercepted, reason=reason))
    return type(own)(f"Quantized{own.__name__}", (QuantizedLayer, own), attributes)


def _blank(own: Any, shadowed: tuple[str, ...]) -> Any:
    """A converted layer without its state, for copying and unpickling."""
    layer = own.__new__(own)
    layer.__class__ = _class_of(own, shadowed)
    return layer


def _kind_of(layer: QuantizedLayer, look: int | None) -> LayerKind:
    kind = kind_of(layer) if look is None else kind_at(look)
    if kind is None:
        raise RuntimeError(f"{layer.altgrad_class.__name__} is not known here; call register_layer before it runs")
    return kind


def _direct(weights: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(path for path in weights if "." not in path)


def _meet_loaded(layer: QuantizedLayer, _: Any) -> None:
    """After it and its parts were loaded."""
    for roles in weights_in(layer).values():
        roles.meet_loaded_weights()


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """Products of rounded numbers are summed in float32, whatever autocast would make of them."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


def _prefix(prefix: str, path: str) -> str:
    """Of the state of a weight's roles."""
    return f"{prefix}altgrad.{path.replace('.', '_')}."
