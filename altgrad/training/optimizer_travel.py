"""An optimizer's state: how it begins, travels and comes back, as torch's own does.

Every road is torch's (state_dict and its hooks, copying, pickling, the helpers of torch.distributed.checkpoint), but
state arrives exactly, where torch casts it to the parameter's dtype, and only as what kernels can take
(`optimizer_state`). A checkpoint of another recipe is refused before anything has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad.quantization import format_scale, get_format, ulp, weight_grid
from altgrad.quantization.weight_grid import Memory
from altgrad.training.kernels import Moments, Plan
from altgrad.training.optimizer_groups import check_arguments, check_groups, name_of
from altgrad.training.optimizer_state import ENTRIES, admitted, is_sharded, misfits, number_like, whole, zeros_like
from altgrad.training.step_in_graph import handle_of

MOMENTS = {Moments.ADAM: ("exp_avg", "exp_avg_sq"), Moments.MOMENTUM: ("exp_avg",), Moments.GIVEN: ()}


class TravellingOptimizer(torch.optim.Optimizer):
    """The part of `GridAwareOptimizer` that keeps, saves and restores; the other part steps."""

    def _is_resident(self, group: dict[str, Any]) -> bool:
        return group.get("rounding") is not None

    def _has_grid(self, group: dict[str, Any]) -> bool:
        return group["format"] is not None and self._is_resident(group)

    def _plan(self, group: dict[str, Any]) -> Plan:
        """What the step does to a group's tensors; an arm's own choice."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _plan")

    def _forget(self) -> None:
        """Nothing is known of the weights and of earlier steps."""
        self._seen: dict[Tensor, Memory] = {}
        self._refits: dict[Tensor, int] = {}
        self._own: dict[Tensor, dict[str, Tensor]] = {}

    def _start(self) -> None:
        """What torch neither saves nor copies."""
        self._forget()
        self._handle = handle_of(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copying and pickling: torch keeps groups and state only, and drops what hangs on a Parameter."""
        resident = [p for group in self.param_groups if self._has_grid(group) for p in group["params"]]
        return super().__getstate__() | {"_grids": [(parameter, weight_grid(parameter)) for parameter in resident]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After copying and unpickling, and when torch loads a state."""
        grids = state.pop("_grids", [])
        super().__setstate__(state)
        if "_handle" not in self.__dict__:
            self._start()
        for parameter, grid in grids:
            parameter.grid = grid
            grid.own(self, grid.fmt, grid.scale)

    def _state(self, parameter: Tensor, group: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """The parameter's state as kernels take it; what is missing starts, and what a user put there is checked."""
        state: dict[str, Any] = self.state[parameter]
        own = self._own.setdefault(parameter, {})
        if not state:
            own.clear()
        for key in misfits(state, parameter, own):
            value = state[key]
            if not (ENTRIES[key].is_shaped and is_sharded(value) and value.shape == parameter.shape):
                state[key] = own[key] = admitted(value, key, parameter, self._name_of(parameter))
        if "step" not in state:
            state["step"] = number_like(parameter, "step")
        for key in self._moments(plan, parameter, group):
            if key not in state:
                state[key] = zeros_like(parameter)
        if "carry" not in state and plan.carry:
            state["carry"] = zeros_like(parameter)
        if "mean_spacing" not in state and plan.needs_mean:
            state["mean_spacing"] = number_like(parameter, "mean_spacing")
            if not parameter.is_meta and int(state["step"]) > 0 and plan.fmt is not None:
                # Of a checkpoint that had none; the next measurement may be far off.
                state["mean_spacing"] = self._spacing(parameter, plan.fmt.name)
        if "overflow_streak" not in state and plan.rescales:
            state["overflow_streak"] = number_like(parameter, "overflow_streak")
        return state

    def _moments(self, plan: Plan, parameter: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
        """The state a step cannot do without."""
        return MOMENTS[plan.moments]

    def _name_of(self, parameter: Tensor) -> str:
        for group in self.param_groups:
            for position, own in enumerate(group["params"]):
                if own is parameter:
                    return name_of(group, position, parameter)
        return f"a parameter of shape {tuple(parameter.shape)}"

    @staticmethod
    def _spacing(parameter: Tensor, format: str) -> Tensor:
        fmt, scale, weight = get_format(format), weight_grid(parameter).scale, whole(parameter.detach()).float()
        return ulp(weight, fmt, format_scale(weight, fmt) if scale is None else scale).double().mean()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state exactly, with torch's hooks, where torch would cast it to the parameter's dtype.

        ValueError, with nothing changed, for a checkpoint of another recipe and for state that no kernel could take.
        """
        exact: dict[Tensor, dict[str, Any]] = {}
        before = [dict(group) for group in self.param_groups]

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            exact.update(self._admitted_state(given))

        def settle(_: torch.optim.Optimizer) -> None:
            for group, own in zip(self.param_groups, before, strict=True):
                for key, value in own.items():
                    group.setdefault(key, value)
            for parameter, state in exact.items():
                self.state[parameter] = state
            self._forget()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if "grid_scale" in self.state.get(parameter, {}) and self._has_grid(group):
                        scale = self.state[parameter]["grid_scale"]
                        weight_grid(parameter).own(self, get_format(group["format"]), scale)

        # The last to see what other hooks make of the state, the first after it was loaded.
        checking = self.register_load_state_dict_pre_hook(check)
        settling = self.register_load_state_dict_post_hook(settle, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            checking.remove()
            settling.remove()

    def _admitted_state(self, given: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """The state of a checkpoint by parameter, in tensors of our own."""
        saved = given["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            return {}  # torch says what is wrong
        check_groups(self.param_groups, saved)
        found: dict[Tensor, dict[str, Any]] = {}
        for group, other in zip(self.param_groups, saved, strict=True):
            merged = group | {key: value for key, value in other.items() if key in group and key != "params"}
            check_arguments(merged)
            plan = self._plan(merged)
            for position, (parameter, key) in enumerate(zip(group["params"], other["params"], strict=True)):
                state = given["state"].get(key)
                if state:
                    found[parameter] = self._admit(parameter, state, merged, plan, name_of(group, position, parameter))
        return found

    def _admit(
        self, parameter: Tensor, given: Mapping[str, Any], group: dict[str, Any], plan: Plan, name: str
    ) -> dict[str, Any]:
        state = {
            key: admitted(value, key, parameter, name) if key in ENTRIES else value for key, value in given.items()
        }
        needed = ("step", *self._moments(plan, parameter, group))
        missing = [key for key in needed if key not in state]
        if missing and len(missing) < len(needed) and not ("step" in state and int(state["step"]) == 0):
            raise ValueError(
                f"state of {name} lacks {', '.join(map(repr, missing))}; it has {', '.join(map(repr, given))}"
            )
        return state
