"""What one trial is: a frozen, typed value from which everything else follows.

A `TrainConfig` names the model, the data, the format, the policy, the arm and the seed. It is validated when it is
built, so that nothing starts on a bad value, and it has an identity: the hash of everything that can change the
numbers of a run, and of nothing else. Paths, names, logging intervals and guards are not in it, and neither is the
number of steps where the learning rate does not depend on it: a longer run is the same trial, continued.

The arms' own parameters are in `arm_configs`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from altgrad import NUMERICS_VERSION
from altgrad.quantization import PrecisionPolicy, Recipe, get_format, named_policy
from altgrad.training.arm_configs import ARMS as ARMS  # where users register their own
from altgrad.training.arm_configs import Frozen, OptimizerConfig, scale_obstacle
from altgrad.training.arm_configs import RoundedAdamWConfig as RoundedAdamWConfig
from altgrad.training.catalogue import check_signal
from altgrad.training.guards import DEFAULT_GUARDS, NAMED_RULES, GuardRule
from altgrad.training.interventions import InterventionConfig

UNQUANTIZED, BASELINE = "FP32", "BF16"


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


def refuse_booleans(value: Any, path: str = "") -> None:
    """Raises ValueError for a truth value anywhere in plain data: YAML reads yes and on as True, which counts as 1."""
    if isinstance(value, bool):
        raise ValueError(f"{f'{path}=' if path else ''}{value!r} is not allowed: a yes or no is not expected here")
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_booleans(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_booleans(item, path)


class TrainConfig(Frozen):
    """One trial, whole: `Trainer(config, ...)` needs nothing else."""

    task: Literal["lm", "classify"] = "lm"
    model: ModelConfig = Field(ModelConfig(), description="a model's name, or its layers, heads, width and block")
    data: DataConfig = DataConfig()
    format: str = Field("E5M2", description="a format's name, or FP32 for no quantization")
    policy: str = Field("uniform", description="which layers and tensor roles take the format")
    recipe: Recipe = Field(Recipe(), description="what is changed of the policy's roles, or rules in its place")
    optimizer: OptimizerConfig = RoundedAdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: float | None = Field(1.0, gt=0, description="global L2 norm of the gradient, null for none")
    interventions: tuple[InterventionConfig, ...] = Field((), description="what may change the training on its way")
    guards: tuple[GuardRule, ...] = Field(DEFAULT_GUARDS, description="'on', 'off' or rules")
    observe: ObserveConfig = ObserveConfig()
    seed: int = Field(0, ge=0, lt=2**31)
    steps: int = Field(100, ge=1, description="training steps of a trial")
    log_interval: int = Field(10, ge=1, description="steps between host syncs, log rows and guard checks")
    eval_interval: int = Field(50, ge=1, description="steps between evaluations, a multiple of log_interval")
    checkpoint_interval: int = Field(50, ge=1, description="steps, a multiple of log_interval")

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        has_switches = info.field_name in ("optimizer", "recipe")
        if not has_switches and not (info.field_name == "guards" and isinstance(value, bool)):
            refuse_booleans(value)
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        if not isinstance(value, str) or value in MODELS:
            return MODELS.get(value, value) if isinstance(value, str) else value
        close = get_close_matches(value, MODELS, n=1, cutoff=0.4)
        near = f"; nearest: {close[0]}" if close else ""
        raise ValueError(f"{value!r} is no model; allowed: {', '.join(MODELS)}{near}")

    @field_validator("guards", mode="before")
    @classmethod
    def _guards_in_words(cls, value: Any) -> Any:
        """'on', 'off', or rules: 'flip_yield/min < 0.2 for 3 after 50; grad_norm is nonfinite'."""
        if isinstance(value, str) and (value in NAMED_RULES or " " in value):
            return tuple(rule.strip() for rule in value.split(";"))
        if isinstance(value, str):
            if value not in ("on", "off"):
                close = get_close_matches(value, ("on", "off"), n=1, cutoff=0.4)
                near = f"; nearest: {close[0]}" if close else ""
                raise ValueError(f"{value!r} is no setting of the guards; allowed: on, off{near}")
            value = value == "on"
        return (DEFAULT_GUARDS if value else ()) if isinstance(value, bool) else value

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        return value if value == UNQUANTIZED else get_format(value).name

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (obstacle := scale_obstacle(self.optimizer, self.precision)) is not None:
            raise ValueError(f"{self.recipe_name} does not go with {self.arm}: {obstacle}")
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
    def precision(self) -> PrecisionPolicy:
        """Which layer gets which formats, scales and roundings: the policy's rules, changed by the recipe."""
        return self.recipe.applied(named_policy(self.policy, self.format))

    @property
    def recipe_name(self) -> str:
        """The policy's name, and what the recipe changes of it."""
        return self.policy if self.recipe.is_plain else f"{self.policy}, {self.recipe}"

    @property
    def arm(self) -> str:
        """The arm's name, derived from the optimizer's fields."""
        return self.optimizer.arm

    @property
    def use_manifold_aware(self) -> bool:
        """Whether the optimizer measures its steps in the format's geometry."""
        return self.optimizer.follows_geometry

    @property
    def is_reference(self) -> bool:
        """Whether this trial is what others are compared with: AdamW in FP32 or BF16."""
        return self.format in (UNQUANTIZED, BASELINE) and (self.arm, self.recipe_name) == ("adamw", "uniform")

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
                "recipe": True,
                "observe": True,
                "log_interval": True,
                "eval_interval": True,
                "checkpoint_interval": True,
                "steps": self.schedule.kind == "constant",
            },
        )
        if not self.recipe.is_plain:
            kept["recipe"] = self.recipe.model_dump(mode="json", exclude_defaults=True)
        return kept | {"data_sha256": data_sha256, "tokenizer": self.data.tokenizer, "numerics": NUMERICS_VERSION}

    def trial_id(self, data_sha256: str) -> str:
        """Twelve hex digits of the sha256 of the canonical identity."""
        canonical = json.dumps(self.identity(data_sha256), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def cell(self) -> dict[str, Any]:
        """What replicates and raced learning rates have in common: task, format, arm, policy."""
        return {"task": self.task, "format": self.format, "arm": self.arm, "policy": self.recipe_name}
