"""Momentum on the grid itself: the unit of motion is a rung, one step on the format's ordered list of values.

    v = clamp(velocity · lr, ± rung_clip)        in rungs, a real number
    r = floor(v + u), u uniform in [0, 1)        a whole number of rungs, unbiased
    index -= r

The original's form (raw velocity, lr in rungs) stalls or explodes with the loss's scale. The default normalizes the
velocity like Adam and turns the learning rate into rungs by the tensor's mean distance between neighbouring values,
so that it means what it means in AdamW: the mean |change| of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from altgrad.quantization import FloatFormat, code_index, get_format, hash_uniform, index_to_value, ulp
from altgrad.training.moments import adam_direction
from altgrad.training.optimizer import GridAwareOptimizer, StepCounts, TensorStep


def grid_velocity(step: TensorStep) -> Tensor:
    """Momentum of the gradient: Adam-style normalized ('rms') or raw as in the original ('none')."""
    group = step.group
    if group["normalize"] == "rms":
        return adam_direction(step.grad, step.state, (group["momentum"], group["beta2"]), group["eps"])
    velocity: Tensor = step.state["exp_avg"].mul_(group["momentum"]).add_(step.grad)
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


class GridOptim(GridAwareOptimizer):
    """Every weight moves by a whole number of grid points, drawn without bias and clipped by `rung_clip` (rungs).

    `step_unit` 'weight' turns lr into rungs by the tensor's mean gap; 'rungs' takes it as it stands. `normalize`
    'rms' divides by the second moment like Adam, 'none' is the raw velocity of the original. With `carry` the
    fraction of a rung that was not taken is kept. `step()` returns (flips, updates): code changes, and weights whose
    update was not zero. Weights loaded after construction are taken at their nearest grid point.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        format: str | None = "E4M3",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        rung_clip: float = 10.0,
        normalize: Literal["rms", "none"] = "rms",
        step_unit: Literal["weight", "rungs"] = "weight",
        carry: bool = False,
        beta2: float = 0.999,
        eps: float = 1e-8,
        tensor_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "format": format,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rung_clip": rung_clip,
            "normalize": normalize,
            "step_unit": step_unit,
            "carry": carry,
            "beta2": beta2,
            "eps": eps,
            "tensor_scale": tensor_scale,
            "seed": seed,
        }
        super().__init__(params, defaults)

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
        offset: Tensor = carry * ulp(weight, group["format"], self.state[parameter]["grid_scale"])
        return weight + offset

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns (flips, updates) as ints, fetched in one sync."""
        super().step(closure)
        if not self.counts:
            return 0, 0
        totals = torch.stack([torch.stack([c.flips, c.applied]) for c in self.counts.values()]).sum(dim=0)
        flips, updates = totals.tolist()
        return int(flips), int(updates)

    def _plain_change(self, step: TensorStep) -> Tensor:
        change = grid_velocity(step).mul_(step.group["lr"])
        return change.add_(step.weight, alpha=step.group["lr"] * step.group["weight_decay"])

    def _update(self, step: TensorStep) -> StepCounts:
        fmt, scale = step.fmt, step.state["grid_scale"]
        index = code_index(step.weight, fmt, scale)
        rungs = self._rungs(step, index, scale)
        wanted = self._move(step, index, rungs)
        new = wanted.clamp(-fmt.max_index, fmt.max_index)
        # A NaN has no code; it must stay visible to the guards.
        value = torch.where(step.weight.isnan(), step.weight, index_to_value(new, fmt, scale))
        step.parameter.copy_(value)
        overflow = (wanted != new).count_nonzero()
        counts = step.counted(new != index, rungs, rungs.abs().clamp_(max=1).sum(), overflow)
        counts.rescaled = self._rescale_on_overflow(step, overflow, "stochastic")
        return counts

    def _rungs(self, step: TensorStep, index: Tensor, scale: Tensor) -> Tensor:
        group = step.group
        in_weights = group["step_unit"] == "weight"
        rungs = grid_velocity(step).mul_(group["lr"])
        if in_weights or group["weight_decay"]:
            gap = local_gap(index, step.fmt, scale)
            if in_weights:
                rungs.div_(gap.mean())
            decay = group["weight_decay"] * (group["lr"] if in_weights else 1.0)
            rungs.addcdiv_(step.weight, gap, value=decay)
        return rungs.clamp_(-group["rung_clip"], group["rung_clip"])

    def _move(self, step: TensorStep, index: Tensor, rungs: Tensor) -> Tensor:
        """The index wanted, before the ends of the grid are minded."""
        if not step.group["carry"]:
            return index - split_rungs(rungs, step.seed).to(index.dtype)
        carry = step.state.setdefault("carry", torch.zeros_like(rungs))
        # The position is index + carry; only the fraction is kept, so the sum never loses its low bits.
        whole = split_rungs(carry - rungs, step.seed)
        limit = int(step.group["rung_clip"])
        wanted = index + torch.where(rungs != 0, whole.clamp_(-limit, limit), 0).to(index.dtype)
        end = step.fmt.max_index
        inside = wanted.clamp(-end, end)
        left = torch.clamp(carry - rungs - (inside - index), -end - inside, end - inside)
        step.state["carry"] = torch.where(rungs != 0, left, carry)
        return wanted
