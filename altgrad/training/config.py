"""What one trial is: a frozen, typed value from which everything else follows.

A `TrainConfig` names the model, the data, the format, the policy, the arm and the seed. It is validated when it is
built, so that nothing starts on a bad value, and it has an identity: the hash of everything that can change the
numbers of a run, and of nothing else. Paths, names, logging intervals and guards are not in it, and neither is the
number of steps where the learning rate does not depend on it: a longer run is the same trial, continued.

Arms are named points in the space of optimizer configurations (`ARMS`). A configuration knows the arm that it
belongs to; the name is derived from its fields, never stored beside them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from altgrad.quantization import NUMERICS_VERSION, get_format, named_policy
from altgrad.training.guards import DEFAULT_GUARDS, GuardRule

UNQUANTIZED = "FP32"


class Frozen(BaseModel):
    """A value: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Frozen):
    """A byte-level GPT (pre-norm, learned positions, head tied to the embedding)."""

    layers: int = Field(2, ge=1, description="transformer blocks")
    heads: int = Field(2, ge=1, description="attention heads; they divide the width")
    width: int = Field(64, ge=8, description="residual width, elements")
    block: int = Field(128, ge=8, description="context length, tokens")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        return self


class DataConfig(Frozen):
    """Where the text comes from and how much of it a step and an evaluation see."""

    source: str = Field("pydoc", description="'pydoc', or a text, JSONL or parquet file, a folder or a glob")
    text_field: str = Field("text", description="the field of a JSONL or parquet record that holds the text")
    batch: int = Field(8, ge=1, description="sequences per step, over all workers")
    val_fraction: float = Field(0.1, gt=0, lt=0.5, description="share of the documents held out")
    eval_batches: int = Field(4, ge=1, description="validation batches per evaluation")


class ScheduleConfig(Frozen):
    """The learning rate's course: linear warmup, then constant, cosine to a tenth, or warmup-stable-decay."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup: int = Field(10, ge=0, description="steps of linear warmup")
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="share of the steps in which wsd decays to zero"
    )


class _AdamLike(Frozen):
    lr: float = Field(2e-3, gt=0, description="mean |change| per weight and step that AdamW makes with it")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled, per unit of learning rate")


class RoundedAdamWConfig(_AdamLike):
    """AdamW; the weights are a float32 master (rounding null) or live on the format's grid."""

    kind: Literal["adamw"] = "adamw"
    rounding: Literal["nearest", "stochastic"] | None = None

    @property
    def arm(self) -> str:
        return {None: "adamw", "nearest": "adamw_nearest", "stochastic": "adamw_sr"}[self.rounding]


class ManifoldAdamWConfig(_AdamLike):
    """AdamW whose step is measured in the format's local spacing."""

    kind: Literal["manifold"] = "manifold"
    precondition: Literal["update", "gradient"] = "update"
    rounding: Literal["nearest", "stochastic"] | None = None
    step_unit: Literal["weight", "ulp"] = "weight"
    max_stiffness: float = Field(1e6, gt=0)

    @property
    def arm(self) -> str:
        if self.precondition == "gradient":
            return "manifold_gradient"
        return {None: "manifold", "nearest": "manifold_nearest", "stochastic": "manifold_sr"}[self.rounding]


class GridOptimConfig(Frozen):
    """Momentum in rungs of the format's grid, stochastically rounded to whole rungs."""

    kind: Literal["grid"] = "grid"
    lr: float = Field(
        2e-3, gt=0, description="step_unit weight: as AdamW's; rungs: rungs per unit of velocity"
    )
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


OptimizerConfig = Annotated[
    RoundedAdamWConfig | ManifoldAdamWConfig | GridOptimConfig, Field(discriminator="kind")
]

ARMS: dict[str, RoundedAdamWConfig | ManifoldAdamWConfig | GridOptimConfig] = {
    config.arm: config
    for config in (
        RoundedAdamWConfig(),
        RoundedAdamWConfig(rounding="nearest"),
        RoundedAdamWConfig(rounding="stochastic"),
        ManifoldAdamWConfig(),
        ManifoldAdamWConfig(rounding="stochastic"),
        ManifoldAdamWConfig(precondition="gradient"),
        GridOptimConfig(),
        GridOptimConfig(normalize="none", step_unit="rungs", lr=6.0),
    )
}
"""Arms by name, each with its default parameters."""


class TrainConfig(Frozen):
    """One trial, whole: `Trainer(config, ...)` needs nothing else."""

    task: Literal["lm"] = "lm"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    format: str = Field("E5M2", description="a format's name, or FP32 for no quantization")
    policy: str = Field("uniform", description="which layers and tensor roles take the format")
    optimizer: OptimizerConfig = RoundedAdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: float | None = Field(
        1.0, gt=0, description="global L2 norm of the gradient, null for none"
    )
    guards: tuple[GuardRule, ...] = DEFAULT_GUARDS
    seed: int = Field(0, ge=0, lt=2**31)
    steps: int = Field(100, ge=1)
    log_interval: int = Field(10, ge=1, description="steps between host syncs, log rows and guard checks")
    eval_interval: int = Field(50, ge=1, description="steps between evaluations, a multiple of log_interval")
    checkpoint_interval: int = Field(50, ge=1, description="steps, a multiple of log_interval")

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        return value if value == UNQUANTIZED else get_format(value).name

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        named_policy(self.policy, self.format)
        for name in ("eval_interval", "checkpoint_interval"):
            if getattr(self, name) % self.log_interval:
                value = getattr(self, name)
                raise ValueError(f"{name}={value} must be a multiple of log_interval={self.log_interval}")
        return self

    @property
    def arm(self) -> str:
        """The arm's name, derived from the optimizer's fields."""
        return self.optimizer.arm

    @property
    def use_manifold_aware(self) -> bool:
        """Whether the optimizer measures its steps in the format's geometry."""
        return self.optimizer.kind in ("manifold", "grid")

    def identity(self, data_sha256: str) -> dict[str, Any]:
        """Everything that can change the numbers of this run, as plain JSON values."""
        kept = self.model_dump(
            mode="json",
            exclude={
                "data": {"source"},
                "guards": True,
                "log_interval": True,
                "eval_interval": True,
                "checkpoint_interval": True,
                "steps": self.schedule.kind == "constant",
            },
        )
        return kept | {"data_sha256": data_sha256, "tokenizer": "bytes", "numerics": NUMERICS_VERSION}

    def trial_id(self, data_sha256: str) -> str:
        """Twelve hex digits of the sha256 of the canonical identity."""
        canonical = json.dumps(self.identity(data_sha256), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def cell(self) -> dict[str, Any]:
        """What replicates and raced learning rates have in common: task, format, arm, policy."""
        return {"task": self.task, "format": self.format, "arm": self.arm, "policy": self.policy}
