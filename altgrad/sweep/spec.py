"""The sweep as a value: axes, replicates and rules, from which the list of trials follows.

A `SweepSpec` is a product of formats, policies, arms and their parameters, repeated over paired seeds: seed k
means the same initial weights and the same batches in every cell, so cells are compared by paired
differences. A spec that exists is valid as a whole: every trial in it has been built and checked.

Three things are not a plain product. The references (BF16 AdamW, and FP32 AdamW where FP32 is asked for) do
not depend on the policy; they stand first, so that every later result has something to be compared with.
`rung_clip` multiplies only the arms that have rungs. And combinations that cannot mean anything are left out
by a named rule and counted (`exclusions`), so that nothing disappears silently.

The members of a seed group (one cell and one set of parameters, all seeds) are adjacent: they run at about
the same time, which is what racing groups against each other needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, ValidationError, ValidationInfo, field_validator, model_validator

from altgrad.quantization import FORMATS, POLICIES, get_format
from altgrad.sweep.exclusions import (
    BASELINE,
    RAW_LR,
    RAW_LR_REASON,
    RULES,
    Combination,
    Exclusion,
    excluded_by,
)
from altgrad.training.config import (
    ARMS,
    MODELS,
    UNQUANTIZED,
    DataConfig,
    Frozen,
    GridOptimConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    has_own_lr_unit,
)
from altgrad.training.guards import DEFAULT_GUARDS, NAMED_RULES, GuardRule

ALL_FORMATS = tuple(FORMATS)
Positive = Annotated[FiniteFloat, Field(gt=0)]
_CHOICES = {
    "formats": ", ".join((UNQUANTIZED, *ALL_FORMATS, "all")),
    "optimizers": ", ".join((*ARMS, "all")),
    "policies": ", ".join((*POLICIES, "all")),
}


class RaceConfig(Frozen):
    """When groups of one cell are compared, and how many go on."""

    first_rung: int | None = Field(
        None,
        ge=1,
        description="steps before the first comparison; null: steps / (reduction + 1), at least one eval_interval",
    )
    reduction: int = Field(
        2, ge=2, description="a rung lets one group in this many go on; rungs lie this factor apart"
    )
    seeds: int = Field(1, ge=1, description="seeds of each group that race; the others start when it has won")

    def first(self, steps: int, eval_interval: int) -> int:
        """The first rung of a run of `steps`: as asked, or derived."""
        return self.first_rung or max(eval_interval, -(-steps // (self.reduction + 1)))

    def rungs(self, steps: int, eval_interval: int) -> list[int]:
        """The rungs (steps) whose first evaluation comes before the last step, where stopping still saves."""
        found, rung = [], self.first(steps, eval_interval)
        while evaluated_at(rung, eval_interval) < steps:
            found.append(rung)
            rung *= self.reduction
        return found


class SweepSpec(Frozen):
    """A whole sweep; its defaults are the quick preset. Unknown keys are errors."""

    name: str = Field(
        "format_ablation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder"
    )
    task: Literal["lm", "classify"] = "lm"
    formats: tuple[str, ...] = Field(("FP32", "BF16", "E0M7", "E1M6", "E3M4", "E5M2", "E7M0"), min_length=1,
                                     description="format names, or 'all'; FP32 is the unquantized reference")
    optimizers: tuple[str, ...] = Field(("adamw", "adamw_nearest", "manifold", "grid"), min_length=1,
                                        description="arm names, or 'all'")
    policies: tuple[str, ...] = Field(
        ("uniform",), min_length=1, description="mixed-precision policies, or 'all'"
    )
    lrs: tuple[Positive, ...] = Field((), description="learning rates; empty for each arm's own")
    rung_clip: tuple[Positive, ...] = Field(
        (), description="rungs, for arms that have them; empty for the default"
    )
    seeds: int = Field(2, ge=1, le=1000, description="paired replicates: seeds 0 to this minus one")
    steps: int = Field(100, ge=1, description="training steps of a trial")
    model: ModelConfig = Field(ModelConfig(), description="a model's name, or its layers, heads, width and block")
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: Positive | None = 1.0
    guards: tuple[GuardRule, ...] = Field(DEFAULT_GUARDS, description="'on', 'off' or rules")
    scheduler: Literal["none", "asha"] = "none"
    race: RaceConfig = RaceConfig()
    log_interval: int = Field(10, ge=1, description="steps")
    eval_interval: int = Field(20, ge=1, description="steps, a multiple of log_interval")
    checkpoint_interval: int = Field(50, ge=1, description="steps, a multiple of log_interval")

    @field_validator("formats", "optimizers", "policies", "lrs", "rung_clip", mode="before")
    @classmethod
    def _commas_separate(cls, value: Any, info: ValidationInfo) -> Any:
        items = value
        if isinstance(value, str):
            items = tuple(item for part in value.split(",") if (item := part.strip()))
        allowed = _CHOICES.get(str(info.field_name))
        if not items and (isinstance(value, str) or allowed is not None):
            raise ValueError(f"{value!r} names nothing; allowed: {allowed or 'numbers above 0'}")
        return (items,) if isinstance(items, int | float) else items

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, on and true as True, which Python would count as 1."""
        if not (info.field_name == "guards" and isinstance(value, bool)):
            _refuse_booleans(value)
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return MODELS[check_choice(value, MODELS, "model")] if isinstance(value, str) else value

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_format_name(name) for name in _all_of(names, ALL_FORMATS)))

    @field_validator("optimizers")
    @classmethod
    def _known_arms(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_choice(name, ARMS, "arm") for name in _all_of(names, tuple(ARMS)))

    @field_validator("policies")
    @classmethod
    def _known_policies(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_choice(name, POLICIES, "policy") for name in _all_of(names, tuple(POLICIES)))

    @field_validator("guards", mode="before")
    @classmethod
    def _guards_on_or_off(cls, value: Any) -> Any:
        if isinstance(value, str) and (value in NAMED_RULES or " " in value):
            return tuple(rule.strip() for rule in value.split(";"))
        if isinstance(value, str):
            value = check_choice(value, ("on", "off"), "setting of the guards") == "on"
        return (DEFAULT_GUARDS if value else ()) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _every_trial_is_valid(self) -> SweepSpec:
        try:
            self.expand()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return self

    @model_validator(mode="after")
    def _a_race_is_held(self) -> SweepSpec:
        if self.scheduler == "asha" and not self.race.rungs(self.steps, self.eval_interval):
            rung = self.race.first(self.steps, self.eval_interval)
            raise ValueError(
                f"scheduler='asha' with steps={self.steps} would compare nothing: the first rung, at step {rung} "
                f"(race.first_rung), is evaluated at step {evaluated_at(rung, self.eval_interval)} "
                f"(eval_interval={self.eval_interval}); more steps than that are expected"
            )
        return self

    def expand(self) -> list[TrainConfig]:
        """Every trial once: references first, then cells with their seeds adjacent."""
        combinations = [*self._references(), *self._cells()]
        trials = (
            self._trial(*combination, seed) for combination in combinations for seed in range(self.seeds)
        )
        return list({trial.trial_id(""): trial for trial in trials}.values())

    def trials(self, data_sha256: str) -> dict[str, TrainConfig]:
        """The trials by id, in the order in which they run."""
        return {config.trial_id(data_sha256): config for config in self.expand()}

    def exclusions(self) -> list[Exclusion]:
        """What the product of the axes would hold and `expand` leaves out, by rule."""
        found = {rule.name: Exclusion(rule.name, rule.reason, 0) for rule in RULES}
        found[RAW_LR] = Exclusion(RAW_LR, RAW_LR_REASON, 0)
        for point in self._combinations():
            rule = excluded_by(point)
            if rule is not None:
                found[rule.name] = found[rule.name].plus(self.seeds * len(self._variants(point.arm)))
            elif has_own_lr_unit(ARMS[point.arm]):
                found[RAW_LR] = found[RAW_LR].plus(
                    self.seeds * len(self._variants(point.arm)) * len(self.lrs)
                )
        return [exclusion for exclusion in found.values() if exclusion.trials]

    def _references(self) -> Iterator[tuple[str, str, OptimizerConfig]]:
        # BF16 first: the others wait for it, and FP32 fills what is left of its time.
        for format in (BASELINE, *((UNQUANTIZED,) if UNQUANTIZED in self.formats else ())):
            for optimizer in self._variants("adamw"):
                yield format, "uniform", optimizer

    def _cells(self) -> Iterator[tuple[str, str, OptimizerConfig]]:
        for point in self._combinations():
            if excluded_by(point) is None:
                for optimizer in self._variants(point.arm):
                    yield point.format, point.policy, optimizer

    def _combinations(self) -> Iterator[Combination]:
        quantized = [name for name in self.formats if name != UNQUANTIZED]
        lead = next((name for name in quantized if get_format(name).total_bits == 8), self.formats[0])
        for format, policy, arm in product(self.formats, self.policies, self.optimizers):
            yield Combination(format, policy, arm, lead)

    def _variants(self, arm: str) -> list[OptimizerConfig]:
        base = ARMS[arm]
        lrs = (base.lr,) if has_own_lr_unit(base) else self.lrs or (base.lr,)
        if not isinstance(base, GridOptimConfig):
            return [base.model_copy(update={"lr": lr}) for lr in lrs]
        return [base.model_copy(update={"lr": lr, "rung_clip": rung_clip})
                for lr, rung_clip in product(lrs, self.rung_clip or (base.rung_clip,))]

    def _trial(self, format: str, policy: str, optimizer: OptimizerConfig, seed: int) -> TrainConfig:
        shared = {name: getattr(self, name) for name in (
            "task", "model", "data", "schedule", "clip_grad_norm", "guards", "steps", "log_interval",
            "eval_interval", "checkpoint_interval")}
        return TrainConfig(format=format, policy=policy, optimizer=optimizer, seed=seed, **shared)


def is_reference(config: TrainConfig) -> bool:
    """Whether this trial is what others are compared with: AdamW in FP32 or BF16."""
    return config.format in (UNQUANTIZED, BASELINE) and (config.arm, config.policy) == ("adamw", "uniform")


def check_choice(name: str, allowed: Any, what: str) -> str:
    """The name if it is allowed, else a ValueError that says what is, and which is nearest."""
    if name in allowed:
        return name
    raise ValueError(f"{name!r} is no {what}; allowed: {', '.join(allowed)}{nearest(name, allowed)}")


def nearest(name: str, allowed: Any) -> str:
    """'; nearest: …' for the closest allowed name, or nothing where none is close."""
    close = get_close_matches(name, list(allowed), n=1, cutoff=0.4)
    return f"; nearest: {close[0]}" if close else ""


def _refuse_booleans(value: Any, path: str = "") -> None:
    """Raises ValueError for a truth value anywhere in plain data; no key of a sweep but `guards` takes one."""
    if isinstance(value, bool):
        raise ValueError(f"{f'{path}=' if path else ''}{value!r} is not allowed: a yes or no is not expected here")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_booleans(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_booleans(item, path)


def evaluated_at(rung: int, eval_interval: int) -> int:
    """The first step at or behind the rung that is evaluated."""
    return -(-rung // eval_interval) * eval_interval


def _format_name(name: str) -> str:
    if name.upper() == UNQUANTIZED:
        return UNQUANTIZED
    try:
        return get_format(name).name
    except ValueError as error:
        allowed = (UNQUANTIZED, *ALL_FORMATS)
        reason = f" ({error})" if re.match(r"E\d+M\d+", name) else ""
        raise ValueError(
            f"{name!r} is no usable format{reason}; allowed: {', '.join(allowed)} and other ExMy of 4 to "
            f"16 bits{nearest(name, allowed)}"
        ) from error


def _all_of(names: tuple[str, ...], every: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for name in names for item in (every if name == "all" else (name,))))


PRESETS: dict[str, SweepSpec] = {
    "quick": SweepSpec(),
    "standard": SweepSpec(
        name="format_ablation_standard",
        formats=(UNQUANTIZED, *ALL_FORMATS),
        optimizers=("adamw", "adamw_nearest", "adamw_sr", "manifold", "manifold_sr", "grid"),
        seeds=3,
        steps=300,
        eval_interval=50,
    ),
    "study": SweepSpec(
        name="format_ablation_study",
        formats=(UNQUANTIZED, *ALL_FORMATS),
        optimizers=("all",),
        lrs=(1e-3, 2e-3, 4e-3, 8e-3),
        seeds=6,
        steps=2000,
        log_interval=20,
        eval_interval=100,
        checkpoint_interval=200,
    ),
}
"""Whole sweeps by name: three minutes on a laptop, an afternoon on a workstation, a cluster."""
