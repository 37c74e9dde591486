"""What every arm shares: where the weights live, who owns the scale, how steps are counted, exact resume.

A master arm (`rounding=None`) keeps float32 weights; the layer rounds them at each use under the current amax
scale, and the gradient passes straight through. A resident arm keeps the weights on the format's grid; it owns one
power-of-two scale per tensor, with twofold head-room, which the layer reads from the parameter (`grid_scale`), so
that the layer is the identity on such weights. A scale doubles only when more than one weight in a thousand left
the grid for three steps in a row; that is counted as an event.

Flips are differences of integer codes under one scale. `expected` is the sum of min(1, |change| / spacing): what
unbiased rounding would realise. Their quotient, the flip yield, tells a step that reaches the weights from one that
rounding swallows. Randomness is a counter hash of (seed, parameter, step, element): reproducible, with no state of
its own but the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from altgrad.quantization import FloatFormat, compute_scale, get_format, mix_seed, quantize

HEADROOM = 2.0
OVERFLOW_SHARE = 1e-3
OVERFLOW_STEPS = 3
GRADIENT_FLOOR = 1e-10

Rounding = Literal["nearest", "stochastic"]


@dataclass
class StepCounts:
    """What one step did to one tensor, as 0-d tensors: `expected` is in codes, the rest are element counts."""

    flips: Tensor
    applied: Tensor
    gradient: Tensor
    expected: Tensor
    overflow: Tensor
    rescaled: bool = False


@dataclass
class TensorStep:
    """One parameter's share of a step: `weight` and `grad` are float32, `state` and `group` the optimizer's own."""

    parameter: Tensor
    weight: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]
    seed: int

    @property
    def fmt(self) -> FloatFormat:
        return get_format(self.group["format"])

    def counted(
        self, moved: Tensor, applied: Tensor, expected: Tensor, overflow: Tensor | None
    ) -> StepCounts:
        """The counts of this step from masks or values that are non-zero where something happened."""
        if overflow is None:
            overflow = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        return StepCounts(
            flips=moved.count_nonzero(),
            applied=applied.count_nonzero(),
            gradient=(self.grad.abs() > GRADIENT_FLOOR).count_nonzero(),
            expected=expected,
            overflow=overflow,
        )


class GridAwareOptimizer(torch.optim.Optimizer):
    """Plumbing shared by the arms: state, scales, randomness, counting, exact resume.

    A parameter group may carry its own `format` (a name, or None for plain float32 parameters such as norms).
    `counts` holds each parameter's `StepCounts` of the last step, `skipped` the number of tensors whose gradient was
    not finite in it; set `telemetry = False` to leave the counting out (the weights are the same, bit for bit).
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.telemetry = True
        self.counts: dict[Tensor, StepCounts] = {}
        self.skipped = 0
        if defaults["lr"] < 0:
            raise ValueError(f"lr={defaults['lr']} must not be negative")
        if defaults["format"] is not None:
            defaults["format"] = get_format(defaults["format"]).name
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["format"] is not None and self._is_resident(group):
            for parameter in group["params"]:
                self._place_on_grid(parameter, group)

    def _is_resident(self, group: dict[str, Any]) -> bool:
        return group.get("rounding") is not None

    @torch.no_grad()
    def _place_on_grid(self, parameter: Any, group: dict[str, Any]) -> None:
        fmt = get_format(group["format"])
        if group["tensor_scale"] is not None:
            scale = torch.tensor(float(group["tensor_scale"]), device=parameter.device)
        elif fmt.total_bits > 8:
            scale = torch.tensor(1.0, device=parameter.device)
        else:
            scale = compute_scale(parameter, fmt, power_of_two=True, headroom=HEADROOM)
        self.state[parameter].update(grid_scale=scale, overflow_streak=0)
        parameter.grid_scale = scale
        parameter.copy_(quantize(parameter.float(), fmt, scale))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.counts, self.skipped = {}, 0
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_tensor(parameter, group, index)
                index += 1
        return loss

    def _step_tensor(self, parameter: Tensor, group: dict[str, Any], index: int) -> None:
        assert parameter.grad is not None
        grad = parameter.grad.float()
        if not torch.isfinite(grad).all():
            self.skipped += 1
            return
        state = self._state(parameter)
        state["step"] += 1
        seed = mix_seed(group["seed"], index, int(state["step"]))
        step = TensorStep(parameter, parameter.float(), grad, state, group, seed)
        if group["format"] is None:
            parameter.copy_(step.weight - self._plain_change(step))
            return
        counts = self._update(step)
        if counts is not None:
            self.counts[parameter] = counts

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def _plain_change(self, step: TensorStep) -> Tensor:
        """What is subtracted from a float32 parameter that has no format; an arm's own rule."""
        raise TypeError(f"{type(self).__name__} defines no rule for parameters without a format")

    def _update(self, step: TensorStep) -> StepCounts | None:
        """Steps a parameter that has a format; an arm's own rule."""
        raise TypeError(f"{type(self).__name__} defines no rule for parameters with a format")

    def _rescale_on_overflow(self, step: TensorStep, overflow: Tensor, rounding: Rounding) -> bool:
        """Doubles the tensor's scale after sustained overflow; returns whether it did."""
        parameter: Any = step.parameter
        state, fmt = step.state, step.fmt
        crowded = float(overflow) > OVERFLOW_SHARE * parameter.numel()
        state["overflow_streak"] = state["overflow_streak"] + 1 if crowded else 0
        if state["overflow_streak"] < OVERFLOW_STEPS or fmt.total_bits > 8:
            return False
        state["overflow_streak"] = 0
        state["grid_scale"] = parameter.grid_scale = state["grid_scale"] * 2
        seed = mix_seed(step.seed, 1)
        parameter.copy_(quantize(parameter.float(), fmt, state["grid_scale"], rounding=rounding, seed=seed))
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state exactly: torch casts state to the parameter's dtype, which would lose bits."""
        super().load_state_dict(state_dict)
        parameters: list[Any] = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    value = value.detach().clone().to("cpu" if name == "step" else parameter.device)
                self.state[parameter][name] = value
                if name == "grid_scale":
                    parameter.grid_scale = value
