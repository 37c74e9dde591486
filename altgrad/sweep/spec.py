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

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from altgrad.quantization import FORMATS, POLICIES, Recipe, get_format
from altgrad.sweep import expansion
from altgrad.sweep.axes import Axis, Constraint, Range, check_path, read_axis
from altgrad.sweep.complaints import check_choice, nearest
from altgrad.sweep.exclusions import BLOCK_FORMATS, RULES, Exclusion
from altgrad.sweep.objectives import OBJECTIVES
from altgrad.sweep.pacing import PbtConfig, Positive, RaceConfig, evaluated_at
from altgrad.sweep.strict_yaml import refuse_booleans
from altgrad.training.arm_configs import ARMS, Frozen
from altgrad.training.catalogue import SIGNALS
from altgrad.training.config import (
    BASELINE,
    MODELS,
    UNQUANTIZED,
    DataConfig,
    ModelConfig,
    ObserveConfig,
    ScheduleConfig,
    TrainConfig,
)
from altgrad.training.guards import DEFAULT_GUARDS, NAMED_RULES, GuardRule
from altgrad.training.interventions import InterventionConfig
from altgrad.training.rules import RULES as UPDATES

ALL_FORMATS = tuple(FORMATS)
_CHOICES = {
    "formats": ", ".join((UNQUANTIZED, *ALL_FORMATS, "all")),
    "optimizers": ", ".join((*ARMS, "all")),
    "policies": ", ".join((*POLICIES, "all")),
}


class SweepSpec(Frozen):
    """A whole sweep; its defaults are the quick preset. Unknown keys are errors."""

    name: str = Field("format_ablation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder")
    task: Literal["lm", "classify"] = "lm"
    formats: tuple[str, ...] = Field(
        (UNQUANTIZED, BASELINE, "E0M7", "E1M6", "E3M4", "E5M2", "E7M0"),
        min_length=1,
        description="format names, or 'all'; FP32 is the unquantized reference",
    )
    optimizers: tuple[str, ...] = Field(
        ("adamw", "adamw_nearest", "manifold", "grid"), min_length=1, description="arm names, or 'all'"
    )
    policies: tuple[str, ...] = Field(("uniform",), min_length=1, description="mixed-precision policies, or 'all'")
    recipe: Recipe = Field(Recipe(), description="what is changed of every policy's roles, or rules in their place")
    lrs: tuple[Positive, ...] = Field((), description="learning rates; empty for each arm's own")
    settled_lrs: dict[str, dict[str, dict[str, Positive]]] = Field(
        {},
        description=(
            "format to arm to policy: each cell's one learning rate in place of lrs, settled on other seeds; as "
            "altgrad.analysis.settled_lrs reads them from a sweep over rates"
        ),
    )
    rung_clip: tuple[Positive, ...] = Field((), description="rungs, for arms that have them; empty for the default")
    axes: dict[str, Axis] = Field(
        {},
        description=(
            "further axes: a field's path (optimizer.beta2, lion.lr, schedule.kind, data.batch, model) to a list of "
            "values or, in a search, a range {low, high, log}"
        ),
    )
    constraints: tuple[Constraint, ...] = Field((), description="combinations to leave out, each by a named rule")
    search: Literal["grid", "random", "optuna"] = Field(
        "grid",
        description=(
            "grid: the product of the axes; random, optuna: configurations sampled from it, each with all seeds"
        ),
    )
    num_samples: int | None = Field(None, ge=1, le=100_000, description="of a search; null: 20")
    objectives: tuple[Literal[tuple(OBJECTIVES)], ...] = Field(  # type: ignore[valid-type]
        ("val_loss",), min_length=1, description="what optuna is told of a configuration: means over its seeds"
    )
    search_seed: int = Field(0, ge=0, lt=2**31, description="of what a search draws")
    seeds: int = Field(2, ge=1, le=1000, description="paired replicates: seeds first_seed to first_seed + this - 1")
    first_seed: int = Field(0, ge=0, le=10**9, description="the first seed; pilots and judgements take disjoint ones")
    steps: int = Field(100, ge=1, description="training steps of a trial")
    margin: float = Field(
        0.1, gt=0, le=10, description="a format trains that ends within this part of BF16's loss; .1 is 10 %"
    )
    equal_within: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="nats within which two gains count as equal; null: a quarter of the arm's gain in BF16",
    )
    model: ModelConfig = Field(ModelConfig(), description="a model's name, or its layers, heads, width and block")
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    clip_grad_norm: Positive | None = 1.0
    interventions: tuple[InterventionConfig, ...] = ()
    observe: ObserveConfig = ObserveConfig()
    guards: tuple[GuardRule, ...] = Field(DEFAULT_GUARDS, description="'on', 'off' or rules")
    scheduler: Literal["none", "asha", "pbt"] = "none"
    race: RaceConfig = RaceConfig()
    pbt: PbtConfig = PbtConfig()
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
        is_checked_elsewhere = info.field_name in ("axes", "constraints")
        if not is_checked_elsewhere and not (info.field_name == "guards" and isinstance(value, bool)):
            refuse_booleans(value)
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

    @field_validator("settled_lrs")
    @classmethod
    def _known_cells(cls, rates: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
        return {
            _format_name(format): {
                check_choice(arm, ARMS, "arm"): {
                    check_choice(policy, POLICIES, "policy"): lr for policy, lr in own.items()
                }
                for arm, own in arms.items()
            }
            for format, arms in rates.items()
        }

    @field_validator("guards", mode="before")
    @classmethod
    def _guards_on_or_off(cls, value: Any) -> Any:
        if isinstance(value, str) and (value in NAMED_RULES or " " in value):
            return tuple(rule.strip() for rule in value.split(";"))
        if isinstance(value, str):
            value = check_choice(value, ("on", "off"), "setting of the guards") == "on"
        return (DEFAULT_GUARDS if value else ()) if isinstance(value, bool) else value

    @field_validator("axes", mode="before")
    @classmethod
    def _known_axes(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} is not allowed: a mapping of paths to lists or ranges is expected")
        arms = info.data.get("optimizers", tuple(ARMS))
        paths = {
            str(path).replace(".scale.block", ".scale.block_size") if str(path).endswith(".block") else str(path): axis
            for path, axis in value.items()
        }
        return {path: read_axis(path, axis, arms) for path, axis in paths.items()}

    @field_validator("constraints")
    @classmethod
    def _known_constraints(cls, rules: tuple[Constraint, ...], info: ValidationInfo) -> tuple[Constraint, ...]:
        names = Counter([rule.name for rule in rules] + [rule.name for rule in RULES])
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} names two rules; each needs a name of its own")
        return tuple(_checked(rule, info.data.get("optimizers", tuple(ARMS))) for rule in rules)

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives_by_commas(cls, value: Any) -> Any:
        items = value.split(",") if isinstance(value, str) else value
        return tuple(check_choice(str(item).strip(), OBJECTIVES, "objective") for item in items)

    @field_validator("scheduler", mode="before")
    @classmethod
    def _no_hyperband(cls, value: Any) -> Any:
        if str(value).lower().startswith(("hyperband", "bohb")):
            raise ValueError(
                f"{value!r} is not offered: it runs NaN trials to their end, stops good ones, and hangs "
                "when a guard ends a trial; allowed: none, asha, pbt; nearest: asha"
            )
        return value

    @model_validator(mode="after")
    def _settings_go_together(self) -> SweepSpec:
        check_together(self)
        return self

    @model_validator(mode="after")
    def _every_trial_is_valid(self) -> SweepSpec:
        # Seeds differ in nothing else: one of each stands for all.
        if not self.model_copy(update={"seeds": 1}).expand() and self.search == "grid":
            names = ", ".join(rule.name for rule in self.constraints)
            raise ValueError(f"constraints: nothing is left to run by {names}")
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
        """Every trial that can be named beforehand, once: references first, then cells with their seeds adjacent.

        A search by Optuna chooses as it goes: only its references are here.
        """
        if self.search == "grid":
            return expansion.expand(self)
        from altgrad.sweep.sampling import sampled

        return sampled(self)

    def trials(self, data_sha256: str) -> dict[str, TrainConfig]:
        """The trials by id, in the order in which they run."""
        if self.scheduler == "pbt":
            from altgrad.sweep.population import named

            return named(self, data_sha256)
        return {config.trial_id(data_sha256): config for config in self.expand()}

    @property
    def seed_range(self) -> range:
        """The seeds of each configuration."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def batches(self) -> tuple[int, ...]:
        """Every batch size that trials may have."""
        axis = self.axes.get("data.batch", (self.data.batch,))
        return tuple(range(math.ceil(axis.low), math.floor(axis.high) + 1)) if isinstance(axis, Range) else axis

    def exclusions(self) -> list[Exclusion]:
        """What the product of a grid's axes would hold and `expand` leaves out, by rule."""
        return expansion.exclusions(self) if self.search == "grid" else []


def check_together(spec: SweepSpec) -> None:
    """ValueError where two of the sweep's settings exclude each other, or one means something in this program only."""
    POLICIES.check_own("policies", spec.policies)
    ARMS.check_own("optimizers", spec.optimizers)
    UPDATES.check_own("optimizers", (kind for name in spec.optimizers if (kind := ARMS[name].kind) in UPDATES))
    rules = [*spec.guards, *(rule for one in spec.interventions for rule in getattr(one, "rules", ()))]
    SIGNALS.check_own("guards", (rule.signal.partition("/")[0] for rule in rules))
    ranges = [path for path, axis in spec.axes.items() if isinstance(axis, Range)]
    if spec.search == "grid":
        if ranges:
            raise ValueError(
                f"axes: {ranges[0]}: a range can't be enumerated; with search='grid' a list is expected, "
                "ranges are for random and optuna"
            )
        if spec.num_samples is not None:
            raise ValueError(
                f"num_samples={spec.num_samples} belongs to search='random' or 'optuna'; a grid runs whole"
            )
    for old, path in (("lrs", "optimizer.lr"), ("rung_clip", "optimizer.rung_clip")):
        if getattr(spec, old) and path in spec.axes:
            raise ValueError(f"axes: {path}: {old} is the same axis; one of them, please")
    if spec.settled_lrs:
        _check_settled(spec)
    if spec.objectives != ("val_loss",) and spec.search != "optuna":
        raise ValueError(f"objectives={','.join(spec.objectives)} belongs to search='optuna'")
    if len(spec.objectives) > 1 and spec.scheduler == "asha":
        raise ValueError(f"scheduler='asha' with objectives={','.join(spec.objectives)}: a race compares one number")
    if "data.tokenizer" in spec.axes and spec.search != "grid" and "val_loss" in spec.objectives:
        raise ValueError("objectives: 'val_loss' can't compare tokenizers (nats per token); bits_per_byte can")
    if spec.scheduler == "pbt":
        _check_pbt(spec)


def _check_settled(spec: SweepSpec) -> None:
    if spec.search != "grid" or spec.scheduler != "none":
        raise ValueError("settled_lrs: each cell has one rate; with search='grid' and scheduler='none' only")
    other = "lrs" if spec.lrs else next((path for path in spec.axes if path.endswith(".lr")), None)
    if other is not None:
        raise ValueError(f"settled_lrs: {other} says the same; one of them, please")
    lacks = [point for point in expansion.whole(spec) if expansion.settled_lr(spec, point) is None]
    if lacks:
        named = ", ".join(f"{point.format} {point.arm} {point.policy}" for point in lacks[:3])
        raise ValueError(f"settled_lrs: no rate for {named}{f' and {len(lacks) - 3} more' if lacks[3:] else ''}")


def _check_pbt(spec: SweepSpec) -> None:
    if spec.search != "grid":
        raise ValueError(f"scheduler='pbt' with search={spec.search!r}: a population starts from a grid of rates")
    every = spec.pbt.every(spec.steps, spec.eval_interval)
    if every % spec.eval_interval or every >= spec.steps:
        raise ValueError(
            f"pbt.interval={every} is not allowed: a multiple of eval_interval={spec.eval_interval} below "
            f"steps={spec.steps} is expected"
        )
    if all(len(expansion.population_axes(spec, arm)) < 2 for arm in spec.optimizers):
        raise ValueError("scheduler='pbt': a population has 2 or more members; give lrs, or rung_clip, several values")


def _checked(rule: Constraint, arms: tuple[str, ...]) -> Constraint:
    """The constraint with its names as the sweep spells them; ValueError where it names what there is not."""
    when = dict(rule.when)
    for path, wanted in rule.when.items():
        check_path(path, arms, f"key for {rule.name}", ("format", "policy", "optimizer"))
        if path not in ("format", "policy", "optimizer"):
            continue
        if not isinstance(wanted, tuple):
            raise ValueError(f"{rule.name}: {path} is a name; {{low, high}} is for numbers")
        if path == "format":
            when[path] = tuple(_format_name(str(name)) for name in wanted)
        else:
            known: Any = ARMS if path == "optimizer" else POLICIES
            what = "arm" if path == "optimizer" else path
            when[path] = tuple(check_choice(str(name), known, what) for name in wanted)
    return rule.model_copy(update={"when": when})


def is_reference(config: TrainConfig) -> bool:
    """Whether this trial is what others are compared with: AdamW in FP32 or BF16."""
    return config.is_reference


def _format_name(name: str) -> str:
    if name.upper() in BLOCK_FORMATS:
        return name.upper()
    if name.upper() == UNQUANTIZED:
        return UNQUANTIZED
    try:
        return get_format(name).name
    except ValueError as error:
        allowed = (UNQUANTIZED, *ALL_FORMATS, *BLOCK_FORMATS)
        reason = f" ({error})" if re.match(r"E\d+M\d+", name) else ""
        raise ValueError(
            f"{name!r} is no usable format{reason}; allowed: {', '.join(allowed)} and other ExMy of 4 to "
            f"16 bits{nearest(name, allowed)}"
        ) from error


def _all_of(names: tuple[str, ...], every: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for name in names for item in (every if name == "all" else (name,))))
