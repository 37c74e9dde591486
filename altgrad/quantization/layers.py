"""Layers that compute with quantized numbers.

A linear layer multiplies three times: y = x W^T, dx = g W and dW = g^T x. `QuantizedLinear` rounds the weight, the
input and the gradient arriving at its output, each in its own role, and uses these same numbers in all products: a
backward pass through the unrounded weight would train another network than the one that is evaluated. Products run
on the hardware's 8-bit units or are emulated with the same operands; sums are float32 and the output is rounded to
BF16, what a low-precision GEMM writes. The weight's gradient passes straight through to the Parameter, which stays
the very object the optimizer holds, under its own name.

A converted layer and the one it replaces share their parameters, buffers and hooks, the very dictionaries. So what
others do to either (hooks, pruning, another Parameter) holds for both, and converting back has nothing to carry over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from altgrad.quantization import products
from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.layer_products import EmulatedProduct, ProductRoles, QuantizedProduct
from altgrad.quantization.ops import refuse_script_tracing, refuse_transforms
from altgrad.quantization.products import Operand, Product, check_product
from altgrad.quantization.roles import Role, operand_of, values_of
from altgrad.quantization.weight_roles import WeightRoles


class QuantizedLinear(WeightRoles, nn.Module):
    """An nn.Linear in the given roles, sharing its Parameters; None leaves that role in float32.

    A role is a format, its name, or a `Role` with a scale rule and a rounding. `product`: "auto" multiplies on the
    hardware's 8-bit units where they exist, "emulated" never, "native" always or not at all (ValueError). `key`
    seeds stochastic rounding.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Linear,
        *,
        weight: str | FloatFormat | Role,
        activation: str | FloatFormat | Role | None = "BF16",
        gradient: str | FloatFormat | Role | None = "BF16",
        product: Product = "auto",
        key: int = 0,
    ) -> None:
        reason = obstacle(linear)
        if reason is not None:
            raise ValueError(f"this Linear cannot be converted: {reason}")
        super().__init__()
        share(linear, self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product = check_product(product)
        self._original = (linear,)
        self.take_roles(weight, activation, gradient, key)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.enter()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype; on a GPU in BF16, which its values have anyway."""
        weight, bias = self.weight, self.bias
        if not torch.compiler.is_compiling():
            refuse_transforms("a quantized layer", x, weight)
            refuse_script_tracing("a quantized layer")
        advance = self.training and torch.is_grad_enabled()
        if advance and not self.has_run:
            self.has_run = True
        gradient, own_scale, stored = self.gradient_quantizer, self.own_scale(), self.stored()
        if gradient is not None and gradient.tracker is not None:
            gradient.tracker.to(x.device)  # ahead of the backward pass, in which a compiled graph could not
        if self.product != "native" and "cpu" not in products.BF16_DEVICES:
            x_values = values_of(x, self.activation_quantizer, advance=advance)
            weight_values = stored
            if stored is None:
                weight_values = self.weight_quantizer.values(weight, advance=advance, own_scale=own_scale)
            if x_values is not None and weight_values is not None:
                rounds = self.activation_quantizer is not None
                tensors = x, weight, bias, x_values, weight_values
                return cast(Tensor, EmulatedProduct.apply(*tensors, gradient, rounds, advance))
        if stored is None:
            matrix = self.weight_quantizer.operand(weight, advance=advance, own_scale=own_scale)
        else:
            matrix = Operand(stored, None, None)
        activation = operand_of(x, self.activation_quantizer, advance=advance)
        # Without values: what the graph keeps are saved tensors, which checkpointing can let go.
        roles = ProductRoles(self.product, activation.without_values, matrix.without_values, gradient, advance)
        return cast(Tensor, QuantizedProduct.apply(x, weight, bias, activation.values, matrix.values, roles))

    def original(self) -> nn.Linear:
        """The wrapped layer, which has the present Parameters and hooks; ValueError if it was parametrized since."""
        (linear,) = self._original
        give_back(self, linear)
        self.leave()
        return linear.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A plain Linear's state, and that of roles which have some: tensors, under the names of their attributes."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= self.saved(prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        self.load(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.meet_loaded_weights()

    def extra_repr(self) -> str:
        """Shapes, then each role."""
        return f"{self.in_features} -> {self.out_features}, {self.in_full()}"


_SHARED = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""What nn.Module keeps that holds for a layer and its conversion alike."""


def share(source: nn.Module, target: nn.Module) -> None:
    """Makes both modules hold the same parameters, buffers and hooks."""
    for name in _SHARED:
        target.__dict__[name] = source.__dict__[name]


def give_back(converted: nn.Module, original: nn.Module) -> None:
    """What has come to the converted layer since, and is not shared already."""
    if parametrize.is_parametrized(converted):
        raise ValueError(
            "a converted layer was parametrized since (torch.nn.utils.parametrize); call remove_parametrizations first"
        )
    share(converted, original)
    # Pruning and old weight norms put the weight they compute beside the parameters.
    if "weight" in converted.__dict__:
        original.__dict__["weight"] = converted.__dict__["weight"]


def obstacle(layer: nn.Module, weights: Iterable[str] = ("weight",)) -> str | None:
    """Why converting this layer, with weights at these paths, would change more than its numbers; or None."""
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized (torch.nn.utils.parametrize); call remove_parametrizations first"
    for path in weights:
        *way, name = path.split(".")
        holder = layer.get_submodule(".".join(way))
        names = set(holder._parameters) | set(holder._buffers)
        for made_by, mark, mend in _DERIVED_WEIGHTS:
            if name + mark in names:
                return f"its {name} is made from other tensors ({made_by}); call {mend} first"
        weight = holder._parameters.get(name)
        if not isinstance(weight, nn.Parameter):
            return f"its {name} is no Parameter"
        if is_lazy(weight):
            return f"its {name} has no shape before the first forward pass"
        if not weight.is_floating_point():
            return f"its {name} is stored as {str(weight.dtype).removeprefix('torch.')}"
    if "forward" in layer.__dict__:
        return "its forward method was replaced (by accelerate's hooks, for one)"
    return None


_DERIVED_WEIGHTS = (
    ("pruning", "_mask", "torch.nn.utils.prune.remove"),
    ("weight norm", "_g", "torch.nn.utils.remove_weight_norm"),
    ("spectral norm", "_u", "torch.nn.utils.remove_spectral_norm"),
)
"""What computes a weight anew at each forward pass, what is added to its name, and how to end it."""
