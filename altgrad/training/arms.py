"""The arms: AdamW with rounded weights, steps measured in the format's geometry, and momentum on the grid itself.

One meaning of the learning rate in all of them: the mean |change| per weight that AdamW would make with it. So a
learning-rate axis compares arms and formats, instead of deciding between them by accident of units. The original's
own units are there by name (`step_unit`, `normalize`, `precondition='gradient'`), for reproduction.

Each arm is a pure update on tensors; state, scales and counting are the plumbing of `optimizer.py`.
Sources: AdamW (arXiv 1711.05101); straight-through master weights (arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from altgrad.quantization import FloatFormat, format_scale, get_format, quantize, quantized_parameters, ulp
from altgrad.quantization.ops import code_index, hash_uniform, index_to_value, mix_seed
from altgrad.training.config import TrainConfig
from altgrad.training.optimizer import GridAwareOptimizer, StepCounts, count_step

Rounding = Literal["nearest", "stochastic"]


def adam_direction(grad: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's unit step m̂ / (√v̂ + eps); advances the moments in `state` (float32, of the gradient's shape)."""
    beta1, beta2 = betas
    step = float(state["step"])
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    return (state["exp_avg"] / denominator).div_(1 - beta1**step)


def literal_stiffness(weight: Tensor, fmt: FloatFormat, limit: float) -> Tensor:
    """S = 2^(floor(log2|w|) - M), 2^-M without an exponent; at zero the format's own smallest spacing."""
    if fmt.exponent_bits == 0:
        return torch.full_like(weight, 2.0**-fmt.mantissa_bits)
    exponent = torch.frexp(weight).exponent - 1
    stiffness = torch.ldexp(torch.ones_like(weight), exponent - fmt.mantissa_bits)
    smallest = 2.0 ** max(fmt.min_exponent - fmt.mantissa_bits, -126)
    return torch.where(weight == 0, smallest, stiffness).clamp_(max=limit)


def relative_stiffness(weight: Tensor, fmt: FloatFormat, scale: Tensor, limit: float) -> Tensor:
    """The local spacing over its mean in the tensor: mean 1, so that the learning rate keeps its meaning."""
    spacing = ulp(weight, fmt, scale)
    return (spacing / spacing.mean()).clamp_(max=limit)


def grid_velocity(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Momentum of the gradient: Adam-style normalized ('rms') or raw as in the original ('none')."""
    if group["normalize"] == "rms":
        return adam_direction(grad, state, (group["momentum"], group["beta2"]), group["eps"])
    velocity: Tensor = state["exp_avg"].mul_(group["momentum"]).add_(grad)
    return velocity.clone()


def local_gap(index: Tensor, fmt: FloatFormat, scale: Tensor) -> Tensor:
    """Half the distance between a grid point's two neighbours: the mean length of a rung up and a rung down.

    Where a binade begins the rung down is half as long as the rung up, so the spacing alone would overstate steps.
    """
    return (index_to_value(index + 1, fmt, scale) - index_to_value(index - 1, fmt, scale)) / 2


def split_rungs(rungs: Tensor, seed: int) -> Tensor:
    """floor(rungs + u), u uniform in [0, 1) by counter hash; whole rungs stay, zero never moves."""
    whole = rungs.floor()
    # Comparing the fraction is exact where adding u in float32 would round.
    return whole + (hash_uniform(rungs.shape, seed, rungs.device) < rungs - whole)


class _RoundedOptimizer(GridAwareOptimizer):
    """Arms that subtract a float32 change and then round (resident) or leave the rounding to the layer (master)."""

    def _change(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any],
                fmt: FloatFormat, scale: Tensor) -> Tensor:
        raise NotImplementedError

    def _plain_change(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        change = adam_direction(grad, state, group["betas"], group["eps"]).mul_(group["lr"])
        return change.add_(weight, alpha=group["lr"] * group["weight_decay"])

    def _update(self, parameter: Tensor, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any],
                fmt: FloatFormat, seed: int) -> StepCounts | None:
        rounding = group["rounding"]
        scale = self._scale(weight, state, group, fmt)
        change = self._change(weight, grad, state, group, fmt, scale)
        target = weight - change
        new = target if rounding is None else quantize(target, fmt, scale, rounding=rounding, seed=seed)
        counts = self._counts(weight, target, new, grad, fmt, scale) if self.telemetry else None
        parameter.copy_(new)
        if rounding is not None:
            overflow = (target.abs() > fmt.max * scale).count_nonzero()
            rescaled = self._rescale_on_overflow(parameter, state, fmt, overflow, rounding, mix_seed(seed, 1))
            if counts is not None:
                counts.overflow, counts.rescaled = overflow, rescaled
        return counts

    def _scale(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any], fmt: FloatFormat) -> Tensor:
        if group["rounding"] is not None:
            scale: Tensor = state["grid_scale"]
            return scale
        if group["tensor_scale"] is not None:
            return torch.tensor(float(group["tensor_scale"]), device=weight.device)
        return format_scale(weight, fmt)

    def _counts(self, old: Tensor, target: Tensor, new: Tensor, grad: Tensor, fmt: FloatFormat,
                scale: Tensor) -> StepCounts:
        change = target - old
        # Into a lower binade the way to the next code is the lower binade's spacing.
        spacing = torch.minimum(ulp(old, fmt, scale), ulp(target, fmt, scale))
        expected = (change.abs() / spacing).clamp_(max=1).sum()
        moved = code_index(old, fmt, scale) != code_index(new, fmt, scale)
        return count_step(moved, change, grad, expected, torch.zeros((), dtype=torch.int64, device=old.device))


class RoundedAdamW(_RoundedOptimizer):
    """AdamW (decoupled decay) whose weights are a float32 master or live on a format's grid.

    `rounding` None: master weights, the layers round them. 'nearest' (a negative control: small steps vanish) and
    'stochastic' (unbiased): the weights stay on the grid of `format` under one scale per tensor.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, format: str | None = "E5M2",
                 rounding: Rounding | None = None, tensor_scale: float | None = None, seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "format": format, "rounding": rounding, "tensor_scale": tensor_scale,
                                  "seed": seed})

    def _change(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any],
                fmt: FloatFormat, scale: Tensor) -> Tensor:
        return self._plain_change(weight, grad, state, group)


class ManifoldAdamW(_RoundedOptimizer):
    """AdamW whose step at a weight is proportional to the format's spacing there.

    `precondition='update'` multiplies Adam's unit step by the spacing over its mean in the tensor (`step_unit`
    'weight'), or by the spacing itself, so that lr counts ULPs ('ulp'). `precondition='gradient'` is the original
    formula: the gradient times S before the moments, which Adam's normalization nearly cancels. With
    `manifold_aware=False` it is AdamW. `max_stiffness` bounds the factor. For `rounding` see RoundedAdamW.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, format: str | None = "E5M2",
                 precondition: Literal["update", "gradient"] = "update", manifold_aware: bool = True,
                 max_stiffness: float = 1e6, rounding: Rounding | None = None,
                 step_unit: Literal["weight", "ulp"] = "weight", tensor_scale: float | None = None,
                 seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                                  "format": format, "precondition": precondition,
                                  "manifold_aware": manifold_aware, "max_stiffness": max_stiffness,
                                  "rounding": rounding, "step_unit": step_unit, "tensor_scale": tensor_scale,
                                  "seed": seed})

    def _change(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any],
                fmt: FloatFormat, scale: Tensor) -> Tensor:
        if not group["manifold_aware"]:
            return self._plain_change(weight, grad, state, group)
        limit = group["max_stiffness"]
        if group["precondition"] == "gradient":
            return self._plain_change(weight, grad * literal_stiffness(weight, fmt, limit), state, group)
        direction = adam_direction(grad, state, group["betas"], group["eps"])
        if group["step_unit"] == "ulp":
            direction.mul_(ulp(weight, fmt, scale))
        else:
            direction.mul_(relative_stiffness(weight, fmt, scale, limit))
        return direction.mul_(group["lr"]).add_(weight, alpha=group["lr"] * group["weight_decay"])


class GridOptim(GridAwareOptimizer):
    """Momentum in rungs: every weight moves by a whole number of grid points, drawn without bias.

    v = clamp(velocity · lr, ± rung_clip), r = floor(v + u) with u uniform in [0, 1), index -= r. `step_unit`
    'weight' turns lr into rungs by the tensor's mean spacing; 'rungs' takes it as it stands. `normalize='rms'`
    divides by the second moment like Adam, 'none' is the raw velocity of the original. With `carry` the fraction of
    a rung that was not taken is kept. `step()` returns (flips, updates): code changes, and weights whose update was
    not zero.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, format: str | None = "E4M3", momentum: float = 0.9,
                 weight_decay: float = 0.0, rung_clip: float = 10.0, normalize: Literal["rms", "none"] = "rms",
                 step_unit: Literal["weight", "rungs"] = "weight", carry: bool = False, beta2: float = 0.999,
                 eps: float = 1e-8, tensor_scale: float | None = None, seed: int = 0) -> None:
        if not rung_clip > 0:
            raise ValueError(f"rung_clip={rung_clip} must be positive (rungs)")
        super().__init__(params, {"lr": lr, "format": format, "momentum": momentum, "weight_decay": weight_decay,
                                  "rung_clip": rung_clip, "normalize": normalize, "step_unit": step_unit,
                                  "carry": carry, "beta2": beta2, "eps": eps, "tensor_scale": tensor_scale,
                                  "seed": seed})

    def _is_resident(self, group: dict[str, Any]) -> bool:
        return True

    @property
    def grid(self) -> Tensor:
        """The finite values of the default format, sorted, without any tensor's scale (float32)."""
        return get_format(self.defaults["format"]).values

    @property
    def master_p(self) -> list[Tensor]:
        """The float32 weights on the grid, in the order of the parameters (with `carry`, the exact positions)."""
        return [self._master(p, group) for group in self.param_groups for p in group["params"]]

    def _master(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        weight = parameter.detach().float()
        carry = self.state[parameter].get("carry")
        if carry is None or group["format"] is None:
            return weight
        fmt, scale = get_format(group["format"]), self.state[parameter]["grid_scale"]
        return weight + carry * ulp(weight, fmt, scale)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns (flips, updates) as ints, fetched in one sync."""
        super().step(closure)
        if not self.counts:
            return 0, 0
        totals = torch.stack([torch.stack([c.flips, c.applied]) for c in self.counts.values()]).sum(dim=0)
        flips, updates = totals.tolist()
        return int(flips), int(updates)

    def _plain_change(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        change = grid_velocity(grad, state, group).mul_(group["lr"])
        return change.add_(weight, alpha=group["lr"] * group["weight_decay"])

    def _update(self, parameter: Tensor, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any],
                fmt: FloatFormat, seed: int) -> StepCounts:
        scale = state["grid_scale"]
        index = code_index(weight, fmt, scale)
        rungs = self._rungs(weight, index, grad, state, group, fmt, scale)
        wanted = self._move(index, rungs, state, group, fmt, seed)
        new = wanted.clamp(-fmt.max_index, fmt.max_index)
        # A NaN has no code; it must stay visible to the guards.
        parameter.copy_(torch.where(weight.isnan(), weight, index_to_value(new, fmt, scale)))
        overflow = (wanted != new).count_nonzero()
        counts = count_step(new != index, rungs, grad, rungs.abs().clamp_(max=1).sum(), overflow)
        counts.rescaled = self._rescale_on_overflow(parameter, state, fmt, overflow, "stochastic",
                                                    mix_seed(seed, 1))
        return counts

    def _rungs(self, weight: Tensor, index: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any],
               fmt: FloatFormat, scale: Tensor) -> Tensor:
        rungs = grid_velocity(grad, state, group).mul_(group["lr"])
        if group["step_unit"] == "weight" or group["weight_decay"]:
            gap = local_gap(index, fmt, scale)
            in_weights = group["step_unit"] == "weight"
            if in_weights:
                rungs.div_(gap.mean())
            if group["weight_decay"]:
                decay = group["weight_decay"] * (group["lr"] if in_weights else 1.0)
                rungs.addcdiv_(weight, gap, value=decay)
        return rungs.clamp_(-group["rung_clip"], group["rung_clip"])

    def _move(self, index: Tensor, rungs: Tensor, state: dict[str, Any], group: dict[str, Any], fmt: FloatFormat,
              seed: int) -> Tensor:
        if not group["carry"]:
            return index - split_rungs(rungs, seed).to(index.dtype)
        carry = state.setdefault("carry", torch.zeros_like(rungs))
        # The position is index + carry; only the carry is kept as a fraction, so the sum never loses its low bits.
        whole = split_rungs(carry - rungs, seed)
        limit = int(group["rung_clip"])
        moved = torch.where(rungs != 0, whole.clamp_(-limit, limit), 0).to(index.dtype)
        new = index + moved
        inside = new.clamp(-fmt.max_index, fmt.max_index)
        left = (carry - rungs - (inside - index)).clamp_(-fmt.max_index - inside, fmt.max_index - inside)
        state["carry"] = torch.where(rungs != 0, left, carry)
        return new


def build_optimizer(config: TrainConfig, model: nn.Module) -> GridAwareOptimizer:
    """The arm of a TrainConfig over a (converted) model.

    One parameter group per weight format found in the model, and one without format for the rest (norms, positions),
    which takes the arm's float32 rule.
    """
    formats = {parameter: fmt for parameter, fmt in quantized_parameters(model).values()}
    groups: dict[str | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        fmt = formats.get(parameter)
        groups.setdefault(None if fmt is None else fmt.name, []).append(parameter)
    params = [{"params": members, "format": name} for name, members in groups.items()]
    o = config.optimizer
    fmt_name = next((name for name in groups if name is not None), None)
    common: dict[str, Any] = {"lr": o.lr, "weight_decay": o.weight_decay, "format": fmt_name, "seed": config.seed}
    if o.kind == "grid":
        return GridOptim(params, momentum=o.momentum, beta2=o.beta2, rung_clip=o.rung_clip, normalize=o.normalize,
                         step_unit=o.step_unit, carry=o.carry, **common)
    common |= {"betas": (o.beta1, o.beta2), "eps": o.eps, "rounding": o.rounding}
    if o.kind == "manifold":
        return ManifoldAdamW(params, precondition=o.precondition, step_unit=o.step_unit,
                             max_stiffness=o.max_stiffness, **common)
    return RoundedAdamW(params, **common)
