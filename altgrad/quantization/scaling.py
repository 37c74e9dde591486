"""Per-tensor scales: current, from the tensor at hand, and delayed, from the amax of recent steps.

scale = headroom * max|x| / fmt.max maps the largest magnitude onto the format's largest value. Formats wider
than 8 bits cover the range of training by themselves and take scale 1. Nothing here waits for a device:
scales are 0-d float32 tensors where the data are.

The lower bound on a scale is float32's smallest normal and no larger "epsilon": E7M0 needs 5.4e-20 for a
tensor whose amax is 1. A NaN or infinity in a tensor must not enter the history either: it would stay there
for the whole window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format

SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = 2.0**126


def compute_scale(
    x: Tensor, fmt: str | FloatFormat, *, power_of_two: bool = False, headroom: float = 1.0
) -> Tensor:
    """headroom * amax / fmt.max, rounded up to a power of two if asked, within [2^-126, 2^126]; 0-d float32.

    1 where amax is zero or not finite (an empty tensor has amax zero).
    """
    return scale_of_amax(amax(x), fmt, power_of_two=power_of_two, headroom=headroom)


def scale_of_amax(
    largest: Tensor, fmt: str | FloatFormat, *, power_of_two: bool = False, headroom: float = 1.0
) -> Tensor:
    """`compute_scale` from a known amax, a 0-d float32 tensor."""
    if not headroom > 0.0:
        raise ValueError(f"headroom must be a positive factor, got {headroom!r}")
    is_usable = torch.isfinite(largest) & (largest > 0)
    scale = (largest * (headroom / get_format(fmt).max)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    if power_of_two:
        # One below the next binade added to the bits, mantissa dropped: exact, where log2 is not.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(is_usable, scale, 1.0)


def format_scale(
    x: Tensor, fmt: str | FloatFormat, *, power_of_two: bool = False, headroom: float = 1.0
) -> Tensor:
    """The scale x takes in fmt: 1 for formats wider than 8 bits, else `compute_scale`; 0-d float32."""
    fmt = get_format(fmt)
    if fmt.total_bits > 8:
        return torch.ones((), device=x.device)
    return compute_scale(x, fmt, power_of_two=power_of_two, headroom=headroom)


def amax(x: Tensor) -> Tensor:
    """Largest magnitude, 0-d float32; NaN if any element is, 0 for an empty tensor."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x.detach())
    return torch.maximum(high, -low).to(torch.float32)


class AmaxHistory:
    """The finite amax of the last `length` pushes."""

    def __init__(self, length: int = 16) -> None:
        if length < 1:
            raise ValueError(f"history length must be at least 1, got {length}")
        self.length = length
        self._window: Tensor | None = None
        self._pushed = 0

    def push(self, value: Tensor | float) -> None:
        """Take in one amax; what is not finite takes a place in the window but counts as absent."""
        value = torch.as_tensor(value, dtype=torch.float32).detach()
        if self._window is None:
            self._window = torch.zeros(self.length, device=value.device)
        self._window[self._pushed % self.length] = torch.where(torch.isfinite(value), value, 0.0)
        self._pushed += 1

    def amax(self) -> Tensor:
        """Largest finite amax in the window, 0-d float32; 0 while there is none."""
        return torch.zeros(()) if self._window is None else self._window.max()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was pushed yet."""
        return self._pushed == 0

    def state_dict(self) -> dict[str, object]:
        """Exact state for a checkpoint."""
        return {"window": None if self._window is None else self._window.clone(), "pushed": self._pushed}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue from `state_dict`; ValueError for a window of another length."""
        window, pushed = state["window"], state["pushed"]
        if not isinstance(pushed, int) or not (window is None or isinstance(window, Tensor)):
            raise ValueError(f"not the state of an amax history: {state!r}")
        if window is not None and window.numel() != self.length:
            raise ValueError(f"history holds {self.length} steps, the state {window.numel()}")
        self._window, self._pushed = (None if window is None else window.clone()), pushed


class ScaleTracker:
    """Delayed scaling: a tensor's scale from the amax of earlier steps, so that no pass waits for its own."""

    def __init__(self, fmt: str | FloatFormat, history: int = 16, headroom: float = 1.0) -> None:
        self.fmt = get_format(fmt)
        self.headroom = headroom
        self.history = AmaxHistory(history)

    def update(self, x: Tensor) -> Tensor:
        """The scale for x from earlier steps (from x on the first), 0-d float32; then x joins the history."""
        largest = amax(x)
        scale = self._scale_of(largest) if self.history.is_empty else self.scale()
        self.history.push(largest)
        return scale

    def scale(self) -> Tensor:
        """The scale the history calls for, 0-d float32; 1 while it holds no positive finite amax."""
        return self._scale_of(self.history.amax())

    def _scale_of(self, largest: Tensor) -> Tensor:
        if self.fmt.total_bits > 8:
            return torch.ones((), device=largest.device)
        return scale_of_amax(largest, self.fmt, headroom=self.headroom)
