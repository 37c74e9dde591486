"""What every arm shares: where the weights live, who owns the scale, how steps are counted, exact resume.

A master arm (`rounding=None`) keeps float32 weights; the layer rounds them at each use under the current amax
scale, and the gradient passes straight through. A resident arm keeps the weights on the format's grid; it owns one
power-of-two scale per tensor, with twofold head-room, which the layer shares (`WeightGrid`), so that the layer is the
identity on such weights. A scale doubles only when more than one weight in a thousand left
the grid for three steps in a row; that is counted as an event.

Flips are differences of integer codes under one scale. `expected` is the sum of min(1, |change| / spacing): what
unbiased rounding would realise. Their quotient, the flip yield, tells a step that reaches the weights from one that
rounding swallows. Randomness is a counter hash of (seed, parameter, step, element): reproducible, with no state of
its own but the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from altgrad.quantization import FloatFormat, compute_scale, get_format, mix_seed, quantize, weight_grid

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


RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number >= 0", lambda value: 0 <= value < math.inf),
    "eps": ("a number > 0", lambda value: 0 < value < math.inf),
    "weight_decay": ("a number >= 0", lambda value: 0 <= value < math.inf),
    "betas": ("two numbers in [0, 1)", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value)),
    "momentum": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "beta2": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "max_stiffness": ("a number > 0", lambda value: value > 0),
    "rung_clip": ("a number > 0, in rungs", lambda value: value > 0),
    "tensor_scale": ("None or a number > 0", lambda value: value is None or 0 < value < math.inf),
    "rounding": ("None, 'nearest' or 'stochastic'", lambda value: value in (None, "nearest", "stochastic")),
    "precondition": ("'update' or 'gradient'", lambda value: value in ("update", "gradient")),
    "normalize": ("'rms' or 'none'", lambda value: value in ("rms", "none")),
    "step_unit": ("'weight', or the arm's own unit", lambda value: value in ("weight", "ulp", "rungs")),
}
"""What each argument of an arm may be, in words and as a test."""


def check_arguments(group: dict[str, Any]) -> None:
    """Raises ValueError that names the first argument out of its range, its value and what is allowed."""
    for name, value in group.items():
        if name in RANGES and not RANGES[name][1](value):
            raise ValueError(f"{name}={value!r} is not allowed: {RANGES[name][0]}")
    own_unit = "rungs" if "rung_clip" in group else "ulp"
    if group.get("step_unit", "weight") not in ("weight", own_unit):
        raise ValueError(f"step_unit={group['step_unit']!r} is not allowed: 'weight' or {own_unit!r}")
    if group.get("carry") and group["rung_clip"] < 1:
        raise ValueError(f"rung_clip={group['rung_clip']} is not allowed with carry: at least 1, one whole rung")
    if group.get("format") is not None:
        get_format(group["format"])


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
        check_arguments(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After copying, unpickling and loading: torch keeps groups and state only."""
        super().__setstate__(state)
        for name, value in (("telemetry", True), ("counts", {}), ("skipped", 0)):
            self.__dict__.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_arguments(self.defaults | param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["format"] is None:
            return
        group["format"] = get_format(group["format"]).name
        for parameter in group["params"]:
            if self._is_resident(group):
                self._place_on_grid(parameter, group)
            elif hasattr(parameter, "grid"):
                # A master's scale follows its amax; one left by an earlier optimizer would not.
                parameter.grid.join(get_format(group["format"])).scale = None

    def _is_resident(self, group: dict[str, Any]) -> bool:
        return group.get("rounding") is not None

    @torch.no_grad()
    def _place_on_grid(self, parameter: Any, group: dict[str, Any]) -> None:
        fmt = get_format(group["format"])
        grid = weight_grid(parameter).join(fmt)
        weight = parameter.float()
        if group["tensor_scale"] is not None:
            scale = torch.tensor(float(group["tensor_scale"]), device=parameter.device)
        elif grid.scale is not None and torch.equal(quantize(weight, fmt, grid.scale), weight):
            scale = grid.scale
        elif fmt.total_bits > 8:
            scale = torch.tensor(1.0, device=parameter.device)
        else:
            scale = compute_scale(weight, fmt, power_of_two=True, headroom=HEADROOM)
        self.state[parameter].update(grid_scale=scale, overflow_streak=0)
        grid.scale = scale
        parameter.copy_(quantize(weight, fmt, scale))

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
        if parameter.grad.is_sparse:
            raise ValueError(f"the gradient of parameter {index} {tuple(parameter.shape)} is sparse; dense ones are "
                             "needed (nn.Embedding(sparse=False))")  # fmt: skip
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
        state["grid_scale"] = weight_grid(parameter).scale = state["grid_scale"] * 2
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
                    weight_grid(parameter).scale = value
