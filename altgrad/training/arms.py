"""The AdamW arms: rounded weights, and steps measured in the format's geometry; and the choice among all arms.

One meaning of the learning rate in all of them: the mean |change| per weight that AdamW would make with it. So a
learning-rate axis compares arms and formats, instead of deciding between them by accident of units. The original's
own units are there by name (`step_unit`, `precondition='gradient'`), for reproduction.

Each arm is a pure update on tensors; state, scales and counting are the plumbing of `optimizer.py`.
Sources: AdamW (arXiv 1711.05101); straight-through master weights (arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from altgrad.quantization import FloatFormat, code_index, format_scale, quantize, quantized_parameters, ulp
from altgrad.training.config import TrainConfig
from altgrad.training.grid_optim import GridOptim
from altgrad.training.moments import adam_direction
from altgrad.training.optimizer import GridAwareOptimizer, Rounding, StepCounts, TensorStep


def literal_stiffness(weight: Tensor, fmt: FloatFormat, limit: float) -> Tensor:
    """S = 2^(floor(log2|w|) - M), 2^-M without an exponent; at zero the format's own smallest spacing."""
    if fmt.exponent_bits == 0:
        return torch.full_like(weight, fmt.min_spacing)
    exponent = torch.frexp(weight).exponent - 1
    stiffness = torch.ldexp(torch.ones_like(weight), exponent - fmt.mantissa_bits)
    return torch.where(weight == 0, fmt.min_spacing, stiffness).clamp_(max=limit)


def relative_stiffness(weight: Tensor, fmt: FloatFormat, scale: Tensor, limit: float) -> Tensor:
    """The local spacing over its mean in the tensor: mean 1, so that the learning rate keeps its meaning."""
    spacing = ulp(weight, fmt, scale)
    return (spacing / spacing.mean()).clamp_(max=limit)


class RoundedAdamW(GridAwareOptimizer):
    """AdamW (decoupled decay) whose weights are a float32 master or live on a format's grid.

    `rounding` None: master weights, the layers round them. 'nearest' (a negative control: small steps vanish) and
    'stochastic' (unbiased): the weights stay on the grid of `format` under one scale per tensor.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        format: str | None = "E5M2",
        rounding: Rounding | None = None,
        tensor_scale: float | None = None,
        seed: int = 0,
        **own: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "format": format,
            "rounding": rounding,
            "tensor_scale": tensor_scale,
            "seed": seed,
        }
        super().__init__(params, defaults | own)

    def _plain_change(self, step: TensorStep) -> Tensor:
        group = step.group
        change = adam_direction(step.grad, step.state, group["betas"], group["eps"]).mul_(group["lr"])
        return change.add_(step.weight, alpha=group["lr"] * group["weight_decay"])

    def _change(self, step: TensorStep, scale: Tensor) -> Tensor:
        """What is subtracted from a parameter that has a format."""
        return self._plain_change(step)

    def _update(self, step: TensorStep) -> StepCounts | None:
        rounding, fmt = step.group["rounding"], step.fmt
        scale = self._scale(step)
        target = step.weight - self._change(step, scale)
        new = target if rounding is None else quantize(target, fmt, scale, rounding=rounding, seed=step.seed)
        # What counts is what the parameter's own dtype keeps.
        new = new.to(step.parameter.dtype).float()
        counts = self._counts(step, target, new, scale) if self.telemetry else None
        step.parameter.copy_(new)
        if rounding is not None:
            overflow = (target.abs() > fmt.max * scale).count_nonzero()
            rescaled = self._rescale_on_overflow(step, overflow, rounding)
            if counts is not None:
                counts.overflow, counts.rescaled = overflow, rescaled
        return counts

    def _scale(self, step: TensorStep) -> Tensor:
        if step.group["rounding"] is not None:
            scale: Tensor = step.state["grid_scale"]
            return scale
        if step.group["tensor_scale"] is not None:
            return torch.tensor(float(step.group["tensor_scale"]), device=step.weight.device)
        return format_scale(step.weight, step.fmt)

    def _counts(self, step: TensorStep, target: Tensor, new: Tensor, scale: Tensor) -> StepCounts:
        old, fmt = step.weight, step.fmt
        change = (new if step.group["rounding"] is None else target) - old
        # Into a lower binade the way to the next code is the lower binade's spacing.
        spacing = torch.minimum(ulp(old, fmt, scale), ulp(target, fmt, scale))
        expected = (change.abs() / spacing).clamp_(max=1).sum()
        moved = code_index(old, fmt, scale) != code_index(new, fmt, scale)
        return step.counted(moved, change, expected, overflow=None)


class ManifoldAdamW(RoundedAdamW):
    """AdamW whose step at a weight is proportional to the format's spacing there.

    `precondition='update'` multiplies Adam's unit step by the spacing over its mean in the tensor (`step_unit`
    'weight'), or by the spacing itself, so that lr counts ULPs ('ulp'). `precondition='gradient'` is the original
    formula: the gradient times S before the moments, which Adam's normalization nearly cancels. With
    `manifold_aware=False` it is AdamW. `max_stiffness` bounds the factor. For `rounding` see RoundedAdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        format: str | None = "E5M2",
        precondition: Literal["update", "gradient"] = "update",
        manifold_aware: bool = True,
        max_stiffness: float = 1e6,
        rounding: Rounding | None = None,
        step_unit: Literal["weight", "ulp"] = "weight",
        tensor_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            format,
            rounding,
            tensor_scale,
            seed,
            precondition=precondition,
            manifold_aware=manifold_aware,
            max_stiffness=max_stiffness,
            step_unit=step_unit,
        )

    def _change(self, step: TensorStep, scale: Tensor) -> Tensor:
        group, fmt = step.group, step.fmt
        if not group["manifold_aware"]:
            return self._plain_change(step)
        if group["precondition"] == "gradient":
            step.grad = step.grad * literal_stiffness(step.weight, fmt, group["max_stiffness"])
            return self._plain_change(step)
        direction = adam_direction(step.grad, step.state, group["betas"], group["eps"])
        if group["step_unit"] == "ulp":
            direction.mul_(ulp(step.weight, fmt, scale))
        else:
            direction.mul_(relative_stiffness(step.weight, fmt, scale, group["max_stiffness"]))
        return direction.mul_(group["lr"]).add_(step.weight, alpha=group["lr"] * group["weight_decay"])


def build_optimizer(config: TrainConfig, model: nn.Module) -> GridAwareOptimizer:
    """The arm of a TrainConfig over a (converted) model.

    One parameter group per weight format found in the model, and one without format for the rest (norms, positions),
    which takes the arm's float32 rule.
    """
    formats = {parameter: fmt.name for parameter, fmt in quantized_parameters(model).values()}
    groups: dict[str | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(formats.get(parameter), []).append(parameter)
    params = [{"params": members, "format": name} for name, members in groups.items()]
    own = config.optimizer.model_dump(exclude={"kind", "beta1"})
    shared: dict[str, Any] = {"format": next(iter(filter(None, groups)), None), "seed": config.seed}
    if config.optimizer.kind == "grid":
        return GridOptim(params, **own, **shared)
    shared["betas"] = (config.optimizer.beta1, own.pop("beta2"))
    arm = ManifoldAdamW if config.optimizer.kind == "manifold" else RoundedAdamW
    return arm(params, **own, **shared)
