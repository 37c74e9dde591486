"""The arms as optimizers: rounded weights, steps measured in the format's geometry; and the choice among all arms.

One meaning of the learning rate in all Adam-like arms: the mean |change| per weight that AdamW would make with it. So a
learning-rate axis compares arms and formats, instead of deciding between them by accident of units. The original's
own units are there by name (`step_unit`, `precondition='gradient'`), for reproduction; the other rules state theirs
in `rules`.

A class here is a signature and a `Plan`; state, scales and counting are the plumbing of `optimizer`.
Sources: AdamW (arXiv 1711.05101); straight-through master weights (arXiv 1308.3432); error feedback into the
momentum, ECO (arXiv 2601.22101).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from altgrad.quantization import FloatFormat, get_format, quantized_parameters
from altgrad.training.arm_configs import AnyOptimizerConfig
from altgrad.training.config import TrainConfig
from altgrad.training.grid_optim import GridOptim
from altgrad.training.kernels import Counting, Geometry, Job, Moments, Placement, Plan
from altgrad.training.optimizer import GridAwareOptimizer, Rounding
from altgrad.training.optimizer_groups import LayersFormat, parameter_groups
from altgrad.training.optimizer_state import is_sharded, put_back, whole
from altgrad.training.rules import RULES

_PLACEMENTS = {None: Placement.MASTER, "nearest": Placement.NEAREST, "stochastic": Placement.STOCHASTIC}


class RoundedAdamW(GridAwareOptimizer):
    """AdamW (decoupled decay) whose weights are a float32 master or live on a format's grid.

    `rounding` None: master weights, the layers round them. 'nearest' (a negative control: small steps vanish) and
    'stochastic' (unbiased): the weights stay on the grid of `format` under one scale per tensor. With
    `error_feedback` what rounding took from a step is put into the first moment, so that later steps repay it (ECO).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        format: str | None = LayersFormat("E5M2"),
        rounding: Rounding | None = None,
        tensor_scale: float | None = None,
        seed: int = 0,
        error_feedback: bool = False,
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
            "error_feedback": error_feedback,
        }
        super().__init__(params, defaults | own)

    def _plan(self, group: dict[str, Any]) -> Plan:
        return adam_plan(group, self._counting(group), error_feedback=group["error_feedback"])


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
        format: str | None = LayersFormat("E5M2"),
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

    def _plan(self, group: dict[str, Any]) -> Plan:
        geometry = Geometry.NONE
        if group["manifold_aware"]:
            update = Geometry.ULP if group["step_unit"] == "ulp" else Geometry.RELATIVE
            geometry = Geometry.GRADIENT if group["precondition"] == "gradient" else update
        return adam_plan(group, self._counting(group), geometry=geometry, max_stiffness=group["max_stiffness"])


class RoundedOptimizer(GridAwareOptimizer):
    """Any rule of `RULES` by name, its weights a float32 master or on a format's grid, as in RoundedAdamW.

    `lr`, `momentum` and `beta2` default to the rule's own; the unit of lr is the rule's (`RULES[rule].unit`). Groups
    may have rules of their own, 'adam' among them (betas `momentum` and `beta2`); it is taken for tensors with fewer
    axes than the rule needs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: str,
        lr: float | None = None,
        momentum: float | None = None,
        beta2: float | None = None,
        weight_decay: float = 0.0,
        format: str | None = LayersFormat("E5M2"),
        rounding: Rounding | None = "stochastic",
        tensor_scale: float | None = None,
        seed: int = 0,
        eps: float = 1e-8,
    ) -> None:
        known = RULES[rule].defaults if rule in RULES else {}
        defaults = {
            "rule": rule,
            "lr": known.get("lr", 1e-3) if lr is None else lr,
            "momentum": known.get("momentum", 0.9) if momentum is None else momentum,
            "beta2": known.get("beta2", 0.95) if beta2 is None else beta2,
            "weight_decay": weight_decay,
            "format": format,
            "rounding": rounding,
            "tensor_scale": tensor_scale,
            "seed": seed,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def _plan(self, group: dict[str, Any]) -> Plan:
        own = group | {"betas": (group["momentum"], group["beta2"])}
        moments = Moments.ADAM if group["rule"] == "adam" else Moments.GIVEN
        return adam_plan(own, self._counting(group), moments=moments)

    def _own_plan(self, parameter: Tensor, group: dict[str, Any], plan: Plan) -> Plan:
        is_too_flat = plan.moments == Moments.GIVEN and parameter.dim() < RULES[group["rule"]].least_axes
        return replace(plan, moments=Moments.ADAM) if is_too_flat else plan

    def _moments(self, plan: Plan, parameter: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
        plan = self._own_plan(parameter, group, plan)
        return RULES[group["rule"]].state if plan.moments == Moments.GIVEN else super()._moments(plan, parameter, group)

    def _job(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], index: int, plan: Plan) -> tuple[Plan, Job]:
        plan, job = super()._job(parameter, grad, group, index, self._own_plan(parameter, group, plan))
        if plan.moments == Moments.GIVEN:
            job.direction = self._direction(parameter, job, group)
        return plan, job

    def _direction(self, parameter: Tensor, job: Job, group: dict[str, Any]) -> Tensor:
        rule, state, grad = RULES[group["rule"]], self.state[parameter], job.grad.float()
        own = {name: whole(state[name]) for name in rule.state}
        direction, new = rule.update(grad, job.weight.float(), own, group, job.step + 1)
        is_finite = torch.isfinite(grad).all()
        for name, value in new.items():
            kept = torch.where(is_finite, value, own[name])
            if is_sharded(state[name]):
                put_back(state[name], kept)
            else:
                state[name] = self._own[parameter][name] = kept
        # The kernel has no part in these.
        job.first = job.second = None
        return direction.contiguous()


def adam_plan(
    group: Mapping[str, Any],
    counting: Counting,
    *,
    moments: Moments = Moments.ADAM,
    geometry: Geometry = Geometry.NONE,
    max_stiffness: float = 1e6,
    error_feedback: bool = False,
) -> Plan:
    """The plan of an arm whose weights are a master or on the grid; without a format it is the plain rule."""
    has_format = group["format"] is not None
    return Plan(
        fmt=get_format(group["format"]) if has_format else None,
        moments=moments,
        geometry=geometry if has_format else Geometry.NONE,
        placement=_PLACEMENTS[group["rounding"]] if has_format else Placement.MASTER,
        lr=float(group["lr"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        max_stiffness=max_stiffness,
        feedback=error_feedback and has_format,
        counting=counting,
        master_scale=group["tensor_scale"] if group["rounding"] is None else None,
    )


def build_optimizer(
    config: TrainConfig, model: nn.Module, formats: Mapping[nn.Parameter, FloatFormat] | None = None
) -> GridAwareOptimizer:
    """The arm of a TrainConfig over a (converted) model.

    One parameter group per weight format, and one without format for the rest (norms, positions), which takes the
    arm's float32 rule. `formats`: which parameter has which, by default those the model's layers round to.
    """
    return arm_optimizer(config.optimizer, model, weight_formats(model) if formats is None else formats, config.seed)


def arm_optimizer(
    config: AnyOptimizerConfig, model: nn.Module, formats: Mapping[nn.Parameter, FloatFormat], seed: int
) -> GridAwareOptimizer:
    """The optimizer of an arm; see `build_optimizer`."""
    rule = config.kind if config.kind in RULES else None
    params = parameter_groups(model, formats, rule)
    own = config.model_dump(exclude={"kind", "quantized"})
    shared: dict[str, Any] = {"format": next((f.name for f in formats.values()), None), "seed": seed}
    if config.kind == "grid":
        return GridOptim(params, **own, **shared)
    if rule is not None:
        return RoundedOptimizer(params, rule, **own, **shared)
    shared["betas"] = (own.pop("beta1"), own.pop("beta2"))
    arm = ManifoldAdamW if config.kind == "manifold" else RoundedAdamW
    return arm(params, **own, **shared)


def weight_formats(model: nn.Module) -> dict[nn.Parameter, FloatFormat]:
    """Which parameter of a converted model has which format."""
    return dict(quantized_parameters(model).values())
