"""Any layer in quantized roles: its own forward pass, over rounded weights, inputs and gradients.

`QuantizedLinear` is the layer that most products of a network are in, and is made fast. Here is everything else:
convolutions, Hugging Face's Conv1D, attentions with fused inputs, stacked experts, routers, embeddings, layers of
one's own. The numbers follow the same law. Of each product the weight, the input and the gradient that arrives at the
output are rounded once, in their roles, and these numbers are used forward and backward; sums are float32, and the
output is rounded to BF16 after the bias, unless the input is left in float32.

Scales per channel or per block hold along the axes that are summed over. Of a weight these are the `contracted` axes of
its kind, in order; of an input and of an output's gradient one axis: features, or the channels of an image, so that a
block is 32 channels of one pixel, as the GEMM of a convolution over channels-last images sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.layer_kinds import LayerKind, kind_of, weights_of
from altgrad.quantization.layer_products import StraightThrough, refuse_second_derivative
from altgrad.quantization.layers import give_back, obstacle, share
from altgrad.quantization.ops import mix_seed, refuse_script_tracing, refuse_transforms
from altgrad.quantization.policy import LayerRule
from altgrad.quantization.products import Operand
from altgrad.quantization.roles import Role, RoleQuantizer
from altgrad.quantization.weight_roles import WeightRoles

BY_LINES = ("per_channel", "block")
"""Kinds of scale that a tensor has many of, each for a piece of a line along a summed axis."""

Watch = Callable[[str, Tensor], None]
"""(role, tensor): told of a product's input and of its output's gradient before they are rounded."""


class ProductRoles(WeightRoles):
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

    def rounded(self, *, advance: bool) -> Tensor:
        """The weight's values in float32, whose gradient passes straight through to the weight."""
        weight, own_scale = self.tensor(), self.own_scale()
        refuse_transforms("a quantized layer", weight)
        if own_scale is None and self.weight_quantizer.role.scale.kind in BY_LINES:
            values = self.from_rows(_values(self.as_rows(weight.detach()), self.weight_quantizer, advance))
        else:
            values = _values(weight, self.weight_quantizer, advance, own_scale=own_scale)
        return cast(Tensor, StraightThrough.apply(weight, values))

    def weight_operand(self, *, advance: bool = False) -> Operand:
        """The weight as it is multiplied, without gradient; `scale` broadcasts to it."""
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
        values = _values(x, self.activation_quantizer, advance, axis=axis)
        with _without_autocast(x.device.type):
            y = function(cast(Tensor, StraightThrough.apply(x, values)), weight)
            rounds = self.activation_quantizer is not None
            y = cast(Tensor, _Written.apply(y, self.gradient_quantizer, rounds, axis, advance, self.watch))
        return y if y.dtype == x.dtype else y.to(x.dtype)


class QuantizedLayer(nn.Module):
    """A layer whose weights are in the given roles, sharing its Parameters; `rules`: by weight, see `weights_of`.

    It answers for every attribute of the layer that it wraps. ValueError for a layer whose kind is not registered.
    """

    def __init__(self, layer: nn.Module, rules: dict[str, LayerRule], key: int = 0) -> None:
        if (reason := obstacle(layer, rules)) is not None:
            raise ValueError(f"this {type(layer).__name__} cannot be converted: {reason}")
        super().__init__()
        share(layer, self)
        self.__dict__["_modules"] = layer._modules
        self._original = (layer,)
        kind = kind_of(layer)
        if kind is None:
            raise ValueError(f"{type(layer).__name__} is no layer that is known; see register_layer")
        self.rounded_weights: dict[str, ProductRoles] = {}
        for place, (path, contracted) in enumerate(weights_of(layer).items()):
            if path in rules:
                *way, name = path.split(".")
                holder = self.get_submodule(".".join(way)) if way else self
                rule = rules[path]
                roles = rule.weight or Role(format="BF16"), rule.activation, rule.gradient
                own = ProductRoles(holder, name, contracted, *roles, mix_seed(key, place))
                self.rounded_weights[path] = self.__dict__[_attribute(path)] = own
        self.__dict__ |= kind.attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for roles in self.rounded_weights.values():
            roles.enter()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            return getattr(self._original[0], name)

    @property
    def _kind(self) -> LayerKind:
        """Found anew, for it cannot be pickled."""
        kind = kind_of(self._original[0])
        assert kind is not None
        return kind

    @property
    def is_lookup(self) -> bool:
        """Whether rows of the weight are looked up."""
        return self._kind.is_lookup

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer that it wraps."""
        if not torch.compiler.is_compiling():
            refuse_transforms("a quantized layer", *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
            refuse_script_tracing("a quantized layer")
        products = Products(self.rounded_weights, advance=self.training and torch.is_grad_enabled())
        return self._kind.forward(self._original[0], products, *args, **kwargs)

    def drop(self, roles: WeightRoles) -> None:
        """Leaves one of several weights unquantized from now on."""
        roles.grid.release()
        self.rounded_weights = {path: own for path, own in self.rounded_weights.items() if own is not roles}

    def original(self) -> nn.Module:
        """The wrapped layer, which has the present Parameters and hooks; ValueError if it was parametrized since."""
        (layer,) = self._original
        give_back(self, layer)
        for roles in self.rounded_weights.values():
            roles.grid.release()
        return layer.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for path, roles in self.rounded_weights.items():
            destination |= roles.saved(f"{prefix}{_attribute(path)}.")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for path, roles in self.rounded_weights.items():
            roles.load(state_dict, f"{prefix}{_attribute(path)}.")
        super()._load_from_state_dict(state_dict, prefix, *others)
        for roles in self.rounded_weights.values():
            roles.meet_loaded_weights()

    def _get_name(self) -> str:
        return f"Quantized{type(self._original[0]).__name__}"

    def extra_repr(self) -> str:
        """The layer's own, then each weight's roles."""
        roles = self.rounded_weights
        texts = [r.numerics() if len(roles) == 1 else f"{path}: {r.numerics()}" for path, r in roles.items()]
        return ", ".join([text for text in (self._original[0].extra_repr(),) if text] + texts)


class Products:
    """What a kind's forward pass multiplies with: the layer's weights in their roles, by path.

    A weight that no rule quantizes is multiplied as it is.
    """

    def __init__(self, roles: dict[str, ProductRoles], *, advance: bool) -> None:
        self.roles, self._advance = roles, advance

    def weight(self, path: str, plain: Tensor) -> Tensor:
        """The weight at `path` rounded, float32, gradient straight through; `plain` where it has no roles."""
        if path not in self.roles:
            return plain
        roles = self.roles[path]
        if self._advance and not roles.has_run:
            roles.has_run = True
        return roles.rounded(advance=self._advance)

    def multiply(
        self, path: str, x: Tensor, weight: Tensor, function: Callable[[Tensor, Tensor], Tensor], *, axis: int = -1
    ) -> Tensor:
        """function(x, weight), with x and the output's gradient in the roles of `path`; `weight`: from `weight`.

        `axis`: of x that is summed over, and of the output's features.
        """
        if path not in self.roles:
            return function(x, weight)
        return self.roles[path].product(x, weight, function, axis=axis, advance=self._advance)


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
        return _values(g, quantizer, advance, axis=axis).to(g.dtype), None, None, None, None, None


def _values(
    x: Tensor, quantizer: RoleQuantizer | None, advance: bool, *, axis: int = -1, own_scale: Tensor | None = None
) -> Tensor:
    """x in its role, float32 of x's shape; lines lie along `axis`."""
    if quantizer is None:
        return x.detach().to(torch.float32)
    if not x.numel():
        return x.detach().to(torch.float32)  # of no elements there is no amax
    x = x.detach()
    moves = own_scale is None and quantizer.role.scale.kind in BY_LINES and axis % x.dim() != x.dim() - 1
    lines = x.movedim(axis, -1).contiguous() if moves else x
    values = quantizer.values(lines, advance=advance, own_scale=own_scale)
    if values is None:
        values = quantizer.operand(lines, advance=advance, own_scale=own_scale).numbers
    return values.movedim(-1, axis).contiguous() if moves else values


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """Products of rounded numbers are summed in float32, whatever autocast would make of them."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


def _attribute(path: str) -> str:
    """Where a layer has the roles of a weight: torch's distributed checkpoints walk from attribute to attribute."""
    return f"{path.replace('.', '_')}_roles"
