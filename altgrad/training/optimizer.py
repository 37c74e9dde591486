"""What every arm shares: where the weights live, who owns the scale, how steps are counted, exact resume.

A master arm (`rounding=None`) keeps float32 weights; the layer rounds them at each use under the current amax
scale, and the gradient passes straight through. A resident arm keeps the weights on the format's grid; it owns one
power-of-two scale per tensor, with twofold head-room, which the layer shares (`WeightGrid`), so that the layer is the
identity on such weights. A scale doubles only when more than one weight in a thousand left
the grid for three steps in a row; that is counted as an event.

Flips are differences of integer codes under one scale. `expected` is the sum of min(1, |change| / spacing): what
unbiased rounding would realise. Their quotient, the flip yield, tells a step that reaches the weights from one that
rounding swallows. Randomness is a counter hash of (seed, parameter, call, element): reproducible, with no state of
its own but the number of calls, which lies in the parameter group.

The arithmetic is in `kernels`; all tensors of a group take one call. On a GPU nothing here waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from altgrad.quantization import FloatFormat, compute_scale, get_format, mix_seed, quantize, ulp, weight_grid
from altgrad.training.kernels import Count, Counting, Job, Moments, Placement, Plan
from altgrad.training.kernels.dispatch import Kernel, kernel_for
from altgrad.training.rules import RULES
from altgrad.training.step_counts import StepCounts

HEADROOM = 2.0

COUNT_EVERY = 8
"""Steps from one that is counted to the next, unless the optimizer's `count_every` is set."""

OF_FORMAT = ("mean_spacing", "grid_scale", "overflow_streak", "carry")
"""State that means nothing in another format."""

Rounding = Literal["nearest", "stochastic"]


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
    "rule": (f"one of {', '.join(RULES)}, adam", lambda value: value in RULES or value == "adam"),
    "seed": ("an integer", lambda value: isinstance(value, int)),
}
"""What each argument of an arm may be, in words and as a test."""


def check_arguments(group: dict[str, Any]) -> None:
    """Raises ValueError that names the first argument out of its range, its value and what is allowed."""
    for name, value in group.items():
        if name in RANGES and not _passes(RANGES[name][1], value):
            raise ValueError(f"{name}={value!r} is not allowed: {RANGES[name][0]}")
    own_unit = "rungs" if "rung_clip" in group else "ulp"
    if group.get("step_unit", "weight") not in ("weight", own_unit):
        raise ValueError(f"step_unit={group['step_unit']!r} is not allowed: 'weight' or {own_unit!r}")
    if group.get("carry") and group["rung_clip"] < 1:
        raise ValueError(f"rung_clip={group['rung_clip']} is not allowed with carry: at least 1, one whole rung")
    if group.get("format") is not None:
        _check_scale(get_format(group["format"]), group.get("tensor_scale"))
    if group.get("error_feedback") and (group["rounding"] is None or not group["betas"][0]):
        raise ValueError(
            f"error_feedback=True is not allowed with rounding={group['rounding']!r}, betas={group['betas']}: it needs "
            "weights on the grid ('nearest' or 'stochastic') and a first moment (betas[0] > 0)"
        )


def _passes(test: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(test(value))
    except TypeError:
        return False


def _check_scale(fmt: FloatFormat, scale: float | None) -> None:
    least, most = 2.0**-149 / fmt.min_spacing, 2.0**128 / fmt.max
    if scale is not None and not least <= scale < most:
        raise ValueError(
            f"tensor_scale={scale!r} does not fit format={fmt.name!r}: its values times the scale must be "
            f"float32 numbers, so {least:.3g} <= tensor_scale < {most:.3g}"
        )


class GridAwareOptimizer(torch.optim.Optimizer):
    """Plumbing shared by the arms: state, scales, randomness, counting, exact resume.

    A parameter group may carry its own `format` (a name, or None for plain float32 parameters such as norms).
    `counts` holds each parameter's `StepCounts` of the last step that was counted, `skipped` the number of tensors
    whose gradient was not finite in the last step (0-d). The first step is counted and every `count_every`-th after it,
    for counting costs more than the step itself; with `telemetry = False` none is. The weights are the same, bit for
    bit.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.telemetry = True
        self.count_every = COUNT_EVERY
        self.counted: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._whole: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._versions: dict[Tensor, int] = {}
        self._largest: dict[Tensor, tuple[tuple[int, int], Tensor]] = {}
        check_arguments(defaults)
        super().__init__(params, {"calls": 0} | defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After copying, unpickling and loading: torch keeps groups and state only."""
        super().__setstate__(state)
        for name, value in (
            ("telemetry", True),
            ("count_every", COUNT_EVERY),
            ("counted", []),
            ("_whole", []),
            ("_versions", {}),
            ("_largest", {}),
        ):
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

    @property
    def counts(self) -> dict[Tensor, StepCounts]:
        """What the last counted step did to each parameter that has a format."""
        plain = {p for group in self.param_groups if group["format"] is None for p in group["params"]}
        return {
            parameter: StepCounts(row)
            for parameters, rows in self._whole
            for parameter, row in zip(parameters, rows, strict=True)
            if parameter not in plain
        }

    @property
    def skipped(self) -> Tensor:
        """Number of tensors whose gradient was not finite in the last step, 0-d int64."""
        sums = [rows[:, Count.SKIPPED].sum() for _, rows in self.counted]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)

    def _is_resident(self, group: dict[str, Any]) -> bool:
        return group.get("rounding") is not None

    def _plan(self, group: dict[str, Any]) -> Plan:
        """What the step does to a group's tensors; an arm's own choice."""
        raise TypeError(f"{type(self).__name__} says no plan")

    def _counting(self, group: dict[str, Any]) -> Counting:
        """What this step counts, the group's `calls` being its number, the first from 1."""
        is_due = self.telemetry and group["format"] is not None and (group["calls"] - 1) % self.count_every == 0
        return Counting.ALL if is_due else Counting.NONE

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
        if parameter.dtype != torch.float32:
            self._check_holds(parameter, fmt, float(scale))
        grid.scale = scale.clone()
        self._snap(parameter, group)

    def _snap(self, parameter: Any, group: dict[str, Any]) -> None:
        """Takes every weight at its nearest grid point."""
        scale = weight_grid(parameter).scale
        assert scale is not None
        parameter.copy_(quantize(parameter.float(), group["format"], scale))
        self._versions[parameter] = parameter._version

    @staticmethod
    def _check_holds(parameter: Tensor, fmt: FloatFormat, scale: float) -> None:
        values = fmt.values * scale
        if not torch.equal(values.to(parameter.dtype).float(), values):
            raise ValueError(
                f"a parameter of dtype {parameter.dtype} cannot hold the values of format={fmt.name!r} times the scale "
                f"{scale:g}; keep its weights in float32"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.counted = []
        index, is_whole = 0, False
        kernels: dict[Any, Kernel] = {}
        for group in self.param_groups:
            group["calls"] += 1
            batches: dict[Any, tuple[Plan, list[tuple[Tensor, Job]]]] = {}
            plan = self._plan(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    own, job = self._job(parameter, group, index, plan)
                    kind = job.weight.device, job.weight.dtype, job.grad.dtype, job.weight.numel() > 0
                    if kind not in kernels:
                        kernels[kind] = kernel_for(job)
                    key = kernels[kind], job.weight.dtype, id(own)
                    batches.setdefault(key, (own, []))[1].append((parameter, job))
                index += 1
            for (kernel, _, _), (own, members) in batches.items():
                self._step_batch(kernel, own, members, group["calls"])
                is_whole = is_whole or own.counting == Counting.ALL
        if is_whole:
            self._whole = self.counted
        return loss

    def _step_batch(self, kernel: Kernel, plan: Plan, members: list[tuple[Tensor, Job]], call: int) -> None:
        device = members[0][0].device
        rows = torch.zeros(len(members), len(Count), dtype=torch.int64, device=device)
        kernel.step_tensors([job for _, job in members], plan, call, rows)
        for parameter, job in members:
            if job.weight.data_ptr() != parameter.data_ptr():
                parameter.copy_(job.weight)
            self._versions[parameter] = parameter._version
            if job.largest is None:
                self._largest.pop(parameter, None)
            else:
                self._largest[parameter] = _state_of(parameter), job.largest
        self.counted.append((tuple(parameter for parameter, _ in members), rows))

    def _job(self, parameter: Tensor, group: dict[str, Any], index: int, plan: Plan) -> tuple[Plan, Job]:
        """The parameter's share of the step, and the plan for it, which is the group's but for an arm's exceptions."""
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(
                f"the gradient of parameter {index} {tuple(parameter.shape)} is sparse; dense ones are "
                "needed (nn.Embedding(sparse=False))"
            )
        if self._is_resident(group) and plan.fmt and self._versions.get(parameter) != parameter._version:
            # Written by others since our last step: loaded weights need not lie on the grid.
            self._grid_scale(parameter, self.state[parameter])
            self._snap(parameter, group)
        state = self._state(parameter, plan)
        job = Job(
            weight=parameter.detach().contiguous(),
            grad=grad.contiguous(),
            step=state["step"],
            seed=_seed_of(group["seed"], index),
            first=state.get("exp_avg"),
            second=state.get("exp_avg_sq"),
            carry=state.get("carry"),
            mean=state.get("mean_spacing"),
        )
        if plan.fmt is not None and plan.placement != Placement.MASTER:
            job.scale, job.streak = self._grid_scale(parameter, state), state.get("overflow_streak")
        if plan.follows_amax:
            written, job.largest = self._largest.get(parameter, (None, None))
            job.knows_largest = written == _state_of(parameter)
            if job.largest is None or job.largest.device != parameter.device:
                job.largest = torch.zeros((), dtype=torch.int32, device=parameter.device)
        return plan, job

    def _state(self, parameter: Tensor, plan: Plan) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
        if "exp_avg" not in state and plan.moments != Moments.GIVEN:
            state["exp_avg"] = _zeros(parameter)
        if "exp_avg_sq" not in state and plan.moments == Moments.ADAM:
            state["exp_avg_sq"] = _zeros(parameter)
        if "carry" not in state and plan.carry:
            state["carry"] = _zeros(parameter)
        if "mean_spacing" not in state and plan.needs_mean:
            state["mean_spacing"] = torch.zeros((), dtype=torch.float64, device=parameter.device)
        if "overflow_streak" not in state and plan.rescales:
            state["overflow_streak"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
        return state

    def _grid_scale(self, parameter: Any, state: dict[str, Any]) -> Tensor:
        """The tensor's scale, which the layer shares; the weights may have been loaded with another one."""
        grid = weight_grid(parameter)
        scale = state.get("grid_scale") if grid.scale is None else grid.scale
        if scale is None:
            raise RuntimeError("a parameter lost the scale of its grid; build the optimizer after the model is final")
        state["grid_scale"] = grid.scale = scale.to(parameter.device, torch.float32)
        return grid.scale

    @torch.no_grad()
    def adopt(self, other: GridAwareOptimizer) -> None:
        """Goes on where another optimizer of the same arm is, over the same parameters in other formats.

        Moments and step counts stay; what depends on a parameter's format starts anew where that has changed, its mean
        spacing with that of the present weights until the next measurement.
        """
        before = {p: group["format"] for group in other.param_groups for p in group["params"]}
        for group in self.param_groups:
            group["calls"] = max(old["calls"] for old in other.param_groups)
            group["lr"] = other.param_groups[0]["lr"]
            for parameter in group["params"]:
                state = dict(other.state[parameter])
                if group["format"] != before[parameter]:
                    state = {name: value for name, value in state.items() if name not in OF_FORMAT}
                    if "mean_spacing" in other.state[parameter] and group["format"] is not None:
                        state["mean_spacing"] = self._spacing(parameter, group["format"])
                self.state[parameter] = state

    @staticmethod
    def _spacing(parameter: Tensor, format: str) -> Tensor:
        fmt, scale = get_format(format), weight_grid(parameter).scale
        if scale is None:
            scale = torch.ones((), device=parameter.device) if fmt.total_bits > 8 else compute_scale(parameter, fmt)
        return ulp(parameter.float(), fmt, scale).double().mean()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state exactly: torch casts state to the parameter's dtype, which would lose bits."""
        super().load_state_dict(state_dict)
        parameters: list[Any] = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    value = value.detach().clone().to(parameter.device)
                self.state[parameter][name] = value
                if name == "grid_scale":
                    weight_grid(parameter).scale = value


def _state_of(parameter: Tensor) -> tuple[int, int]:
    """Changes where others than the kernels have written or moved a parameter; writing into `.data` goes unseen."""
    return parameter._version, parameter.data_ptr()


@lru_cache(maxsize=4096)
def _seed_of(seed: int, index: int) -> int:
    """Of a parameter's draws."""
    return mix_seed(seed, index)


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
