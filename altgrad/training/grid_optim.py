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

from altgrad.quantization import get_format, ulp
from altgrad.training.kernels import Counting, Moments, Placement, Plan
from altgrad.training.optimizer import GridAwareOptimizer
from altgrad.training.optimizer_groups import LayersFormat
from altgrad.training.step_counts import StepResult
from altgrad.training.step_in_graph import step_in_graph


class GridOptim(GridAwareOptimizer):
    """Every weight moves by a whole number of grid points, drawn without bias and clipped by `rung_clip` (rungs).

    `step_unit` 'weight' turns lr into rungs by the tensor's mean gap; 'rungs' takes it as it stands. `normalize`
    'rms' divides by the second moment like Adam, 'none' is the raw velocity of the original. With `carry` the
    fraction of a rung that was not taken is kept. `step()` returns (flips, updates), fetched when looked at: code
    changes, and weights whose update was not zero. Weights loaded after construction are taken at their nearest grid
    point.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        format: str | None = LayersFormat("E4M3"),
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

    def _counting(self, group: dict[str, Any]) -> Counting:
        # What step() returns is of every step; on the grid flips and updates cost next to nothing.
        found, is_counted = super()._counting(group), self.telemetry and group["format"] is not None
        return Counting.MOVES if is_counted and not found else found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns (flips, updates), waiting for the device only when they are looked at.

        Without telemetry nothing is counted and both are 0.
        """
        if torch.compiler.is_compiling() and closure is None:
            return StepResult(step_in_graph(self._handle, self.param_groups))
        super().step(closure)
        return StepResult([rows for _, rows in self.counted])

    def _plan(self, group: dict[str, Any]) -> Plan:
        has_format = group["format"] is not None
        return Plan(
            fmt=get_format(group["format"]) if has_format else None,
            moments=Moments.ADAM if group["normalize"] == "rms" else Moments.MOMENTUM,
            placement=Placement.RUNGS if has_format else Placement.MASTER,
            lr=float(group["lr"]),
            beta1=group["momentum"],
            beta2=group["beta2"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            rung_clip=group["rung_clip"],
            own_unit=group["step_unit"] == "rungs",
            carry=group["carry"] and has_format,
            counting=self._counting(group),
        )
