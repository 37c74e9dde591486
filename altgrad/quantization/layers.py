"""Layers that compute with quantized numbers.

A linear layer multiplies three times: y = x W^T, dx = g W and dW = g^T x. `QuantizedLinear` rounds the weight, the
input and the gradient arriving at its output, each in its own role, and uses these same numbers in all products: a
backward pass through the unrounded weight would train another network than the one that is evaluated. Products run
on the hardware's 8-bit units or are emulated with the same operands; sums are float32 and the output is rounded to
BF16, what a low-precision GEMM writes. The weight's gradient passes straight through to the Parameter, which stays
the very object the optimizer holds, under its own name.

The weight's scale is that of its `WeightGrid` where an optimizer has set one: that optimizer keeps the weights on the
grid, and the layer then changes none of them. Otherwise it follows the role's rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.ops import mix_seed
from altgrad.quantization.products import BF16_DEVICES, Operand, Product, check_product, matmul_transposed
from altgrad.quantization.roles import Role, RoleQuantizer, as_role, operand_of
from altgrad.quantization.weight_grid import weight_grid


class QuantizedLinear(nn.Module):
    """An nn.Linear in the given roles, sharing its Parameters; None leaves that role in float32.

    A role is a format, its name, or a `Role` with a scale rule and a rounding. `product`: "auto" multiplies on the
    hardware's 8-bit units where they exist, "emulated" never, "native" always or not at all (ValueError). `key`
    seeds stochastic rounding.
    """

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
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.product = check_product(product)
        self.weight_quantizer = RoleQuantizer(as_role(weight), mix_seed(key, 0))
        self.activation_quantizer = _quantizer(activation, mix_seed(key, 1))
        self.gradient_quantizer = _quantizer(gradient, mix_seed(key, 2))
        self.grid = weight_grid(self.weight).join(self.weight_format)
        self._original = (linear,)
        self.register_state_dict_post_hook(_save_extra)
        self.register_load_state_dict_pre_hook(_load_extra)
        self.register_load_state_dict_post_hook(_link_grid)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After copying or unpickling: torch copies a Parameter without its attributes."""
        super().__setstate__(state)
        _link_grid(self)

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
        advance = self.training
        weight = self.weight_operand(advance=advance)
        activation = operand_of(x, self.activation_quantizer, advance=advance)
        product = _Product(self.product, activation, weight, self.gradient_quantizer, advance)
        return cast(
            Tensor, _QuantizedProduct.apply(x, self.weight, self.bias, activation.values, weight.values, product)
        )

    def weight_operand(self, *, advance: bool = False) -> Operand:
        """The weight this layer multiplies by, without gradient."""
        return self.weight_quantizer.operand(self.weight, advance=advance, own_scale=self.grid.scale)

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
        self.grid.fmt, self.grid.scale = after, None

    def original(self) -> nn.Linear:
        """The wrapped layer, holding the present Parameters, which belong to no grid any more."""
        (linear,) = self._original
        if hasattr(self.weight, "grid"):
            del self.weight.grid
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

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

    def __init__(self, embedding: nn.Embedding, linear: QuantizedLinear) -> None:
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm={embedding.max_norm} rewrites the weights on look-up; not with a quantized one")
        if embedding.sparse:
            raise ValueError("sparse=True: a quantized embedding has a dense gradient; use sparse=False")
        super().__init__()
        self.weight = embedding.weight
        self._linear, self._original = (linear,), (embedding,)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., width]; gradient straight through."""
        (embedding,), (linear,) = self._original, self._linear
        weight = cast(Tensor, _StraightThrough.apply(self.weight, linear.quantized_weight()))
        return functional.embedding(
            tokens, weight.to(self.weight.dtype), embedding.padding_idx, scale_grad_by_freq=embedding.scale_grad_by_freq
        )

    def original(self) -> nn.Embedding:
        """The wrapped layer, holding the present Parameter."""
        (embedding,) = self._original
        embedding.weight = self.weight
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        """Shape and role."""
        rows, width = self.weight.shape
        return f"{rows}, {width}, {self._linear[0].weight_quantizer.role} weight"


@dataclass(frozen=True)
class _Product:
    """What a product needs beside its tensors."""

    kind: Product
    activation: Operand
    weight: Operand
    gradient: RoleQuantizer | None
    advance: bool


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_values: Tensor,
        weight_values: Tensor,
        product: _Product,
    ) -> Tensor:
        ctx.save_for_backward(x_values, weight_values)
        ctx.product = product
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        rows = product.activation.with_values(x_values.reshape(-1, x_values.shape[-1]))
        # A low-precision GEMM writes BF16, after the bias.
        wanted = torch.float32 if product.activation.fmt is None else torch.bfloat16
        written = wanted if bias is None else torch.float32
        y = matmul_transposed(rows, product.weight, product.kind, written).view(*x.shape[:-1], weight.shape[0])
        if bias is not None:
            y = (y + bias.to(torch.float32)).to(wanted)
        # What follows on a GPU (attention, GELU) is many times as fast in BF16.
        return y if y.dtype == torch.bfloat16 and x.device.type in BF16_DEVICES else y.to(torch.float32).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_values, weight_values = ctx.saved_tensors
        product: _Product = ctx.product
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        rows = gradient.reshape(-1, gradient.shape[-1])
        operand = operand_of(rows, product.gradient, advance=product.advance)
        x = product.activation.with_values(x_values.reshape(-1, x_values.shape[-1]))
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            weight = product.weight.with_values(weight_values)
            written = torch.bfloat16 if x_dtype == torch.bfloat16 else torch.float32
            grad_x = matmul_transposed(operand, weight.transposed, product.kind, written)
            grad_x = grad_x.view(x_values.shape).to(x_dtype)
        if wants_weight:
            grad_weight = matmul_transposed(operand.transposed, x.transposed, product.kind).to(weight_dtype)
        if wants_bias:
            grad_bias = operand.numbers.sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _quantizer(value: str | FloatFormat | Role | None, key: int) -> RoleQuantizer | None:
    return None if value is None else RoleQuantizer(as_role(value), key)


def _save_extra(layer: QuantizedLinear, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Adds what a plain Linear's state has no place for, only where there is such a thing."""
    if layer.grid.scale is not None:
        state[f"{prefix}grid_scale"] = layer.grid.scale.clone()
    stateful = {name: quantizer for name, quantizer in layer.quantizers().items() if quantizer.has_state}
    if stateful:
        state[f"{prefix}quantizers"] = {name: quantizer.state_dict() for name, quantizer in stateful.items()}


def _load_extra(layer: QuantizedLinear, state: dict[str, Any], prefix: str, *_: object) -> None:
    scale = state.pop(f"{prefix}grid_scale", None)
    if scale is not None:
        layer.grid.scale = scale.clone().to(layer.weight.device)
    for name, saved in state.pop(f"{prefix}quantizers", {}).items():
        layer.quantizers()[name].load_state_dict(saved)


def _link_grid(layer: QuantizedLinear, *_: object) -> None:
    weight: Any = layer.weight
    weight.grid = layer.grid
