"""Scales: current, from the tensor at hand; delayed, from the amax of recent steps; per channel; and by block.

scale = headroom * max|x| / fmt.max maps the largest magnitude onto the format's largest value. Formats wider
than 8 bits cover the range of training by themselves and take scale 1. Nothing here waits for a device:
scales are float32 tensors where the data are.

The lower bound on a scale is float32's smallest normal and no larger "epsilon": E7M0 needs 5.4e-20 for a
tensor whose amax is 1. A NaN or infinity in a tensor must not enter the history either: it would stay there
for the whole window.

Several processes that share a model hold equal delayed scales when their trackers are `shared`: a step's amaxes
then wait for `synchronize_amax`, which joins all of them over all processes in one all_reduce(MAX).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, distributed

from altgrad.quantization.block_scaling import DEFAULT_SIZE, BlockFormat, BlockScale, block_scale
from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.kernels import LARGEST_SCALE, SMALLEST_SCALE


class ScaleRule(BaseModel):
    """How a tensor role finds its scales. `scale` is all a layer calls; `new_state` makes what it keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["current", "delayed", "per_channel", "block"] = Field(
        default="current",
        description="amax of the tensor at hand | of recent steps | of each row along the last axis "
        "(an output channel of a weight, a token of an activation) | of each block in such a row",
    )
    headroom: float = Field(default=1.0, gt=0.0, allow_inf_nan=False, description="factor on the scale")
    margin: int = Field(default=0, ge=0, le=64, description="binades free above amax: a factor 2^margin")
    power_of_two: bool = Field(default=False, description="scales rounded up to a power of two")
    history: int = Field(default=16, ge=1, description="steps a delayed scale looks back")
    shared: bool = Field(default=False, description="delayed scales wait for synchronize_amax, equal in all processes")
    block_scale_format: BlockScale = Field(
        default="E8M0", description="E8M0: a power of two (MX); E4M3: times one float32 a tensor (NVFP4)"
    )
    block_size: int = Field(
        default=0,
        ge=0,
        validation_alias=AliasChoices("block_size", "block"),
        description="elements in a block; 0: 32 for E8M0, 16 for E4M3",
    )

    @model_validator(mode="after")
    def _has_no_idle_knob(self) -> Self:
        by_block = {"block_scale_format", "block_size"}
        idle = {"delayed": by_block, "block": set(type(self).model_fields) - by_block - {"kind"}}
        for name in sorted(idle.get(self.kind, by_block | {"history", "shared"})):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} means nothing to a {self.kind!r} scale")
        return self

    def __str__(self) -> str:
        """Its kind, and what of it is not usual: 'delayed', 'per-channel', 'block 16 E4M3', 'current, margin 1'."""
        if self.kind == "block":
            size = self.block_size or DEFAULT_SIZE[self.block_scale_format]
            return f"block {size}" + ("" if self.block_scale_format == "E8M0" else f" {self.block_scale_format}")
        fields = type(self).model_fields
        own = {name: getattr(self, name) for name in fields if name != "kind"}
        words = [f"{name} {value:g}" for name, value in own.items() if value != fields[name].default]
        return ", ".join([self.kind.replace("_", "-"), *words])

    def new_state(self, fmt: str | FloatFormat) -> ScaleTracker | None:
        """What `scale` needs from earlier steps: a tracker for each tensor under a delayed rule, else None."""
        if self.kind != "delayed":
            return None
        return ScaleTracker(
            fmt, self.history, self.headroom, margin=self.margin, power_of_two=self.power_of_two, shared=self.shared
        )

    def scale(
        self,
        x: Tensor,
        fmt: str | FloatFormat,
        state: ScaleTracker | None = None,
        *,
        update: bool = True,
        largest: Tensor | None = None,
    ) -> Tensor:
        """The scale to quantize x with: float32 that broadcasts to x; 1 for formats wider than 8 bits.

        0-d if current or delayed, [..., 1] per channel, x's shape by block. A delayed rule takes the state of
        this very tensor, and x joins its history unless `update` is off (evaluation). `largest`: x's `amax`, where
        it is known.
        """
        fmt = get_format(fmt)
        if self.kind == "delayed":
            if state is None or state.fmt != fmt:
                has = "none" if state is None else f"one for {state.fmt.name}"
                raise ValueError(f"a delayed scale needs the state of new_state({fmt.name!r}), got {has}")
            return state.update(x) if update else state.scale_for(x, largest)
        if fmt.total_bits > 8:
            return torch.ones((), dtype=torch.float32, device=x.device)
        if self.kind == "block":
            return block_scale(x, BlockFormat(fmt, self.block_scale_format, self.block_size))
        is_whole = self.kind == "current" or x.dim() == 0
        if not is_whole:
            largest = channel_amax(x, tuple(range(x.dim() - 1)))
        elif largest is None:
            largest = amax(x)
        headroom = self.headroom * 2.0**self.margin
        return scale_of_amax(largest, fmt, power_of_two=self.power_of_two, headroom=headroom)


def compute_scale(x: Tensor, fmt: str | FloatFormat, *, power_of_two: bool = False, headroom: float = 1.0) -> Tensor:
    """headroom * amax / fmt.max, rounded up to a power of two if asked, within [2^-126, 2^126]; 0-d float32.

    1 where amax is zero or not finite (an empty tensor has amax zero).
    """
    return scale_of_amax(amax(x), fmt, power_of_two=power_of_two, headroom=headroom)


def compute_channel_scale(
    x: Tensor,
    fmt: str | FloatFormat,
    axis: int | tuple[int, ...] = 0,
    *,
    power_of_two: bool = False,
    headroom: float = 1.0,
) -> Tensor:
    """`compute_scale` of every slice along `axis`, one axis or several: x's shape with 1 on all the others.

    Axis 0 of a weight [out, in] is its output channels: scales [out, 1].
    """
    return scale_of_amax(channel_amax(x, axis), fmt, power_of_two=power_of_two, headroom=headroom)


def scale_of_amax(
    largest: Tensor, fmt: str | FloatFormat, *, power_of_two: bool = False, headroom: float = 1.0
) -> Tensor:
    """`compute_scale` from known amaxes, a float32 tensor of any shape."""
    if not headroom > 0.0:
        raise ValueError(f"headroom must be a positive factor, got {headroom!r}")
    is_usable = torch.isfinite(largest) & (largest > 0)
    scale = (largest * (headroom / get_format(fmt).max)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    if power_of_two:
        # One below the next binade added to the bits, mantissa dropped: exact, where log2 is not.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(is_usable, scale, 1.0)


def format_scale(x: Tensor, fmt: str | FloatFormat, *, power_of_two: bool = False, headroom: float = 1.0) -> Tensor:
    """The scale x takes in fmt: 1 for formats wider than 8 bits, else `compute_scale`; 0-d float32."""
    fmt = get_format(fmt)
    if fmt.total_bits > 8:
        return torch.ones((), dtype=torch.float32, device=x.device)
    return compute_scale(x, fmt, power_of_two=power_of_two, headroom=headroom)


def amax(x: Tensor) -> Tensor:
    """Largest magnitude, 0-d float32; NaN if any element is, 0 for an empty tensor."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    return torch.maximum(high, -low).to(torch.float32)


def channel_amax(x: Tensor, axis: int | tuple[int, ...] = 0) -> Tensor:
    """`amax` of every slice along `axis`, one axis or several: float32 of x's shape with 1 on all the others."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    if any(not -x.dim() <= kept < x.dim() for kept in axes):
        raise ValueError(f"a tensor of {x.dim()} axes has no axis {axis}")
    kept_axes = {kept % x.dim() for kept in axes}
    others = [i for i in range(x.dim()) if i not in kept_axes]
    if not others:
        return x.detach().abs().to(torch.float32)
    shape = [n if i in kept_axes else 1 for i, n in enumerate(x.shape)]
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    return x.detach().abs().amax(others, keepdim=True).to(torch.float32)


class AmaxHistory:
    """The finite amax of the last `length` pushes."""

    def __init__(self, length: int = 16) -> None:
        if length < 1:
            raise ValueError(f"history length must be at least 1, got {length}")
        self.length = length
        self._window: Tensor | None = None

    def push(self, value: Tensor | float, where: Tensor | None = None) -> None:
        """Take in one amax; what is not finite takes a place in the window but counts as absent.

        `where`, 0-d bool: whether to, known on the device only.
        """
        value = torch.as_tensor(value, dtype=torch.float32).detach()
        newest = torch.where(torch.isfinite(value), value, 0.0).reshape(1)
        # A new tensor and no counter: a step of several million must not recompile a traced one each time.
        earlier = newest.new_zeros(self.length) if self._window is None else self._window.to(newest.device)
        window = torch.cat([newest, earlier[:-1]])
        self._window = window if where is None else torch.where(where, window, earlier)

    def amax(self) -> Tensor:
        """Largest finite amax in the window, 0-d float32; 0 while there is none."""
        return torch.zeros((), dtype=torch.float32) if self._window is None else self._window.max()

    @property
    def window(self) -> Tensor | None:
        """The amaxes, latest first, float32 [length]; None while nothing was pushed."""
        return self._window

    @property
    def is_empty(self) -> bool:
        """Whether nothing was pushed yet."""
        return self._window is None

    def state_dict(self) -> dict[str, object]:
        """Exact state for a checkpoint: the window, latest first."""
        return {"window": None if self._window is None else self._window.clone()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict`; ValueError for a window of another length."""
        window = state.get("window", "absent")
        if not (window is None or isinstance(window, Tensor)):
            raise ValueError(f"not the state of an amax history: {state!r}")
        if window is not None and window.numel() != self.length:
            raise ValueError(f"history holds {self.length} steps, the state {window.numel()}")
        self._window = None if window is None else window.clone()


class ScaleTracker:
    """Delayed scaling: a tensor's scale from the amax of earlier steps, so that no pass waits for its own.

    The scale is headroom * 2^margin * amax / fmt.max. A step may hold several passes (micro-batches, a recomputed
    forward): `gather` each of them, then `settle` once, and they take one place in the history and one scale. `update`
    is a step of one pass. With `shared`, amaxes gather until `synchronize_amax`, and until its first call the scale is
    1: the processes have nothing in common yet. (One pass over a batch and a synchronization before the first step
    spare training that.)
    """

    def __init__(
        self,
        fmt: str | FloatFormat,
        history: int = 16,
        headroom: float = 1.0,
        *,
        margin: int = 0,
        power_of_two: bool = False,
        shared: bool = False,
    ) -> None:
        if not headroom > 0.0:
            raise ValueError(f"headroom must be a positive factor, got {headroom!r}")
        self.fmt = get_format(fmt)
        self.headroom = headroom * 2.0**margin
        self.power_of_two = power_of_two
        self.shared = shared
        self.history = AmaxHistory(history)
        # Written in place, which a compiled backward pass can do; NaN where there is nothing.
        self._gathered = torch.full((), torch.nan, dtype=torch.float32)
        self._opening = self._gathered.clone()

    def to(self, device: torch.device) -> None:
        """Keeps what a step gathers on a device."""
        if self._gathered.device != device:
            self._gathered, self._opening = self._gathered.to(device), self._opening.to(device)

    def update(self, x: Tensor) -> Tensor:
        """`gather(x)`; then x joins the history (if `shared`, with the next synchronization)."""
        scale = self.gather(x)
        if not self.shared:
            self.settle(self._gathered.clone())
        return scale

    def gather(self, x: Tensor) -> Tensor:
        """The scale of this step for x, 0-d float32; x counts when the step is settled."""
        self.to(x.device)
        largest = amax(x)
        scale = self.scale_for(x, largest)
        if self.history.is_empty and not self.shared:
            # No later pass of the first step may take another scale than the first one took.
            self._opening.copy_(torch.where(torch.isnan(self._opening), largest, self._opening))
        self._gathered.copy_(torch.fmax(self._gathered, torch.where(torch.isfinite(largest), largest, 0.0)))
        return scale

    def scale_for(self, x: Tensor, largest: Tensor | None = None) -> Tensor:
        """The scale for x from earlier steps, 0-d float32; from x, or its known amax, on the first unless `shared`."""
        if self.history.is_empty and not self.shared:
            largest = amax(x) if largest is None else largest
            opening = self._opening.to(x.device)
            return self._scale_of(torch.where(torch.isnan(opening), largest, opening))
        return self._scale_of(self.history.amax().to(x.device))

    def scale(self) -> Tensor:
        """The scale the history calls for, 0-d float32; 1 while it holds no positive finite amax."""
        return self._scale_of(self.history.amax())

    def gathered(self) -> Tensor | None:
        """Largest finite amax since the last step ended, 0-d float32; None if there was no tensor (waits to know)."""
        return None if bool(self._gathered.isnan()) else self._gathered

    @property
    def gathered_or_nan(self) -> Tensor:
        """`gathered` without waiting for a device: NaN if there was no tensor."""
        return self._gathered

    @property
    def cells(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """The window of the history, None while it is empty, and what kernels write: what was gathered, and opened."""
        return self.history.window, self._gathered, self._opening

    def settle(self, largest: Tensor | None = None) -> None:
        """Ends a step: what was gathered, or an amax in its place, joins the history; nothing where there is none."""
        if largest is not None:
            self.history.push(largest)
        elif not self.history.is_empty:
            self.history.push(self._gathered, where=~torch.isnan(self._gathered))
        elif (gathered := self.gathered()) is not None:
            self.history.push(gathered)
        self._gathered.fill_(torch.nan)
        self._opening.fill_(torch.nan)

    def state_dict(self) -> dict[str, object]:
        """Exact state for a checkpoint."""
        gathered = self.gathered()
        return {**self.history.state_dict(), "gathered": None if gathered is None else gathered.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; ValueError for another length of history."""
        self.history.load_state_dict(state)
        gathered = state["gathered"]
        self._gathered.fill_(torch.nan) if gathered is None else self._gathered.copy_(gathered)
        self._opening.fill_(torch.nan)

    def _scale_of(self, largest: Tensor) -> Tensor:
        if self.fmt.total_bits > 8:
            return torch.ones((), dtype=torch.float32, device=largest.device)
        return scale_of_amax(largest, self.fmt, power_of_two=self.power_of_two, headroom=self.headroom)


def synchronize_amax(trackers: Sequence[ScaleTracker], group: distributed.ProcessGroup | None = None) -> None:
    """Ends a step for shared trackers: what they gathered, largest over all processes, joins their histories.

    One all_reduce(MAX) for all of them; none without an initialized process group, or without trackers. Every
    process must pass the trackers of the same tensors in the same order. A tracker that saw no tensor, here or
    anywhere, counts as having seen zeros. ValueError for a tracker that is not shared.
    """
    if any(not tracker.shared for tracker in trackers):
        raise ValueError("only trackers made with shared=True wait for a synchronization; another was passed")
    if not trackers:
        return
    gathered = [tracker.gathered_or_nan for tracker in trackers]
    device = next((seen.device for seen in gathered if seen.device.type != "cpu"), gathered[0].device)
    largest = torch.stack([seen.to(device) for seen in gathered]).nan_to_num(0.0)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
    for tracker, value in zip(trackers, largest.unbind(), strict=True):
        tracker.settle(value)
