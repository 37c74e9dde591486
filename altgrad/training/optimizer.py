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

The arithmetic is in `kernels`; all tensors of a group take one call. On a GPU nothing here waits for it. What kernels
may be given is decided in `optimizer_state`. Weights that others wrote since the last step (a checkpoint, an
initialization) are honoured: a resident arm finds their scale anew and logs it.

Under torch.compile a step is one op of the graph, which runs the eager step: learning rates, counts and state are read
when it runs, so that no step compiles anything again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from altgrad.quantization import FloatFormat, get_format, mix_seed, quantize, weight_grid
from altgrad.quantization.conversion_plan import some
from altgrad.quantization.weight_grid import (
    Memory,
    bypassed_weights,
    converted_weights,
    initial_scale,
    is_on_grid,
    memory_of,
)
from altgrad.training.kernels import Count, Counting, Job, Placement, Plan
from altgrad.training.kernels.dispatch import Kernel, kernel_for
from altgrad.training.optimizer_groups import check_arguments, has_converted, name_of, parts_of, tensor_of
from altgrad.training.optimizer_state import check_gradient, check_parameter, is_plain, is_usual, put_back, whole
from altgrad.training.optimizer_travel import TravellingOptimizer
from altgrad.training.step_counts import StepCounts
from altgrad.training.step_in_graph import step_in_graph

logger = logging.getLogger("altgrad")

COUNT_EVERY = 8
"""Steps from one that is counted to the next, unless the optimizer's `count_every` is set."""

OF_FORMAT = ("mean_spacing", "grid_scale", "overflow_streak", "carry")
"""State that means nothing in another format."""

Rounding = Literal["nearest", "stochastic"]


class GridAwareOptimizer(TravellingOptimizer):
    """Plumbing shared by the arms: state, scales, randomness, counting, exact resume.

    Of a converted model's parameters exactly the converted weights have a format, that of their layer; the others
    (norms, biases) form a plain group of their own. Of any other parameters all take `format`, which is logged. A group
    may carry a `format` of its own: a name, or None for plain float32 parameters.

    `counts` holds each parameter's `StepCounts` of the last step that was counted, `skipped` the number of tensors
    whose gradient was not finite in the last step (0-d). The first step is counted and every `count_every`-th after it,
    for counting costs more than the step itself; with `telemetry = False` none is. The weights are the same, bit for
    bit.
    """

    _is_converted = False
    """Whether it has weights of converted layers."""

    ends_its_steps = True
    """In a compiled graph, the op that is the step also ends it for layers that follow training steps."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._start()
        check_arguments(defaults)
        params = params if isinstance(params, Tensor) else list(params)
        self._is_converted = not isinstance(params, Tensor) and has_converted(params, converted_weights())
        super().__init__(params, {"calls": 0} | defaults)

    def _start(self) -> None:
        self.telemetry = self.__dict__.get("telemetry", True)
        self.count_every = self.__dict__.get("count_every", COUNT_EVERY)
        super()._start()

    def _forget(self) -> None:
        super()._forget()
        self.counted: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._whole: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._largest: dict[Tensor, tuple[Memory, Tensor]] = {}
        self._is_counting = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does; ValueError for arguments out of their range and parameters that no step could move exactly."""
        converted = converted_weights()
        self._is_converted = self._is_converted or has_converted([*self.param_groups, param_group], converted)
        is_own = "format" not in param_group and not self._is_converted
        for part in parts_of(param_group, self.defaults["format"], converted, is_converted=self._is_converted):
            check_arguments(self.defaults | part)
            for position, parameter in enumerate(map(tensor_of, part["params"])):
                if isinstance(parameter, Tensor):
                    check_parameter(parameter, f"parameter {position} {tuple(parameter.shape)}")
            super().add_param_group(part)
            group = self.param_groups[-1]
            if group["format"] is None:
                continue
            fmt = get_format(group["format"])
            group["format"] = fmt.name
            if is_own:
                logger.warning(
                    "%s: %d tensors take the format %s, for no converted layer multiplies by them: %s",
                    type(self).__name__,
                    len(group["params"]),
                    fmt.name,
                    some([name_of(group, position, p) for position, p in enumerate(group["params"])]),
                )
            for parameter in group["params"]:
                if self._is_resident(group):
                    self._place_on_grid(parameter, group)
                elif hasattr(parameter, "grid") or id(parameter) in converted:
                    # A master's scale follows its amax; one left by an earlier optimizer would not.
                    weight_grid(parameter).own(self, fmt, None)

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

    def _counting(self, group: dict[str, Any]) -> Counting:
        """What this step counts; the same step in every group, or sums over them would mix steps."""
        return Counting.ALL if self._is_counting and group["format"] is not None else Counting.NONE

    @torch.no_grad()
    def _place_on_grid(self, parameter: Any, group: dict[str, Any]) -> None:
        fmt = get_format(group["format"])
        grid = weight_grid(parameter).join(fmt)
        weight = whole(parameter).float()
        if group["tensor_scale"] is not None:
            scale = torch.tensor(float(group["tensor_scale"]), dtype=torch.float32, device=parameter.device)
        elif grid.scale is not None and is_on_grid(weight, fmt, grid.scale):
            scale = grid.scale
        else:
            scale = initial_scale(weight, fmt)
        if parameter.dtype != torch.float32:
            self._check_holds(parameter, fmt, float(scale))
        grid.own(self, fmt, scale)
        self._refits[parameter] = grid.refits
        self._snap(parameter, group)

    def _snap(self, parameter: Any, group: dict[str, Any]) -> bool:
        """Takes every weight at its nearest grid point; returns whether that moved any."""
        grid = weight_grid(parameter)
        assert grid.scale is not None
        weight = whole(parameter).float()
        snapped = quantize(weight, group["format"], grid.scale)
        has_moved = not weight.is_meta and bool(((snapped != weight) & (weight == weight)).any())
        if has_moved:
            put_back(parameter, snapped)
        self._seen[parameter] = memory_of(parameter)
        grid.settle(self._seen[parameter])
        return has_moved

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
        if torch.compiler.is_compiling():
            step_in_graph(self._handle, self.param_groups)
        else:
            self._step(None)
        return loss

    def _step(self, grads: Mapping[Tensor, Tensor] | None) -> None:
        """One step; with gradients that are given in place of the parameters' own."""
        number = 1 + max(group["calls"] for group in self.param_groups)
        if number == 1:
            self._tell_of_bypassed(grads)
        self._is_counting = self.telemetry and (number - 1) % self.count_every == 0
        self.counted = []
        index, is_whole = 0, False
        kernels: dict[Any, Kernel] = {}
        for group in self.param_groups:
            group["calls"] += 1
            batches: dict[Any, tuple[Plan, list[tuple[Tensor, Job]]]] = {}
            plan = self._plan(group)
            for position, parameter in enumerate(group["params"]):
                grad = parameter.grad if grads is None else grads.get(parameter)
                if grad is not None:
                    if not is_usual(parameter, grad):
                        name = name_of(group, position, parameter)
                        check_parameter(parameter, name)
                        check_gradient(parameter, grad, name)
                    own, job = self._job(parameter, grad, group, index, plan)
                    kind = job.weight.device, job.weight.dtype, job.grad.dtype, job.weight.numel() > 0
                    if kind not in kernels:
                        kernels[kind] = kernel_for(job)
                    if not is_plain(parameter):
                        # Sharded, so by itself: all of it is here only for this step.
                        self._step_batch(kernels[kind], own, [(parameter, job)], group["calls"])
                        is_whole = is_whole or own.counting == Counting.ALL
                    else:
                        key = kernels[kind], job.weight.dtype, id(own)
                        batches.setdefault(key, (own, []))[1].append((parameter, job))
                index += 1
            for (kernel, _, _), (own, members) in batches.items():
                self._step_batch(kernel, own, members, group["calls"])
                is_whole = is_whole or own.counting == Counting.ALL
        if is_whole:
            self._whole = self.counted

    def _tell_of_bypassed(self, grads: Mapping[Tensor, Tensor] | None) -> None:
        """A model that reads a converted layer's weight past the layer multiplies by it unquantized."""
        idle, ran = bypassed_weights()
        if not any(id(p) in ran for group in self.param_groups for p in group["params"]):
            return  # a step without a forward pass, as torch's distributed checkpoints make one
        found = [
            name_of(group, position, p)
            for group in self.param_groups
            for position, p in enumerate(group["params"])
            if id(p) in idle and (p.grad if grads is None else grads.get(p)) is not None
        ]
        if found:
            logger.warning(
                "%d converted weights have a gradient and their layers never ran: the model reads them past the layers "
                "and multiplies by them unquantized: %s",
                len(found),
                some(found),
            )

    def _step_batch(self, kernel: Kernel, plan: Plan, members: list[tuple[Tensor, Job]], call: int) -> None:
        device = members[0][0].device
        rows = torch.zeros(len(members), len(Count), dtype=torch.int64, device=device)
        kernel.step_tensors([job for _, job in members], plan, call, rows)
        for parameter, job in members:
            if not is_plain(parameter):
                self._keep_shard(parameter, job)
            elif job.weight.data_ptr() != parameter.data_ptr():
                parameter.copy_(job.weight)
            if not plan.watches_weights:
                self._largest.pop(parameter, None)
                continue
            memory = self._seen[parameter] = memory_of(parameter)
            if job.scale is not None:
                weight_grid(parameter).settle(memory)
            if job.largest is None:
                self._largest.pop(parameter, None)
            else:
                self._largest[parameter] = memory, job.largest
        self.counted.append((tuple(parameter for parameter, _ in members), rows))

    def _keep_shard(self, parameter: Tensor, job: Job) -> None:
        state = self.state[parameter]
        put_back(parameter, job.weight)
        for key, values in (("exp_avg", job.first), ("exp_avg_sq", job.second), ("carry", job.carry)):
            if values is not None:
                put_back(state[key], values)

    def _job(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], index: int, plan: Plan) -> tuple[Plan, Job]:
        """The parameter's share of the step, and the plan for it, which is the group's but for an arm's exceptions."""
        state = self._state(parameter, group, plan)
        memory = memory_of(parameter) if plan.watches_weights else None
        if memory is not None and self._seen.get(parameter) != memory:
            self._meet(parameter, group, state, plan)
            memory = memory_of(parameter)
        weight, carry = parameter.detach(), state.get("carry")
        first, second = state.get("exp_avg"), state.get("exp_avg_sq")
        if not is_plain(parameter):
            weight, grad, first, second, carry = map(whole, (weight, grad, first, second, carry))
        if grad.is_neg():
            grad = grad.resolve_neg()
        job = Job(
            weight=weight.contiguous(),
            grad=grad.contiguous(),
            step=state["step"],
            seed=_seed_of(group["seed"], index),
            first=first,
            second=second,
            carry=carry,
            mean=state.get("mean_spacing"),
        )
        if plan.fmt is not None and plan.placement != Placement.MASTER:
            job.scale, job.streak = self._grid_scale(parameter, group, state), state.get("overflow_streak")
        if plan.follows_amax:
            written, job.largest = self._largest.get(parameter, (None, None))
            job.knows_largest = written == memory
            if job.largest is None or job.largest.device != parameter.device:
                job.largest = torch.zeros((), dtype=torch.int32, device=parameter.device)
        return plan, job

    def _meet(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any], plan: Plan) -> None:
        """Looks at weights that were written, or exchanged, since this optimizer's last step."""
        is_rewritten = parameter in self._seen
        if self._has_grid(group) and plan.fmt is not None:
            scale = self._grid_scale(parameter, group, state)
            grid = weight_grid(parameter)
            if group["tensor_scale"] is None:
                grid.refit(whole(parameter))
            if parameter.dtype != torch.float32:
                self._check_holds(parameter, plan.fmt, float(scale))
            # A layer may have found the scale before this step did.
            is_rewritten = grid.refits != self._refits.get(parameter, grid.refits)
            is_rewritten = self._snap(parameter, group) or is_rewritten
            self._refits[parameter], state["grid_scale"] = grid.refits, grid.scale
            if is_rewritten:
                for key in ("carry", "overflow_streak"):
                    if key in state:
                        state[key].zero_()
        if is_rewritten and "mean_spacing" in state and plan.fmt is not None:
            state["mean_spacing"] = self._spacing(parameter, plan.fmt.name)

    def _grid_scale(self, parameter: Any, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        """The tensor's scale, which the layer shares; ValueError where the layer has another format by now."""
        fmt, grid = get_format(group["format"]), weight_grid(parameter)
        grid.check(fmt)
        if not grid.is_owned_by(self) or grid.scale is None:
            scale = state.get("grid_scale") if grid.scale is None else grid.scale
            grid.own(self, fmt, initial_scale(whole(parameter), fmt) if scale is None else scale)
        assert grid.scale is not None
        if grid.scale.device != parameter.device:
            grid.scale = grid.scale.to(parameter.device)
        state["grid_scale"] = grid.scale
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
                    if self._has_grid(group):
                        state["grid_scale"] = weight_grid(parameter).scale
                self.state[parameter] = state


@lru_cache(maxsize=4096)
def _seed_of(seed: int, index: int) -> int:
    """Of a parameter's draws."""
    return mix_seed(seed, index)
