"""The roles of one weight at work in a layer: its own, and those of the tensors it is multiplied with.

A layer may have one weight or several (the input projections of an attention, the stacked matrices of experts). What
holds for each of them is said here once: its three role quantizers, the grid that it shares with an optimizer, what of
it goes into a saved state, and when it moves on to the next training step.

The weight's scale is that of its `WeightGrid` where it has one: an optimizer keeps the weights on the grid, or they
came from a checkpoint of such a run, and the layer then changes none of them. Otherwise it follows the role's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.layer_products import StraightThrough
from altgrad.quantization.ops import mix_seed, refuse_transforms
from altgrad.quantization.products import Operand
from altgrad.quantization.roles import ROLES, Role, RoleQuantizer, as_role
from altgrad.quantization.training_steps import follow_steps, forget_steps
from altgrad.quantization.weight_grid import Memory, WeightGrid, forget_layer, memory_of, register_layer, weight_grid

BY_LINES = ("per_channel", "block")
"""Kinds of scale that a tensor has many of, each for a piece of a line along a summed axis."""


class WeightRoles:
    """Role quantizers and grid of the weight `weight_name` of `holder`, the module that has it as a Parameter.

    A role that is None stays in float32. `key` seeds stochastic rounding.
    """

    weight_name = "weight"
    weight_quantizer: RoleQuantizer
    activation_quantizer: RoleQuantizer | None
    gradient_quantizer: RoleQuantizer | None
    grid: WeightGrid
    has_run: bool
    _settled: Memory | None = None

    @property
    def holder(self) -> nn.Module:
        """The module that has the weight as a Parameter: the layer itself, where it is its own weight's roles."""
        return cast(nn.Module, self)

    def take_roles(
        self,
        weight: str | FloatFormat | Role,
        activation: str | FloatFormat | Role | None,
        gradient: str | FloatFormat | Role | None,
        key: int,
    ) -> None:
        """Begins with the given roles, on the grid that the weight has or a new one."""
        self.weight_quantizer = RoleQuantizer(as_role(weight), mix_seed(key, 0))
        self.activation_quantizer = _quantizer(activation, mix_seed(key, 1))
        self.gradient_quantizer = _quantizer(gradient, mix_seed(key, 2))
        self.has_run = False
        self.grid = weight_grid(self.parameter()).join(self.weight_format)
        self.enter()
        self.own_scale()

    def enter(self) -> None:
        """Makes itself known to the weight and, with something to keep, to training steps.

        Again after copying and unpickling: torch copies a Parameter without its attributes.
        """
        weight = self.parameter()
        if weight is not None:
            weight.grid = self.grid
        register_layer(self)
        if any(quantizer.has_state for quantizer in self.quantizers().values()):
            follow_steps(self)

    def leave(self) -> None:
        """The layer is converted no longer: its weight may have another format, and steps go on without it."""
        self.grid.release()
        forget_layer(self)
        forget_steps(self)

    def parameter(self) -> Any:
        """The Parameter; None where it is made from other tensors since (pruning, a weight norm)."""
        return self.holder._parameters.get(self.weight_name)

    def held_parameter(self) -> Any:
        """What an optimizer holds: the weight, or what it is made from."""
        weight = self.parameter()
        return self.holder._parameters.get(f"{self.weight_name}_orig") if weight is None else weight

    def tensor(self) -> Tensor:
        """The weight as it is now: the Parameter, or what is made from others in its place."""
        weight = self.parameter()
        return cast(Tensor, getattr(self.holder, self.weight_name) if weight is None else weight)

    @property
    def weight_format(self) -> FloatFormat:
        """The weight's format."""
        return self.weight_quantizer.fmt

    def quantizers(self) -> dict[str, RoleQuantizer]:
        """The roles at work, by name; a role in float32 has none."""
        named = zip(ROLES, (self.weight_quantizer, self.activation_quantizer, self.gradient_quantizer), strict=True)
        return {name: quantizer for name, quantizer in named if quantizer is not None}

    def own_scale(self) -> Tensor | None:
        """The scale of the weight's grid, 0-d float32; None where the role's rule decides."""
        weight = self.parameter()
        if weight is not None:
            return self.grid.scale_for(weight)
        # Made from other tensors since: a mask leaves a weight on its grid, a norm or a parametrization does not.
        return self.grid.scale if f"{self.weight_name}_mask" in self.holder._buffers else None

    def rounded(self, weight: Tensor, *, advance: bool) -> Tensor:
        """The values of a weight in float32, whose gradient passes straight through to it.

        `weight`: `tensor()`, or what stands in its place in a replica or after an exchange, which has no grid.
        """
        refuse_transforms("a quantized layer", weight)
        is_own = weight is self.tensor()
        own_scale = self.own_scale() if is_own else None
        stored = self.stored() if is_own else None
        if stored is not None:
            values = stored
        elif own_scale is None and self.weight_quantizer.role.scale.kind in BY_LINES:
            values = self.from_rows(
                values_in_role(self.as_rows(weight.detach()), self.weight_quantizer, advance=advance)
            )
        else:
            values = values_in_role(weight, self.weight_quantizer, advance=advance, own_scale=own_scale)
        return cast(Tensor, StraightThrough.apply(weight, values))

    def settle(self) -> None:
        """The weight holds what is to be multiplied, and is not rounded again until somebody writes to it."""
        self._settled = memory_of(self.tensor())

    def stored(self) -> Tensor | None:
        """The weight as `settle` found it, float32; None where it was written since, and is to be rounded."""
        if self._settled is None or self._settled != memory_of(weight := self.tensor()):
            return None
        return weight.detach().to(torch.float32)

    def weight_operand(self, *, advance: bool = False) -> Operand:
        """The weight in its role, without gradient."""
        return self.weight_quantizer.operand(self.tensor(), advance=advance, own_scale=self.own_scale())

    def as_rows(self, x: Tensor) -> Tensor:
        """A tensor of the weight's shape as the matrix [outputs, summed] along whose rows scales may lie."""
        return x

    def from_rows(self, rows: Tensor) -> Tensor:
        """Back from `as_rows`; [outputs, 1] becomes what broadcasts to the weight."""
        return rows

    def quantized_weight(self) -> Tensor:
        """The values that are multiplied, float32."""
        stored = self.stored()
        return self.weight_operand().numbers if stored is None else stored

    def end_step(self) -> None:
        """A training step is over: histories take it in, stochastic roles go on to another draw."""
        self.has_run = False
        for quantizer in self.quantizers().values():
            quantizer.end_step()

    def reformat(self, format: str | FloatFormat) -> None:
        """Takes another format in every role that has the weight's; histories start again, and so does the grid."""
        before, after = self.weight_format, get_format(format)
        for name, quantizer in self.quantizers().items():
            if quantizer.fmt == before:
                role = quantizer.role.model_copy(update={"format": after.name})
                setattr(self, f"{name}_quantizer", RoleQuantizer(role, quantizer.key))
        self.grid.reformat(after)

    def numerics(self) -> str:
        """Each role, as in "E5M2 weight · BF16 activation · BF16 gradient"."""
        return self._told(str)

    def in_full(self) -> str:
        """`numerics` with what of the scales is not usual: what `print(model)` says."""
        return self._told(lambda role: role.in_full)

    def _told(self, text: Callable[[Role], str]) -> str:
        found = self.quantizers()
        return " · ".join(f"{text(found[name].role) if name in found else 'FP32'} {name}" for name in ROLES)

    @property
    def recipe(self) -> Tensor:
        """`numerics` as bytes, uint8: what a saved state belongs to."""
        return torch.tensor(list(self.numerics().encode()), dtype=torch.uint8)

    def saved(self, prefix: str) -> dict[str, Tensor]:
        """State of roles that have some, under `prefix` and the names of their attributes, and what it belongs to."""
        own = {
            f"{prefix}{name}_quantizer.{key}": value
            for name, quantizer in self.quantizers().items()
            for key, value in quantizer.state_dict().items()
        }
        return own | {f"{prefix}recipe": self.recipe} if own else {}

    def load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Takes out what `saved` put there; a plain layer's state leaves histories and draws as they are.

        ValueError for the state of a layer in other roles.
        """
        # Model states held the scale once; it is the optimizer's, and is found from the weights without one.
        state_dict.pop(f"{prefix}grid_scale", None)
        recipe = state_dict.pop(f"{prefix}recipe", None)
        if recipe is not None:
            saved = bytes(recipe.to(torch.uint8).tolist()).decode(errors="replace")
            if saved != self.numerics():
                raise ValueError(
                    f"the state of {prefix.removesuffix('.') or 'a layer'} was saved as {saved!r}; this layer is "
                    f"{self.numerics()!r}: convert the model in the saved roles, or load its weights only"
                )
        for name, quantizer in self.quantizers().items():
            keys = {key: f"{prefix}{name}_quantizer.{key}" for key in quantizer.state_dict()}
            quantizer.load_state_dict({key: state_dict.pop(k) for key, k in keys.items() if k in state_dict})

    def meet_loaded_weights(self) -> None:
        """Looks at weights that have just been loaded, for a compiled forward does not look."""
        self.enter()
        self.grid.expect_new_weights()
        self.own_scale()


def values_in_role(
    x: Tensor, quantizer: RoleQuantizer | None, *, advance: bool, axis: int = -1, own_scale: Tensor | None = None
) -> Tensor:
    """x in its role, float32 of x's shape, without gradient; lines lie along `axis`."""
    x = x.detach()
    if quantizer is None or not x.numel():  # of no elements there is no amax
        return x.to(torch.float32)
    moves = own_scale is None and quantizer.role.scale.kind in BY_LINES and axis % x.dim() != x.dim() - 1
    # The kernels that round at once take contiguous tensors only; a copy costs less than the way without them.
    lines = (x.movedim(axis, -1) if moves else x).contiguous()
    values = quantizer.values(lines, advance=advance, own_scale=own_scale)
    if values is None:
        values = quantizer.operand(lines, advance=advance, own_scale=own_scale).numbers
    return values.movedim(-1, axis).contiguous() if moves else values


def _quantizer(value: str | FloatFormat | Role | None, key: int) -> RoleQuantizer | None:
    return None if value is None else RoleQuantizer(as_role(value), key)
