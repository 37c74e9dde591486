"""How a tensor in one role (weight, activation, gradient) becomes an operand of a matrix product.

A `Role` is a value: a format, a rule for the scale, a rounding. A `RoleQuantizer` is a role at work in one layer: it
holds what outlives a step, the amax history of a delayed scale and the number of the draw that stochastic rounding
takes. Both stand still within a training step, whatever the number of its micro-batches, recomputed forwards and
evaluations; `end_step` moves them on (see `training_steps`).
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from altgrad.quantization.block_scaling import BlockFormat
from altgrad.quantization.formats import FORMATS, FloatFormat, get_format
from altgrad.quantization.kernels import MAX_HASHED_ELEMENTS, Drawn, Rounding
from altgrad.quantization.kernels.dispatch import as_int64, with_its_zeros
from altgrad.quantization.kernels.operand_dispatch import grid_values_by_rule, operand_kernels, values_by_lines
from altgrad.quantization.ops import grid_values, quantize, quantize_blocks
from altgrad.quantization.products import Operand, is_carried_in_bf16
from altgrad.quantization.scaling import ScaleRule

BF16 = FORMATS["BF16"]

ROLES = ("weight", "activation", "gradient")
"""What a product has a role for: its weight, its input, the gradient of its output."""


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
        """Format, kind of scale, rounding: what saved states of layers are known by, so it stays as it is."""
        words = [self.format]
        if self.scale.kind != "current":
            words.append(self.scale.kind.replace("_", "-"))
        if self.rounding != "nearest":
            words.append(self.rounding.replace("_", "-"))
        return " ".join(words)

    @property
    def in_full(self) -> str:
        """As `str`, with what of the scale is not usual, as in "E2M1 block 16 E4M3 stochastic"."""
        words = [self.format, *([] if self.scale == ScaleRule() else [str(self.scale)])]
        return " ".join(words + ([] if self.rounding == "nearest" else [self.rounding.replace("_", "-")]))


def as_role(value: Role | FloatFormat | str) -> Role:
    """The role that a format or its name stands for."""
    return value if isinstance(value, Role) else Role(format=get_format(value).name)


class RoleQuantizer:
    """A role at work in one layer. `key` seeds its stochastic rounding; equal keys make equal draws.

    `draws`: number of this step's draw, 0-d int64 on the CPU. A tensor, so that a compiled graph takes it as an input;
    on the CPU, so that reading it waits for no device.
    """

    def __init__(self, role: Role, key: int = 0) -> None:
        self.role = role
        self.fmt = get_format(role.format)
        self.key = key
        self.draws = torch.zeros((), dtype=torch.int64, device="cpu")
        self.tracker = role.scale.new_state(self.fmt)
        self._is_plain_bfloat16 = self.fmt == BF16 and role.rounding == "nearest"
        self._is_drawn = role.rounding == "stochastic"
        self._rounders: dict[bool, Any] = {}
        self._text, self._signed_key = role.model_dump_json(), as_int64(key)

    def __getstate__(self) -> dict[str, Any]:
        """Without what follows from the role."""
        return {name: self.__dict__[name] for name in ("role", "key", "draws", "tracker")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["role"], state["key"])  # type: ignore[misc]
        self.draws, self.tracker = state["draws"], state["tracker"]

    @property
    def has_state(self) -> bool:
        """Whether a later step depends on an earlier one."""
        return self.tracker is not None or self.role.rounding == "stochastic"

    def operand(self, x: Tensor, *, advance: bool, own_scale: Tensor | None = None) -> Operand:
        """x rounded, as an operand without gradient; `own_scale` overrules the role's rule.

        With `advance` the tensor joins what the step gathers for the history.
        """
        has_one_scale = own_scale is not None or self.role.scale.kind in ("current", "delayed")
        carries_bf16 = has_one_scale and is_carried_in_bf16(x, self.fmt)
        x = x.detach()
        rounding = self.role.rounding
        seed = Drawn(self.key, self.draws) if rounding == "stochastic" else None
        if own_scale is None and (found := self._at_once(x, seed, advance, carries_bf16)) is not None:
            values = with_its_zeros(found[0], self.fmt)
            return Operand(values, self.fmt, found[1], found[1] if carries_bf16 else None)
        if not carries_bf16 and x.dtype != torch.float64:
            x = x.to(torch.float32)
        if self._is_plain_bfloat16 and own_scale is None and x.dtype != torch.float64:
            # The native cast keeps infinities, which are signals; 16-bit formats have scale 1.
            values = x.to(torch.bfloat16)
            return Operand(values if carries_bf16 else values.to(torch.float32), BF16, None)
        scale = own_scale
        if scale is None and self.tracker is not None:
            scale = self.tracker.gather(x) if advance else self.tracker.scale_for(x)
        elif scale is None:
            scale = self.role.scale.scale(x, self.fmt)
        if carries_bf16:
            values = grid_values(x, self.fmt, scale, rounding=rounding, seed=seed)
        elif own_scale is None and self.role.scale.kind == "block":
            values = quantize_blocks(x, self.fmt, scale, rounding=rounding, seed=seed, ste="identity")
        else:
            values = quantize(x, self.fmt, scale, rounding=rounding, seed=seed)
        if own_scale is None and self.fmt.total_bits <= 8 and not carries_bf16:
            # Saturation would turn an infinity, which says that training has failed, into a harmless number.
            values = torch.where(torch.isinf(x), x, values)
        return Operand(
            values if carries_bf16 else values.to(torch.float32), self.fmt, scale, scale if carries_bf16 else None
        )

    def values(
        self, x: Tensor, *, advance: bool, own_scale: Tensor | None = None, draws: Tensor | None = None
    ) -> Tensor | None:
        """The numbers of `operand`, float32 of x's shape, by one kernel; None where only `operand` can.

        The same bits. It is what a layer multiplies where the product is emulated on a CPU, but for a vector, whose
        product torch sums in another order. `draws`: number of the draw, not its own.
        """
        if torch.compiler.is_compiling():
            return self._values_in_graph(x.detach(), own_scale)
        is_bfloat16, is_rounded = self._is_plain_bfloat16 and own_scale is None, False
        if x.dtype is torch.bfloat16 or x.dtype is torch.float16:
            if not x.is_cpu:
                return None
            is_rounded, x = is_bfloat16 and x.dtype is torch.bfloat16, x.detach().to(torch.float32)
        kernels = operand_kernels(x)
        if kernels is None or x.dim() < 2:
            return None
        if is_rounded:
            return x
        out = torch.empty_like(x)
        if is_bfloat16:
            kernels.round_to_bfloat16(x, out)
            return out
        tracker, number = self.tracker, 0
        if self._is_drawn:
            if x.numel() > MAX_HASHED_ELEMENTS:
                return None
            draws = self.draws if draws is None else draws  # alive until the kernel has read it
            number = draws.data_ptr()
        if own_scale is not None:
            if not _is_readable(own_scale):
                return None
            is_done = self._rounder(kernels, True)(x, out, kernels.Cells(own_scale.data_ptr(), number))
        elif tracker is None:
            is_done = self._rounder(kernels, False)(x, out, kernels.Cells(0, number))
        else:
            window, gathered, opening = tracker.cells
            if self.fmt.total_bits > 8 or not all(
                _is_readable(c) for c in (window, gathered, opening) if c is not None
            ):
                return None
            history = (0, 0) if window is None else (window.data_ptr(), window.numel())
            cells = kernels.Cells(0, number, *history, gathered.data_ptr(), opening.data_ptr())
            is_done = self._rounder(kernels, False)(x, out, cells, advance=advance, shared=tracker.shared)
        return with_its_zeros(out, self.fmt) if is_done else None

    def _values_in_graph(self, x: Tensor, own_scale: Tensor | None) -> Tensor | None:
        """`values` as one operator of a graph, of a role whose rule keeps no history."""
        is_row_major = x.is_cpu and x.dtype == torch.float32 and x.dim() > 1 and x.is_contiguous()
        if not is_row_major or self.tracker is not None:
            return None
        if self._is_plain_bfloat16 and own_scale is None:
            return x.to(torch.bfloat16).to(torch.float32)  # which fuses with its neighbours
        # Without draws no key: a graph would hold for one layer only.
        number, key = (self.draws, self._signed_key) if self._is_drawn else (None, 0)
        return cast(Tensor, _values_op(x, self._text, key, number, own_scale))

    def _rounder(self, kernels: Any, has_own_scale: bool) -> Any:
        found = self._rounders.get(has_own_scale)
        if found is None:
            rule = self.role.scale
            source, block = kernels.Source.GIVEN, (0, 0, 1.0)
            if not has_own_scale and self.fmt.total_bits <= 8:
                source = kernels.SOURCES[rule.block_scale_format if rule.kind == "block" else rule.kind]
            if source in (kernels.Source.E8M0, kernels.Source.E4M3):
                blocks = BlockFormat(self.fmt, rule.block_scale_format, rule.block_size)
                block = blocks.size, blocks.emax, get_format("E4M3").max * self.fmt.max
            found = self._rounders[has_own_scale] = kernels.OperandRounder(
                self.fmt,
                source,
                self.role.rounding,
                keeps_infinities=not has_own_scale and self.fmt.total_bits <= 8,
                headroom=rule.headroom * 2.0**rule.margin,
                power_of_two=rule.power_of_two,
                block=block,
                key=self.key,
            )
        return found

    def _at_once(
        self, x: Tensor, seed: Drawn | None, advance: bool, carries_bf16: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Values and scales by the kernels that also find the scale, where rule and device allow it."""
        rule, rounding = self.role.scale, self.role.rounding
        if self.fmt.total_bits > 8 or (self._is_drawn and x.numel() > MAX_HASHED_ELEMENTS):
            return None
        headroom = rule.headroom * 2.0**rule.margin
        if rule.kind == "per_channel":
            return values_by_lines(
                x, self.fmt, rounding, seed, rule.kind, headroom=headroom, power_of_two=rule.power_of_two
            )
        if rule.kind == "block":
            blocks = BlockFormat(self.fmt, rule.block_scale_format, rule.block_size)
            return values_by_lines(x, self.fmt, rounding, seed, blocks.scale, size=blocks.size, emax=blocks.emax)
        if not carries_bf16:
            return None
        tracker, cells = self.tracker, None
        if tracker is not None:
            tracker.to(x.device)
            window, gathered, opening = tracker.cells
            cells = None if window is None else window.to(x.device), gathered, opening
        shared = tracker is not None and tracker.shared
        return grid_values_by_rule(
            x, self.fmt, rounding, seed, headroom, rule.power_of_two, cells=cells, advance=advance, shared=shared
        )

    def end_step(self) -> None:
        """The training step is over: the next one has another draw, and what was gathered joins the history."""
        if self.role.rounding == "stochastic":
            self.draws += 1
        if self.tracker is not None and not self.tracker.shared:
            self.tracker.settle()

    @property
    def amax_history(self) -> Tensor:
        """The amaxes of a delayed scale, latest first, float32 [history]; NaN where there was no step yet."""
        assert self.tracker is not None
        window = self.tracker.history.window
        return _absent(self.tracker.history.length) if window is None else window

    @property
    def amax_gathered(self) -> Tensor:
        """The largest amax of the step under way, 0-d float32; NaN where there is none."""
        assert self.tracker is not None
        return self.tracker.gathered_or_nan

    def state_dict(self) -> dict[str, Tensor]:
        """Exact state for a checkpoint, by the names of the attributes; empty for a role without state."""
        state = {"draws": self.draws.clone()} if self.role.rounding == "stochastic" else {}
        if self.tracker is not None:
            state |= {"amax_history": self.amax_history.clone(), "amax_gathered": self.amax_gathered.clone()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from `state_dict`; ValueError for another length of history."""
        if "draws" in state:
            self.draws = state["draws"].detach().to("cpu", torch.int64).reshape(()).clone()
        if self.tracker is not None and "amax_history" in state:
            window, gathered = (
                None if value is None or bool(value.isnan().all()) else value.detach().to(torch.float32)
                for value in (state["amax_history"], state.get("amax_gathered"))
            )
            self.tracker.load_state_dict({"window": window, "gathered": gathered})


def _is_readable(cell: Tensor) -> bool:
    """Whether a kernel may take the address of numbers that go with a tensor."""
    return cell.dtype is torch.float32 and cell.is_cpu and cell.is_contiguous() and cell.numel() >= 1


def _absent(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float32)


def operand_of(x: Tensor, quantizer: RoleQuantizer | None, *, advance: bool) -> Operand:
    """x as the quantizer's operand, or as it is, in float32, where there is none."""
    if quantizer is None:
        return Operand(x.detach().to(torch.float32), None, None)
    return quantizer.operand(x, advance=advance)


def values_of(x: Tensor, quantizer: RoleQuantizer | None, *, advance: bool) -> Tensor | None:
    """The numbers of `operand_of`, float32 of x's shape, by one kernel, or None."""
    if quantizer is not None:
        return quantizer.values(x, advance=advance)
    wide = x.detach().to(torch.float32)
    is_compiling = torch.compiler.is_compiling()
    is_ready = wide.is_cpu and wide.is_contiguous() if is_compiling else operand_kernels(wide) is not None
    return wide if wide.dim() > 1 and is_ready else None


@cache
def _quantizer(role: str, signed_key: int) -> RoleQuantizer:
    return RoleQuantizer(Role.model_validate_json(role), signed_key & ((1 << 64) - 1))


@torch.library.custom_op("altgrad::operand", mutates_args=())
def _values_op(x: Tensor, role: str, key: int, number: Tensor | None, own_scale: Tensor | None) -> Tensor:
    """`RoleQuantizer.values` of a role as JSON; `number`: of the draw."""
    quantizer, x = _quantizer(role, key), x.contiguous()
    values = quantizer.values(x, advance=False, own_scale=own_scale, draws=number)
    if values is None:
        single = copy.copy(quantizer)
        single.draws = quantizer.draws if number is None else number
        values = single.operand(x, advance=False, own_scale=own_scale).numbers
    return values


@_values_op.register_fake
def _shape_of_values(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)
