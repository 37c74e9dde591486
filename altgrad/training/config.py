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
from collections import Counter
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from altgrad import NUMERICS_VERSION
from altgrad.quantization import get_format, named_policy
from altgrad.registry import Registry
from altgrad.training.catalogue import check_signal
from altgrad.training.guards import DEFAULT_GUARDS, GuardRule
from altgrad.training.interventions import InterventionConfig
from altgrad.training.rules import RULES

UNQUANTIZED, BASELINE = "FP32", "BF16"


class Frozen(BaseModel):
    """A value: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Frozen):
    """A transformer (pre-norm, learned positions): a GPT whose head is tied to its embedding, or an encoder."""

    layers: int = Field(2, ge=1, description="transformer blocks")
    heads: int = Field(2, ge=1, description="attention heads; they divide the width")
    width: int = Field(64, ge=8, description="residual width, elements")
    block: int = Field(128, ge=8, description="context length, tokens")
    residual_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "what attention and MLP add to the residual stream is multiplied by it; documents by the hundred want 0.1"
        ),
    )
    encoder: str | None = Field(
        None,
        min_length=1,
        description=(
            "classification: a Hugging Face encoder by name or folder, instead of one from scratch (extra: hf)"
        ),
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        return self


MODELS: dict[str, ModelConfig] = {
    "quick": ModelConfig(),
    "gpt-10m": ModelConfig(layers=6, heads=6, width=384, block=256),
    "gpt-50m": ModelConfig(layers=10, heads=10, width=640, block=256),
}
"""Models by name, with their parameters without the embedding; the larger ones are for GPUs."""


TOKENIZERS = {"bytes": 256, "bpe": 4096, "words": 8000}
"""Kinds of tokenizer and their default vocabulary."""
LEAST_VOCABULARY = {"bytes": 256, "bpe": 257, "words": 2}


def tokenizer_parts(name: str) -> tuple[str, int]:
    """Kind and vocabulary of a tokenizer's name: ('bpe', 4096) for 'bpe' and 'bpe-4096'."""
    kind, _, size = name.partition("-")
    if kind not in TOKENIZERS or (size and (kind == "bytes" or not size.isdecimal())):
        close = get_close_matches(name, TOKENIZERS, n=1)
        raise ValueError(
            f"{name!r} is no tokenizer; allowed: bytes, bpe, bpe-N, words, words-N"
            f"{f'; nearest: {close[0]}' if close else ''}"
        )
    wanted, least = int(size) if size else TOKENIZERS[kind], LEAST_VOCABULARY[kind]
    if not least <= wanted <= 1 << 20:
        raise ValueError(f"{name!r}: a vocabulary of {least} to {1 << 20} is expected")
    return kind, wanted


class DataConfig(Frozen):
    """Where the text comes from and how much of it a step and an evaluation see."""

    source: str = Field(
        "pydoc",
        description=(
            "pydoc, synthetic, eurlex, eurlex-57k, multi_eurlex, or a text, JSONL, parquet or CSV file, folder or glob"
        ),
    )
    revision: str | None = Field(
        None,
        min_length=1,
        description=("of hub data: the commit to read; null: the newest, which a sweep then keeps for all its trials"),
    )
    text_field: str = Field("text", description="the field of a record that holds the text")
    label_field: str = Field("labels", min_length=1, description="classification: the field that holds the labels")
    label_names: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description=(
            "classification: the label vocabulary, in order; null: as the data declare it, else the training labels"
        ),
    )
    tokenizer: str = Field("bytes", description="bytes, bpe, bpe-N, words or words-N (N: size of the vocabulary)")
    batch: int = Field(8, ge=1, description="sequences per step, over all workers")
    val_fraction: float = Field(0.1, gt=0, lt=0.5, description="share of the documents held out")
    eval_batches: int = Field(4, ge=1, description="validation batches per evaluation (language modelling)")
    max_pos_weight: float = Field(
        10.0,
        ge=1,
        description=(
            "classification: a label's presence weighs (1 - p) / p in the loss, p its share of documents, at most this"
        ),
    )

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, name: str) -> str:
        kind, size = tokenizer_parts(name)
        return kind if kind == "bytes" else f"{kind}-{size}"

    @field_validator("label_names")
    @classmethod
    def _named_once(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        twice = next((name for name, count in Counter(names or ()).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"label_names holds {twice!r} more than once")
        return names


class ScheduleConfig(Frozen):
    """The learning rate's course: linear warmup, then constant, cosine to a tenth, or warmup-stable-decay."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup: int = Field(10, ge=0, description="steps of linear warmup")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="share of the steps in which wsd decays to zero")


class ObserveConfig(Frozen):
    """How often the rarer signals are measured; a check is the end of a log interval."""

    exact_ranks_every: int = Field(20, ge=1, description="checks from one exact spectrum of the weights to the next")
    detail_every: int = Field(10, ge=1, description="checks from one look at grids and tensor ranges to the next")
    shadow_every: int | None = Field(
        None,
        ge=1,
        description=(
            "checks from one comparison with a float32 shadow's gradient to the next, one more step each; null: none"
        ),
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


class GridOptimConfig(Frozen):
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


class RuleConfig(Frozen):
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


def has_own_lr_unit(optimizer: AnyOptimizerConfig) -> bool:
    """Whether lr is not AdamW's mean |change| per weight, so that an axis of learning rates does not apply."""
    if optimizer.kind in RULES:
        return not RULES[optimizer.kind].unit.startswith("AdamW's")
    return getattr(optimizer, "step_unit", "weight") != "weight"


CLASSIFY_ONLY = ("label_field", "label_names", "max_pos_weight")
LM_ONLY = ("eval_batches",)
"""Fields of the data that the other task does not read."""
MODEL_OPTIONS = {"encoder": None, "residual_scale": 1.0}
"""Fields of the model that are part of a trial's identity only where they differ from this: then they do nothing."""


def _check_task(task: str, model: ModelConfig, data: DataConfig) -> None:
    if task == "classify":
        return
    if model.encoder is not None:
        raise ValueError(f"encoder={model.encoder!r} belongs to task='classify'; language modelling has its own GPT")
    if tokenizer_parts(data.tokenizer)[0] == "words":
        raise ValueError(f"tokenizer={data.tokenizer!r} can't write text; language modelling takes bytes or bpe")


class TrainConfig(Frozen):
    """One trial, whole: `Trainer(config, ...)` needs nothing else."""

    task: Literal["lm", "classify"] = "lm"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    format: str = Field("E5M2", description="a format's name, or FP32 for no quantization")
    policy: str = Field("uniform", description="which layers and tensor roles take the format")
    optimizer: OptimizerConfig = RoundedAdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: float | None = Field(1.0, gt=0, description="global L2 norm of the gradient, null for none")
    interventions: tuple[InterventionConfig, ...] = Field((), description="what may change the training on its way")
    guards: tuple[GuardRule, ...] = DEFAULT_GUARDS
    observe: ObserveConfig = ObserveConfig()
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
        _check_task(self.task, self.model, self.data)
        twice = next((kind for kind, n in Counter(i.kind for i in self.interventions).items() if n > 1), None)
        if twice is not None:
            raise ValueError(f"interventions holds {twice!r} more than once")
        if self.observe.shadow_every is None:
            for rule in self.guards:
                if check_signal(rule.signal).schedule == "shadow":
                    raise ValueError(f"guards: {rule.signal!r} is measured only with observe.shadow_every")
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

    @property
    def is_reference(self) -> bool:
        """Whether this trial is what others are compared with: AdamW in FP32 or BF16."""
        return self.format in (UNQUANTIZED, BASELINE) and (self.arm, self.policy) == ("adamw", "uniform")

    def identity(self, data_sha256: str) -> dict[str, Any]:
        """Everything that can change the numbers of this run, as plain JSON values."""
        of_task = LM_ONLY if self.task == "classify" else CLASSIFY_ONLY
        kept = self.model_dump(
            mode="json",
            exclude={
                "model": {name for name in MODEL_OPTIONS if getattr(self.model, name) == MODEL_OPTIONS[name]},
                "data": {"source", "revision", "tokenizer", *of_task},
                "guards": True,
                "interventions": set() if self.interventions else True,
                "observe": True,
                "log_interval": True,
                "eval_interval": True,
                "checkpoint_interval": True,
                "steps": self.schedule.kind == "constant",
            },
        )
        return kept | {"data_sha256": data_sha256, "tokenizer": self.data.tokenizer, "numerics": NUMERICS_VERSION}

    def trial_id(self, data_sha256: str) -> str:
        """Twelve hex digits of the sha256 of the canonical identity."""
        canonical = json.dumps(self.identity(data_sha256), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def cell(self) -> dict[str, Any]:
        """What replicates and raced learning rates have in common: task, format, arm, policy."""
        return {"task": self.task, "format": self.format, "arm": self.arm, "policy": self.policy}
