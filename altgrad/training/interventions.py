"""Interventions: what may change a training, and is therefore declared in its configuration and part of its identity.

| kind | what it does | when |
| --- | --- | --- |
| partition_clip | bounds each tensor's gradient, relative to its weight, by its usual size | before the step |
| format_shift | moves a failing layer to the next format of a ladder that ends at FP32 | at a check |

The arithmetic, its bounds and the ladder are in `quantization.stability`. What an intervention did stands in the
rows: `clipped_tensors` and `clip_factor` at every step, `shifts` where a layer moved and, at each check, in `formats`
every move so far; an outcome names both formats.

A shift is decided by rules like a guard's: a stalled layer gets a mantissa bit more, an overflowing or non-finite one
an exponent bit. It comes before the guards, and after a shift their counts start again, so that the mended run has
the time of a new one; a layer at the ladder's end is left to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from altgrad.quantization import EmergencyMantissaShift, FormatShift, PartitionRelativeClipper
from altgrad.quantization.stability import FLOAT32, ShiftReason
from altgrad.training.guards import GuardPanel, GuardRule, when
from altgrad.training.outcome import OutcomeKind

REASONS: dict[str, ShiftReason] = {"stalled": "stall", "diverged": "overflow", "nonfinite": "nonfinite"}
"""What fails in a layer for which a rule of this kind holds."""

DEFAULT_SHIFT_RULES: tuple[GuardRule, ...] = (
    when("train_loss").is_nonfinite(),
    when("weight_overflow/max").above(0.01).for_checks(2),
    when("flip_yield/min").below(0.2).for_checks(2).after(20),
)


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartitionClipConfig(_Declared):
    """Partition-relative clipping; see `quantization.stability`."""

    kind: Literal["partition_clip"] = "partition_clip"
    factor: float = Field(4.0, gt=1, allow_inf_nan=False, description="largest multiple of a gradient's usual size")
    decay: float = Field(0.97, ge=0, lt=1, description="of the mean size, per step")
    warmup: int = Field(10, ge=1, description="steps that only measure")
    floor: float = Field(1e-3, gt=0, description="smallest RMS of a weight to divide by")


class FormatShiftConfig(_Declared):
    """Emergency shift of a layer's format; see `quantization.stability` for the ladder."""

    kind: Literal["format_shift"] = "format_shift"
    rules: tuple[GuardRule, ...] = Field(
        DEFAULT_SHIFT_RULES, min_length=1, description="when a layer is shifted; stalled, diverged or nonfinite"
    )

    @field_validator("rules")
    @classmethod
    def _have_a_ladder(cls, rules: tuple[GuardRule, ...]) -> tuple[GuardRule, ...]:
        for rule in rules:
            if rule.kind not in REASONS:
                raise ValueError(f"a rule of kind {rule.kind!r} shifts nothing; allowed: {', '.join(REASONS)}")
        return rules


InterventionConfig = Annotated[PartitionClipConfig | FormatShiftConfig, Field(discriminator="kind")]


class Interventions:
    """The declared interventions at work in one run."""

    def __init__(self, declared: Sequence[PartitionClipConfig | FormatShiftConfig]) -> None:
        clip = next((config for config in declared if isinstance(config, PartitionClipConfig)), None)
        shift = next((config for config in declared if isinstance(config, FormatShiftConfig)), None)
        self._clipper = None if clip is None else PartitionRelativeClipper(**clip.model_dump(exclude={"kind"}))
        self._panel = None if shift is None else GuardPanel(shift.rules)
        self._ladder = EmergencyMantissaShift()

    @property
    def clips(self) -> bool:
        """Whether gradients may be changed before the step."""
        return self._clipper is not None

    @property
    def shifts(self) -> list[FormatShift]:
        """The shifts so far."""
        return self._ladder.events

    @property
    def formats(self) -> str | None:
        """Every shift so far, as in "lm_head: E4M3->E5M2", '' for none yet; None where none was declared."""
        return None if self._panel is None else ", ".join(f"{shift.layer}: {shift.label}" for shift in self.shifts)

    def before_step(self, parameters: Mapping[str, Tensor], formats: Mapping[str, str]) -> Tensor:
        """Clips `.grad` in place where declared; [clipped tensors, smallest factor], for `describe_clip`, or [0]."""
        if self._clipper is None:
            device = next(iter(parameters.values())).device
            return torch.zeros(0, dtype=torch.float64, device=device)
        report = self._clipper.clip(parameters, formats)
        return torch.stack([report.clipped.double(), report.smallest.double()])

    def shift(self, rows: Sequence[Mapping[str, Any]], formats: Mapping[str, str]) -> FormatShift | None:
        """The shift that these rows call for, recorded; None where none is due or the layer is in FP32 already."""
        verdict = None if self._panel is None else self._panel.check(rows)
        if verdict is None or verdict.layer is None or verdict.kind == "warning":
            return None
        assert self._panel is not None
        self._panel.forget()
        reason = REASONS[OutcomeKind(verdict.kind)]
        return self._ladder.shift(verdict.layer, formats.get(verdict.layer, FLOAT32), reason, verdict.step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly."""
        return {
            "clipper": None if self._clipper is None else self._clipper.state_dict(),
            "panel": None if self._panel is None else self._panel.state_dict(),
            "ladder": self._ladder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        if self._clipper is not None:
            self._clipper.load_state_dict(state["clipper"])
        if self._panel is not None:
            self._panel.load_state_dict(state["panel"])
        self._ladder.load_state_dict(state["ladder"])


def describe_clip(clipped: float, factor: float) -> dict[str, Any]:
    """A step's clipping as the fields of its row."""
    return {"clipped_tensors": int(clipped), "clip_factor": factor}
