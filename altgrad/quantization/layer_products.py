"""The two products of a quantized layer, forward and backward, as autograd sees them.

`EmulatedProduct` is what a CPU trains with: operands that one kernel has rounded each, three plain float32 products
between them, and the output rounded where it lies. `QuantizedProduct` is everything else: operands in any carrier,
hardware units, tensors that torch records or stands in for. Which of them it is, is decided before autograd is asked:
a Function that fails half-way would leave histories and draws behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from altgrad.quantization.kernels.operand_dispatch import operand_kernels
from altgrad.quantization.products import BF16_DEVICES, Operand, Product, matmul_transposed
from altgrad.quantization.roles import RoleQuantizer, operand_of, values_of


@dataclass(frozen=True)
class ProductRoles:
    """What a product needs beside its tensors."""

    kind: Product
    activation: Operand
    weight: Operand
    gradient: RoleQuantizer | None
    advance: bool


class StraightThrough(torch.autograd.Function):
    """Values in a weight's place; the gradient passes to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class QuantizedProduct(torch.autograd.Function):
    """y = x Wᵀ + b of operands in any carrier, on any device."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_values: Tensor,
        weight_values: Tensor,
        product: ProductRoles,
    ) -> Tensor:
        ctx.save_for_backward(x_values, weight_values)
        ctx.product = product
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        rows = product.activation.with_values(x_values.reshape(-1, x_values.shape[-1]))
        # A low-precision GEMM writes BF16, after the bias.
        wanted = torch.float32 if product.activation.fmt is None else torch.bfloat16
        matrix = product.weight.with_values(weight_values)
        y = matmul_transposed(rows, matrix, product.kind, wanted, bias).view(*x.shape[:-1], weight.shape[0])
        # What follows on a GPU (attention, GELU) is many times as fast in BF16.
        return y if y.dtype == torch.bfloat16 and x.device.type in BF16_DEVICES else y.to(torch.float32).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(gradient)
        x_values, weight_values = ctx.saved_tensors
        product: ProductRoles = ctx.product
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


class EmulatedProduct(torch.autograd.Function):
    """y = x Wᵀ + b of rounded float32 values on a CPU: `x_values` [..., K] of x, `weight_values` of W [N, K].

    `gradient`: the role of y's gradient; `rounds`: whether y is rounded to BF16, `advance`: see `RoleQuantizer`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_values: Tensor,
        weight_values: Tensor,
        gradient: RoleQuantizer | None,
        rounds: bool,
        advance: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_values, weight_values)
        ctx.role = gradient, advance
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        y = _finished(_in_float32(functional.linear, x_values, weight_values), bias, rounds=rounds)
        return y if x.dtype is torch.float32 else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(gradient)
        x_values, weight_values = ctx.saved_tensors
        quantizer, advance = ctx.role
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        values = values_of(gradient, quantizer, advance=advance)
        if values is None:
            values = operand_of(gradient, quantizer, advance=advance).numbers
        rows = values.reshape(-1, values.size(-1))
        grad_x = grad_weight = grad_bias = None
        if wants_x:
            # By rows: of axes that do not fold into one torch makes a batch of products, which sum in another order.
            grad_x = _in_float32(torch.mm, rows, weight_values).view(x_values.shape)
            grad_x = grad_x if x_dtype is torch.float32 else grad_x.to(x_dtype)
        if wants_weight:
            grad_weight = _in_float32(torch.mm, rows.t(), x_values.view(-1, x_values.size(-1)))
            grad_weight = grad_weight if weight_dtype is torch.float32 else grad_weight.to(weight_dtype)
        if wants_bias:
            grad_bias = rows.sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _in_float32(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The product, whatever autocast would make of it."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return product(a, b)
    return product(a, b)


def _finished(y: Tensor, bias: Tensor | None, *, rounds: bool) -> Tensor:
    """y [..., N] plus the bias; rounded to BF16, which a low-precision GEMM writes, after the bias. Overwrites y."""
    kernels = operand_kernels(y) if rounds else None
    if kernels is not None and bias is None:
        kernels.round_in_place(y)
        return y
    added = None if bias is None else bias.detach().to(torch.float32)
    fits = added is not None and added.shape == y.shape[-1:]
    if kernels is not None and added is not None and fits and operand_kernels(added) is not None:
        kernels.add_bias_and_round(y, added)
        return y
    y = y if added is None else y.add_(added)
    return y.to(torch.bfloat16).to(torch.float32) if rounds else y


def refuse_second_derivative(gradient: Tensor) -> None:
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and gradient.requires_grad:
        raise NotImplementedError(
            "no second derivative through a quantized layer (backward with create_graph=True): rounding has none"
        )
