"""Layers that compute with quantized numbers.

A linear layer multiplies three times: y = x W^T, dx = g W and dW = g^T x. `QuantizedLinear` rounds the weight, the
input and the gradient arriving at its output, each in its own role, and uses these same numbers in all products: a
backward pass through the unrounded weight would train another network than the one that is evaluated. Products run
on the hardware's 8-bit units or are emulated with the same operands; sums are float32 and the output is rounded to
BF16, what a low-precision GEMM writes. The weight's gradient passes straight through to the Parameter, which stays
the very object the optimizer holds, under its own name.

The weight's scale is that of its `WeightGrid` where it has one: an optimizer keeps the weights on the grid, or they
came from a checkpoint of such a run, and the layer then changes none of them. Otherwise it follows the role's rule.

A converted layer and the one it replaces share their parameters, buffers and hooks, the very dictionaries. So what
others do to either (hooks, pruning, another Parameter) holds for both, and converting back has nothing to carry over.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from altgrad.quantization import products
from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.layer_products import EmulatedProduct, ProductRoles, QuantizedProduct, StraightThrough
from altgrad.quantization.ops import mix_seed, refuse_script_tracing, refuse_transforms
from altgrad.quantization.products import Operand, Product, check_product
from altgrad.quantization.roles import Role, RoleQuantizer, as_role, operand_of, values_of
from altgrad.quantization.training_steps import follow_steps
from altgrad.quantization.weight_grid import register_layer, weight_grid


class QuantizedLinear(nn.Module):
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
        _share(linear, self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product = check_product(product)
        self.weight_quantizer = RoleQuantizer(as_role(weight), mix_seed(key, 0))
        self.activation_quantizer = _quantizer(activation, mix_seed(key, 1))
        self.gradient_quantizer = _quantizer(gradient, mix_seed(key, 2))
        self.has_run = False
        self.grid = weight_grid(self.weight).join(self.weight_format)
        self._original = (linear,)
        self._enter()
        self.own_scale()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After copying or unpickling: torch copies a Parameter without its attributes."""
        super().__setstate__(state)
        self._enter()

    def _enter(self) -> None:
        weight: Any = self._parameters.get("weight")
        if weight is not None:
            weight.grid = self.grid
        register_layer(self)
        if any(quantizer.has_state for quantizer in self.quantizers().values()):
            follow_steps(self)

    @property
    def weight_format(self) -> FloatFormat:
        """The weight's format."""
        return self.weight_quantizer.fmt

    def quantizers(self) -> dict[str, RoleQuantizer]:
        """The roles at work, by name; a role in float32 has none."""
        named = {
            "weight": self.weight_quantizer,
            "activation": self.activation_quantizer,
            "gradient": self.gradient_quantizer,
        }
        return {name: quantizer for name, quantizer in named.items() if quantizer is not None}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype; on a GPU in BF16, which its values have anyway."""
        weight, bias = self.weight, self.bias
        if not torch.compiler.is_compiling():
            refuse_transforms("a quantized layer", x, weight)
            refuse_script_tracing("a quantized layer")
        advance = self.training and torch.is_grad_enabled()
        if advance and not self.has_run:
            self.has_run = True
        gradient, own_scale = self.gradient_quantizer, self.own_scale()
        if gradient is not None and gradient.tracker is not None:
            gradient.tracker.to(x.device)  # ahead of the backward pass, in which a compiled graph could not
        if self.product != "native" and "cpu" not in products.BF16_DEVICES:
            x_values = values_of(x, self.activation_quantizer, advance=advance)
            weight_values = self.weight_quantizer.values(weight, advance=advance, own_scale=own_scale)
            if x_values is not None and weight_values is not None:
                rounds = self.activation_quantizer is not None
                tensors = x, weight, bias, x_values, weight_values
                return cast(Tensor, EmulatedProduct.apply(*tensors, gradient, rounds, advance))
        matrix = self.weight_quantizer.operand(weight, advance=advance, own_scale=own_scale)
        activation = operand_of(x, self.activation_quantizer, advance=advance)
        # Without values: what the graph keeps are saved tensors, which checkpointing can let go.
        roles = ProductRoles(self.product, activation.without_values, matrix.without_values, gradient, advance)
        return cast(Tensor, QuantizedProduct.apply(x, weight, bias, activation.values, matrix.values, roles))

    def weight_operand(self, *, advance: bool = False) -> Operand:
        """The weight this layer multiplies by, without gradient."""
        return self.weight_quantizer.operand(self.weight, advance=advance, own_scale=self.own_scale())

    def own_scale(self) -> Tensor | None:
        """The scale of the weight's grid, 0-d float32; None where the role's rule decides."""
        weight = self._parameters.get("weight")
        if weight is not None:
            return self.grid.scale_for(weight)
        # Made from other tensors since: a mask leaves a weight on its grid, a norm or a parametrization does not.
        return self.grid.scale if "weight_mask" in self._buffers else None

    def end_step(self) -> None:
        """A training step is over: histories take it in, stochastic roles go on to another draw."""
        self.has_run = False
        for quantizer in self.quantizers().values():
            quantizer.end_step()

    def quantized_weight(self) -> Tensor:
        """The values of `weight_operand`, float32."""
        return self.weight_operand().numbers

    def reformat(self, format: str | FloatFormat) -> None:
        """Takes another format in every role that has the weight's; histories start again, and so does the grid."""
        before, after = self.weight_format, get_format(format)
        for name, quantizer in self.quantizers().items():
            if quantizer.fmt == before:
                role = quantizer.role.model_copy(update={"format": after.name})
                setattr(self, f"{name}_quantizer", RoleQuantizer(role, quantizer.key))
        self.grid.reformat(after)

    def original(self) -> nn.Linear:
        """The wrapped layer, which has the present Parameters and hooks; ValueError if it was parametrized since."""
        (linear,) = self._original
        _give_back(self, linear)
        self.grid.release()
        return linear.train(self.training)

    @property
    def recipe(self) -> Tensor:
        """`numerics` as bytes, uint8: what a saved state belongs to."""
        return torch.tensor(list(self.numerics().encode()), dtype=torch.uint8)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A plain Linear's state, and that of roles which have some: tensors, under the names of their attributes."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = {
            f"{prefix}{name}_quantizer.{key}": value
            for name, quantizer in self.quantizers().items()
            for key, value in quantizer.state_dict().items()
        }
        if own:
            destination |= own | {f"{prefix}recipe": self.recipe}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Takes what `_save_to_state_dict` wrote; a plain Linear's state leaves histories and draws as they are.

        ValueError for the state of a layer in other roles.
        """
        # Model states held the scale once; it is the optimizer's, and is found from the weights without one.
        state_dict.pop(f"{prefix}grid_scale", None)
        recipe = state_dict.pop(f"{prefix}recipe", None)
        if recipe is not None:
            saved = bytes(recipe.to(torch.uint8).tolist()).decode(errors="replace")
            if saved != self.numerics():
                raise ValueError(
                    f"the state of {prefix.removesuffix('.') or 'a layer'} was saved as {saved!r}; this layer is "
                    f"{self.numerics()!r}: convert the model in the saved roles, or load its weights only"
                )
        for name, quantizer in self.quantizers().items():
            keys = {key: f"{prefix}{name}_quantizer.{key}" for key in quantizer.state_dict()}
            quantizer.load_state_dict({key: state_dict.pop(k) for key, k in keys.items() if k in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._enter()
        self.grid.expect_new_weights()
        # Now, for a compiled forward does not look.
        self.own_scale()

    def extra_repr(self) -> str:
        """Shapes, then each role."""
        return f"{self.in_features} -> {self.out_features}, {self.numerics()}"

    def numerics(self) -> str:
        """Each role, as in "E5M2 weight · BF16 activation · BF16 gradient"."""
        found = self.quantizers()
        names = ("weight", "activation", "gradient")
        return " · ".join(f"{found[name].role if name in found else 'FP32'} {name}" for name in names)


class QuantizedEmbedding(nn.Module):
    """An nn.Embedding tied to a converted linear layer: looks up the very weight that layer multiplies by."""

    weight: nn.Parameter

    def __init__(self, embedding: nn.Embedding, linear: QuantizedLinear) -> None:
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm={embedding.max_norm} rewrites the weights on look-up; not with a quantized one")
        if embedding.sparse:
            raise ValueError("sparse=True: a quantized embedding has a dense gradient; use sparse=False")
        super().__init__()
        _share(embedding, self)
        self._linear, self._original = (linear,), (embedding,)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., width]; gradient straight through."""
        (embedding,), (linear,) = self._original, self._linear
        if not torch.compiler.is_compiling():
            refuse_transforms("a quantized embedding", self.weight)
            refuse_script_tracing("a quantized embedding")
        own_scale = linear.own_scale() if self.weight is linear.weight else None
        quantizer = linear.weight_quantizer
        values = quantizer.values(self.weight, advance=False, own_scale=own_scale)
        if values is None:
            values = quantizer.operand(self.weight, advance=False, own_scale=own_scale).numbers
        weight = cast(Tensor, StraightThrough.apply(self.weight, values))
        return functional.embedding(
            tokens, weight.to(self.weight.dtype), embedding.padding_idx, scale_grad_by_freq=embedding.scale_grad_by_freq
        )

    def original(self) -> nn.Embedding:
        """The wrapped layer, which has the present Parameter and hooks; ValueError if it was parametrized since."""
        (embedding,) = self._original
        _give_back(self, embedding)
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        """Shape and role."""
        rows, width = self.weight.shape
        return f"{rows}, {width}, {self._linear[0].weight_quantizer.role} weight"


def _quantizer(value: str | FloatFormat | Role | None, key: int) -> RoleQuantizer | None:
    return None if value is None else RoleQuantizer(as_role(value), key)


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


def _share(source: nn.Module, target: nn.Module) -> None:
    for name in _SHARED:
        target.__dict__[name] = source.__dict__[name]


def _give_back(converted: nn.Module, original: nn.Module) -> None:
    """What has come to the converted layer since, and is not shared already."""
    if parametrize.is_parametrized(converted):
        raise ValueError(
            "a converted layer was parametrized since (torch.nn.utils.parametrize); call remove_parametrizations first"
        )
    _share(converted, original)
    # Pruning and old weight norms put the weight they compute beside the parameters.
    if "weight" in converted.__dict__:
        original.__dict__["weight"] = converted.__dict__["weight"]


def obstacle(layer: nn.Module) -> str | None:
    """Why converting this layer would change more than its numbers, or None."""
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized (torch.nn.utils.parametrize); call remove_parametrizations first"
    names = set(layer._parameters) | set(layer._buffers)
    for made_by, mark, mend in _DERIVED_WEIGHTS:
        if mark in names:
            return f"its weight is made from other tensors ({made_by}); call {mend} first"
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is no Parameter"
    if "forward" in layer.__dict__:
        return "its forward method was replaced (by accelerate's hooks, for one)"
    return None


_DERIVED_WEIGHTS = (
    ("pruning", "weight_mask", "torch.nn.utils.prune.remove"),
    ("weight norm", "weight_g", "torch.nn.utils.remove_weight_norm"),
    ("spectral norm", "weight_u", "torch.nn.utils.remove_spectral_norm"),
)
"""What computes a weight anew at each forward pass, the tensor it is known by, and how to end it."""
