"""The arms' parameters: what steps the weights, by which rule, and where they live.

Arms are named points in the space of optimizer configurations (`ARMS`). A configuration knows the arm that it
belongs to; the name is derived from its fields, never stored beside them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from altgrad.quantization import PrecisionPolicy, ScaleRule
from altgrad.registry import Registry
from altgrad.training.rules import RULES


class Frozen(BaseModel):
    """A value: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ArmConfig(Frozen):
    """What all arms have in common: where their weights live, and what they are compared with.

    What geometry gains is the difference between two arms whose weights live in the same place, float32 master weights
    or the format's grid: against an arm that lives elsewhere it would count what the residence costs too.
    """

    @property
    def arm(self) -> str:
        """The arm's name, derived from the fields."""
        raise NotImplementedError

    @property
    def is_on_grid(self) -> bool:
        """Whether the weights live on the format's grid, under a scale that the optimizer owns."""
        return getattr(self, "rounding", None) is not None

    @property
    def follows_geometry(self) -> bool:
        """Whether steps are measured in the format's local spacing."""
        return False

    @property
    def rounds_operands(self) -> bool:
        """Whether the layers round their weights to the format."""
        return True

    @property
    def plain_arm(self) -> str:
        """The AdamW arm of the same residence; "" for an arm whose steps do not follow the format's geometry."""
        return ""

    @property
    def control_arm(self) -> str:
        """The arm that takes the same steps over float32 weights that no layer rounds; "" where there is none."""
        return ""

    @property
    def has_own_lr_unit(self) -> bool:
        """Whether lr is not AdamW's mean |change| per weight, so that an axis of learning rates does not apply."""
        return getattr(self, "step_unit", "weight") != "weight"

    @property
    def state_tensors(self) -> int:
        """How many tensors of a weight's shape the optimizer keeps for it."""
        return 2


class _AdamLike(ArmConfig):
    lr: float = Field(2e-3, gt=0, description="mean |change| per weight and step that AdamW makes with it")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled, per unit of learning rate")


class RoundedAdamWConfig(_AdamLike):
    """AdamW; the weights are a float32 master (rounding null) or live on the format's grid."""

    kind: Literal["adamw"] = "adamw"
    rounding: Literal["nearest", "stochastic"] | None = None
    error_feedback: bool = Field(False, description="what rounding takes is put into the first moment (ECO)")

    @model_validator(mode="after")
    def _feeds_back_what_is_rounded(self) -> RoundedAdamWConfig:
        if self.error_feedback and (self.rounding is None or self.beta1 == 0):
            raise ValueError(
                "error_feedback=true needs weights on the grid (rounding 'nearest' or 'stochastic') and "
                f"beta1 > 0; got rounding={self.rounding!r}, beta1={self.beta1}"
            )
        return self

    @property
    def arm(self) -> str:
        if self.error_feedback:
            return "eco" if self.rounding == "stochastic" else "eco_nearest"
        return {None: "adamw", "nearest": "adamw_nearest", "stochastic": "adamw_sr"}[self.rounding]


class ManifoldAdamWConfig(_AdamLike):
    """AdamW whose step is measured in the format's local spacing.

    Unquantized, it is the control that tells the step rule from the format: float32 weights that no layer rounds.
    """

    kind: Literal["manifold"] = "manifold"
    quantized: bool = Field(True, description="whether the layers round their weights to the format")
    precondition: Literal["update", "gradient"] = "update"
    rounding: Literal["nearest", "stochastic"] | None = None
    step_unit: Literal["weight", "ulp"] = "weight"
    max_stiffness: float = Field(1e6, gt=0)

    @model_validator(mode="after")
    def _control_has_no_grid(self) -> ManifoldAdamWConfig:
        if not self.quantized and self.rounding is not None:
            raise ValueError(f"quantized=false is for float32 weights; it does not go with rounding={self.rounding!r}")
        return self

    @property
    def arm(self) -> str:
        if not self.quantized:
            return "manifold_fp32"
        if self.precondition == "gradient":
            return "manifold_gradient"
        return {None: "manifold", "nearest": "manifold_nearest", "stochastic": "manifold_sr"}[self.rounding]

    @property
    def follows_geometry(self) -> bool:
        return True

    @property
    def rounds_operands(self) -> bool:
        return self.quantized

    @property
    def plain_arm(self) -> str:
        return RoundedAdamWConfig(rounding=self.rounding).arm

    @property
    def control_arm(self) -> str:
        is_twin = self.quantized and self.rounding is None and self.precondition == "update"
        return ManifoldAdamWConfig(quantized=False).arm if is_twin else ""


class GridOptimConfig(ArmConfig):
    """Momentum in rungs of the format's grid, stochastically rounded to whole rungs."""

    kind: Literal["grid"] = "grid"
    lr: float = Field(2e-3, gt=0, description="step_unit weight: as AdamW's; rungs: rungs per unit of velocity")
    momentum: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1, description="of the second moment, used by normalize='rms'")
    weight_decay: float = Field(0.0, ge=0)
    rung_clip: float = Field(10.0, gt=0, description="largest move of a weight in one step, rungs")
    normalize: Literal["rms", "none"] = "rms"
    step_unit: Literal["weight", "rungs"] = "weight"
    carry: bool = False

    @property
    def arm(self) -> str:
        return "grid_literal" if self.normalize == "none" else "grid"

    @property
    def is_on_grid(self) -> bool:
        return True

    @property
    def follows_geometry(self) -> bool:
        return True

    @property
    def plain_arm(self) -> str:
        return RoundedAdamWConfig(rounding="stochastic").arm

    @property
    def state_tensors(self) -> int:
        return 1 + (self.normalize == "rms") + self.carry


class RuleConfig(ArmConfig):
    """Another rule of `rules.RULES`; lr, momentum and beta2 default to the rule's own, lr in the rule's own unit."""

    kind: Literal[tuple(RULES)]  # type: ignore[valid-type]
    lr: float = Field(gt=0, description="in the rule's own unit")
    momentum: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, description="of the parameters that take Adam's step")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, per unit of learning rate")
    rounding: Literal["nearest", "stochastic"] | None = "stochastic"

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, values: Any) -> Any:
        rule = RULES.get(str(values.get("kind"))) if isinstance(values, dict) else None
        return values if rule is None else dict(rule.defaults) | values

    @property
    def arm(self) -> str:
        return str(self.kind) + {None: "_master", "nearest": "_nearest", "stochastic": ""}[self.rounding]

    @property
    def has_own_lr_unit(self) -> bool:
        return not RULES[self.kind].unit.startswith("AdamW's")

    @property
    def state_tensors(self) -> int:
        return len(RULES[self.kind].state)


AnyOptimizerConfig = RoundedAdamWConfig | ManifoldAdamWConfig | GridOptimConfig | RuleConfig
OptimizerConfig = Annotated[AnyOptimizerConfig, Field(discriminator="kind")]

_DEFAULTS: tuple[AnyOptimizerConfig, ...] = (
    RoundedAdamWConfig(),
    RoundedAdamWConfig(rounding="nearest"),
    RoundedAdamWConfig(rounding="stochastic"),
    ManifoldAdamWConfig(),
    ManifoldAdamWConfig(rounding="stochastic"),
    ManifoldAdamWConfig(precondition="gradient"),
    ManifoldAdamWConfig(quantized=False),
    GridOptimConfig(),
    GridOptimConfig(normalize="none", step_unit="rungs", lr=6.0),
    RoundedAdamWConfig(rounding="stochastic", error_feedback=True),
    *(RuleConfig(kind=name) for name in RULES.own),  # type: ignore[call-arg]
)

ARMS: Registry[AnyOptimizerConfig] = Registry({config.arm: config for config in _DEFAULTS})
"""Arms by name, each with its default parameters."""


FLOAT_BYTES = 4
ONE_SCALE = ("current", "delayed")
"""Kinds of scale that a tensor has one of."""


def scale_obstacle(optimizer: AnyOptimizerConfig, precision: PrecisionPolicy) -> str | None:
    """Why the arm can't take the scales of the weights, or None."""
    weights = [rule.weight for rule in precision.rules if rule.weight is not None]
    if optimizer.is_on_grid and any(weight.scale != ScaleRule() for weight in weights):
        return "weights on the grid have the one scale that the optimizer owns"
    if optimizer.follows_geometry and any(weight.scale.kind not in ONE_SCALE for weight in weights):
        return "the arm measures its steps in the spacing of a tensor with one scale"
    return None


def bytes_per_weight(optimizer: AnyOptimizerConfig, bits: int) -> tuple[float, float]:
    """What has to be kept of a weight between steps, and of the optimizer for it, bytes.

    `bits`: of the format. A master weight and every moment are float32; a weight on the grid takes the format's bits.
    """
    return bits / 8 if optimizer.is_on_grid else FLOAT_BYTES, FLOAT_BYTES * optimizer.state_tensors
