"""Two mends that may change a training, and hence are declared before it: a clip of gradients and a shift of formats.

**Partition-relative clipping.** A partition is one parameter tensor. What is bounded is the gradient relative to the
weight, as in AGC (arXiv 2102.06171), and the bound follows the tensor's own past, as in AdaGC (arXiv 2502.11034):

    r = RMS(g) / max(RMS(w), floor)                     relative gradient, one per tensor and step
    limit = factor * allowance(format) * mean of past r
    g <- g * min(1, limit / r)                          before the step; the clipped r joins the mean

so neither the loss's scale nor the tensor's size or kind matters, which a fixed bound would have to know. The mean is
plain over the first `warmup` steps, which are never clipped, and decays after; since clipped values join it, one
spike raises the next limit by a factor of at most 1 + (1 - decay) * (factor * allowance - 1), while a lasting change of
level is followed.

A factor of 4 clipped 1 to 3 % of the gradients of a 4 x 64 GPT in runs that were healthy without it (float32, E4M3,
E7M0; two seeds each; 160 steps of AdamW at 2e-3, no global clip), and all six ended at a lower validation loss.

allowance(format) = 1 + 2^-(M+1), between 1 and 1.5. A layer sees its weight through the format, off by up to half a
spacing, a relative 2^-(M+1); the gradient there is another by about as much, to first order, and that is no spike. It
is bounded for every format: E7M0 has 1.5, E5M2 1.125, E4M3 1.0625, BF16 1.004, float32 1.

**Emergency shift.** A layer whose format fails moves to a neighbour of the same width: to one exponent bit more where
range fails (overflow, NaN), to one mantissa bit more where precision fails (stall).

| format | range fails | precision fails |
| --- | --- | --- |
| up to 15 bits | E+1, M-1 | E-1, M+1 |
| ... no such split, or the layer was there before | BF16 | BF16 |
| 16 bits but BF16 | BF16 | FP32 |
| BF16 | FP32 | FP32 |
| FP32 | the end | the end |

The neighbour has the split's default variant, but that of `fnuz` and `p3109` has theirs: where the split has none, the
way is to BF16. A bias other than the variant's stays behind, and INT8 goes to E1M6: the event's two formats say so.

Each shift is an event with both formats, for the run's label. No layer comes to a format twice, so every ladder ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format, unknown_message

ShiftReason = Literal["overflow", "nonfinite", "stall"]

FLOAT32 = "FP32"
"""Name of no quantization at all, the end of every ladder."""


class ClipReport(NamedTuple):
    """One step: tensors clipped, tensors left alone for a gradient that is not finite, and the smallest factor; 0-d."""

    clipped: Tensor
    nonfinite: Tensor
    smallest: Tensor


class PartitionRelativeClipper:
    """Clips each tensor's gradient to a multiple of its usual size relative to its weight; see the module.

    `factor`: multiple of the usual size, above 1. `decay`: of the mean, per step. `warmup`: steps that only measure.
    `floor`: smallest RMS of a weight to divide by, so that zero-initialized tensors can train.
    """

    def __init__(self, factor: float = 4.0, decay: float = 0.97, warmup: int = 10, floor: float = 1e-3) -> None:
        if not 1.0 < factor < math.inf or not 0.0 <= decay < 1.0 or warmup < 1 or not floor > 0.0:
            raise ValueError(
                "need a finite factor > 1, 0 <= decay < 1, warmup >= 1 and floor > 0; "
                f"got factor={factor}, decay={decay}, warmup={warmup}, floor={floor}"
            )
        self.factor, self.decay, self.warmup, self.floor = factor, decay, warmup, floor
        self._mean: dict[str, Tensor] = {}
        self._steps: dict[str, Tensor] = {}

    def relative_limit(self, fmt: str | FloatFormat | None) -> float:
        """Largest multiple of its usual size that a gradient keeps in this format; None and "FP32" are float32."""
        return self.factor * format_allowance(fmt)

    @torch.no_grad()
    def clip(
        self, parameters: Mapping[str, Tensor], formats: Mapping[str, str | FloatFormat | None] | None = None
    ) -> ClipReport:
        """Scales `.grad` in place, after the backward pass and before the step; without waiting for the device.

        `formats` by the same names; what is absent is float32. Tensors without a gradient are passed over. A gradient
        that is not clipped keeps every bit; one that is not finite too, and it moves no mean.
        """
        formats = formats or {}
        clipped: list[Tensor] = []
        broken: list[Tensor] = []
        factors: list[Tensor] = []
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            ratio = _rms(parameter.grad) / _rms(parameter).clamp(min=self.floor)
            kept = self._kept_share(name, ratio, self.relative_limit(formats.get(name)))
            parameter.grad.mul_(kept.to(parameter.grad.dtype))
            clipped.append(kept < 1.0)
            broken.append(~torch.isfinite(ratio))
            factors.append(kept)
        if not factors:
            zero = torch.zeros((), dtype=torch.int64)
            return ClipReport(zero, zero.clone(), torch.ones((), dtype=torch.float64))
        return ClipReport(torch.stack(clipped).sum(), torch.stack(broken).sum(), torch.stack(factors).min())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Means and steps by name."""
        return {
            "mean": {name: value.clone() for name, value in self._mean.items()},
            "steps": {name: value.clone() for name, value in self._steps.items()},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._mean = {name: value.clone() for name, value in state["mean"].items()}
        self._steps = {name: value.clone() for name, value in state["steps"].items()}

    def _kept_share(self, name: str, ratio: Tensor, multiple: float) -> Tensor:
        """The factor for a gradient of this relative size, 1 where it stays; takes the size into the mean."""
        mean = self._mean.get(name, torch.zeros_like(ratio))
        steps = self._steps.get(name, torch.zeros_like(ratio))
        limit = torch.where((steps >= self.warmup) & (mean > 0), mean * multiple, math.inf)
        finite = torch.isfinite(ratio)
        kept = torch.where(finite & (ratio > limit), limit / ratio, 1.0)
        weight = (1.0 / (steps + 1.0)).clamp(min=1.0 - self.decay)
        self._mean[name] = torch.where(finite, mean + weight * (torch.minimum(ratio, limit) - mean), mean)
        self._steps[name] = steps + finite
        return kept


def format_allowance(fmt: str | FloatFormat | None) -> float:
    """1 + 2^-(M+1): what rounding the weight may add to its gradient's relative size; 1 for float32 (None)."""
    if fmt is None or fmt == FLOAT32:
        return 1.0
    return 1.0 + math.ldexp(1.0, -get_format(fmt).mantissa_bits - 1)


@dataclass(frozen=True)
class FormatShift:
    """One emergency: the layer went from one format to another at a step, and why."""

    layer: str
    step: int
    reason: ShiftReason
    before: str
    after: str

    @property
    def label(self) -> str:
        """Both formats, for the outcome: "E4M3->E5M2"."""
        return f"{self.before}->{self.after}"


class EmergencyMantissaShift:
    """Moves failing layers along the ladder of the module, and remembers where each has been."""

    def __init__(self) -> None:
        self.events: list[FormatShift] = []

    def next_format(self, fmt: str | FloatFormat, reason: ShiftReason, visited: tuple[str, ...] = ()) -> str | None:
        """Name of the format to move to, none of `visited`; None at FP32. ValueError: unknown format or reason."""
        if reason not in get_args(ShiftReason):
            raise ValueError(unknown_message("reason", reason, get_args(ShiftReason)))
        if fmt == FLOAT32:
            return None
        fmt = get_format(fmt)
        is_range = reason != "stall"
        if fmt.name == "BF16" or (fmt.total_bits == 16 and not is_range):
            return FLOAT32
        bits = 1 if is_range else -1
        neighbour = None if fmt.total_bits == 16 else _split(fmt, bits)
        if neighbour is not None and neighbour not in visited:
            return neighbour
        return FLOAT32 if "BF16" in visited else "BF16"

    def shift(self, layer: str, fmt: str | FloatFormat, reason: ShiftReason, step: int) -> FormatShift | None:
        """Records and returns a layer's next shift; None where it is in FP32 already."""
        before = FLOAT32 if fmt == FLOAT32 else get_format(fmt).name
        been = tuple(event.before for event in self.events if event.layer == layer)
        after = self.next_format(before, reason, (*been, before))
        if after is None:
            return None
        self.events.append(FormatShift(layer, step, reason, before, after))
        return self.events[-1]

    def state_dict(self) -> dict[str, Any]:
        """The events, as JSON has them."""
        return {"events": [asdict(event) for event in self.events]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken, also through JSON."""
        self.events = [FormatShift(**event) for event in state["events"]]


def _split(fmt: FloatFormat, bits: int) -> str | None:
    """Name of the format with so many exponent bits more and mantissa bits less, None where there is none."""
    try:
        return fmt.in_split(fmt.exponent_bits + bits, fmt.mantissa_bits - bits).name
    except ValueError:
        return None


def _rms(x: Tensor) -> Tensor:
    """Root mean square, 0-d float64; finite for all finite elements."""
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dtype=torch.float64)
    return norm / math.sqrt(max(x.numel(), 1))
