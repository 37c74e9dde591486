"""How a tensor in one role (weight, activation, gradient) becomes an operand of a matrix product.

A `Role` is a value: a format, a rule for the scale, a rounding. A `RoleQuantizer` is a role at work in one layer: it
holds what outlives a step, the amax history of a delayed scale and the number of draws that stochastic rounding has
made. Both advance only in training, so that an evaluation changes no later step, and both are part of the layer's
state where they exist.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from altgrad.quantization.formats import FORMATS, FloatFormat, get_format
from altgrad.quantization.kernels import Rounding
from altgrad.quantization.kernels.dispatch import grid_values_by_amax
from altgrad.quantization.ops import grid_values, mix_seed, quantize, quantize_blocks
from altgrad.quantization.products import Operand, is_carried_in_bf16
from altgrad.quantization.scaling import ScaleRule

BF16 = FORMATS["BF16"]


class Role(BaseModel):
    """Format, scale rule and rounding of a tensor role; a format's name alone means current amax and nearest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = Field(description="a name `get_format` knows")
    scale: ScaleRule = ScaleRule()
    rounding: Rounding = "nearest"

    @field_validator("format")
    @classmethod
    def _exists(cls, name: str) -> str:
        return get_format(name).name

    def __str__(self) -> str:
        words = [self.format]
        if self.scale.kind != "current":
            words.append(self.scale.kind.replace("_", "-"))
        if self.rounding != "nearest":
            words.append(self.rounding.replace("_", "-"))
        return " ".join(words)


def as_role(value: Role | FloatFormat | str) -> Role:
    """The role that a format or its name stands for."""
    return value if isinstance(value, Role) else Role(format=get_format(value).name)


class RoleQuantizer:
    """A role at work in one layer. `key` seeds its stochastic rounding; equal keys make equal draws."""

    def __init__(self, role: Role, key: int = 0) -> None:
        self.role = role
        self.fmt = get_format(role.format)
        self.key = key
        self.calls = 0
        self.tracker = role.scale.new_state(self.fmt)

    @property
    def has_state(self) -> bool:
        """Whether a later step depends on an earlier one."""
        return self.tracker is not None or self.role.rounding == "stochastic"

    def operand(self, x: Tensor, *, advance: bool, own_scale: Tensor | None = None) -> Operand:
        """x rounded, as an operand without gradient; `own_scale` overrules the role's rule.

        With `advance` the tensor joins the history and the draw is counted.
        """
        has_one_scale = own_scale is not None or self.role.scale.kind in ("current", "delayed")
        carries_bf16 = has_one_scale and is_carried_in_bf16(x, self.fmt)
        x = x.detach() if carries_bf16 else x.detach().to(torch.float32)
        if self.fmt == BF16 and own_scale is None and self.role.rounding == "nearest":
            # The native cast keeps infinities, which are signals; 16-bit formats have scale 1.
            values = x.to(torch.bfloat16)
            return Operand(values if carries_bf16 else values.to(torch.float32), BF16, None)
        seed = mix_seed(self.key, self.calls) if self.role.rounding == "stochastic" else None
        if advance and seed is not None:
            self.calls += 1
        if carries_bf16 and own_scale is None and (found := self._at_once(x, seed)) is not None:
            return Operand(found[0], self.fmt, found[1], found[1])
        scale = own_scale
        if scale is None:
            scale = self.role.scale.scale(x, self.fmt, self.tracker, update=advance)
        if carries_bf16:
            values = grid_values(x, self.fmt, scale, rounding=self.role.rounding, seed=seed)
        elif own_scale is None and self.role.scale.kind == "block":
            values = quantize_blocks(x, self.fmt, scale, rounding=self.role.rounding, seed=seed, ste="identity")
        else:
            values = quantize(x, self.fmt, scale, rounding=self.role.rounding, seed=seed)
        if own_scale is None and self.fmt.total_bits <= 8 and not carries_bf16:
            # Saturation would turn an infinity, which says that training has failed, into a harmless number.
            values = torch.where(torch.isinf(x), x, values)
        return Operand(values, self.fmt, scale, scale if carries_bf16 else None)

    def _at_once(self, x: Tensor, seed: int | None) -> tuple[Tensor, Tensor] | None:
        """Grid values and scale by the kernel that also finds the amax, where rule and device allow it."""
        rule = self.role.scale
        if rule.kind != "current" or self.fmt.total_bits > 8:
            return None
        headroom = rule.headroom * 2.0**rule.margin
        return grid_values_by_amax(x, self.fmt, self.role.rounding, seed, headroom, rule.power_of_two)

    def state_dict(self) -> dict[str, Any]:
        """Exact state for a checkpoint."""
        return {"calls": self.calls, "tracker": None if self.tracker is None else self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.calls = int(state["calls"])
        if self.tracker is not None:
            self.tracker.load_state_dict(state["tracker"])


def operand_of(x: Tensor, quantizer: RoleQuantizer | None, *, advance: bool) -> Operand:
    """x as the quantizer's operand, or as it is, in float32, where there is none."""
    if quantizer is None:
        return Operand(x.detach().to(torch.float32), None, None)
    return quantizer.operand(x, advance=advance)
