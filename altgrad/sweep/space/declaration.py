"""What a sweep says: the template that all trials share, axes, replicates, and how trials are paced.

A `Declaration` has read and checked every field by itself; `SweepSpec` is one that is valid as a whole. What follows
from it (`expansion`, `sampling`, `populations`) are functions over this value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator

from altgrad.quantization import FORMATS, POLICIES, get_format
from altgrad.quantization.formats import OTHERS_NAMES
from altgrad.sweep.complaints import check_choice, nearest
from altgrad.sweep.pace.objectives import OBJECTIVES
from altgrad.sweep.space.axes import Axis, Constraint, Range, check_path, read_axis
from altgrad.sweep.space.exclusions import BLOCK_FORMATS, RULES
from altgrad.sweep.space.pacing import PbtConfig, Positive, RaceConfig
from altgrad.training.arm_configs import ARMS, Frozen
from altgrad.training.config import BASELINE, UNQUANTIZED, TrainConfig, refuse_booleans

ALL_FORMATS = tuple(FORMATS)
_CHOICES = {
    "formats": ", ".join((UNQUANTIZED, *ALL_FORMATS, "all")),
    "optimizers": ", ".join((*ARMS, "all")),
    "policies": ", ".join((*POLICIES, "all")),
}


BASE = TrainConfig(eval_interval=20)
"""What trials of a sweep share where nothing else is said."""
_PLAIN_BASE = BASE.model_dump(mode="json")
GIVEN_BY_AXES = {"format": "formats", "policy": "policies", "optimizer": "optimizers", "seed": "seeds and first_seed"}
"""Fields of a trial that only axes give, and under which names."""
TEMPLATE = tuple(name for name in TrainConfig.model_fields if name not in GIVEN_BY_AXES)
"""Fields of a trial that all share, unless an axis varies them."""


class Declaration(Frozen):
    """The fields of a sweep, each checked by itself."""

    name: str = Field("format_ablation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the folder")
    base: TrainConfig = Field(
        BASE, description="what all trials share; each of its fields may also stand at the sweep's own level"
    )
    formats: tuple[str, ...] = Field(
        (UNQUANTIZED, BASELINE, "E0M7", "E1M6", "E3M4", "E5M2", "E7M0"),
        min_length=1,
        description="format names, or 'all'; FP32 is the unquantized reference",
    )
    optimizers: tuple[str, ...] = Field(
        ("adamw", "adamw_nearest", "manifold", "grid"), min_length=1, description="arm names, or 'all'"
    )
    policies: tuple[str, ...] = Field(("uniform",), min_length=1, description="mixed-precision policies, or 'all'")
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
    margin: float = Field(
        0.1, gt=0, le=10, description="a format trains that ends within this part of BF16's loss; .1 is 10 %"
    )
    equal_within: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="nats within which two gains count as equal; null: a quarter of the arm's gain in BF16",
    )
    scheduler: Literal["none", "asha", "pbt"] = "none"
    race: RaceConfig = RaceConfig()
    pbt: PbtConfig = PbtConfig()

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
        if info.field_name not in ("axes", "constraints", "base"):
            refuse_booleans(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _template(cls, values: Any) -> Any:
        """Fields of a trial at the sweep's own level are those of `base`."""
        if not isinstance(values, Mapping):
            return values
        base, own = values.get("base", BASE), {name: values[name] for name in values if name in TEMPLATE}
        if isinstance(base, Mapping | TrainConfig):
            given = dict(base)
            for field, axis in GIVEN_BY_AXES.items():
                if field in given and given[field] not in (getattr(BASE, field), _PLAIN_BASE[field]):
                    raise ValueError(f"base.{field} is given by an axis of the sweep: {axis}")
            base = {name: value for name, value in given.items() if name not in GIVEN_BY_AXES} | own
        return {name: value for name, value in values.items() if name not in TEMPLATE} | {"base": base}

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

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What all trials share can be read, too, at the sweep's own level."""
            return getattr(self.base, name) if name in TEMPLATE else super().__getattr__(name)

    @field_serializer("base", mode="wrap")
    def _without_axes(self, base: TrainConfig, plain: Any) -> Any:
        return {name: value for name, value in plain(base).items() if name not in GIVEN_BY_AXES}

    @property
    def seed_range(self) -> range:
        """The seeds of each configuration."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def exchange_every(self) -> int:
        """Steps between exchanges of a population."""
        return self.pbt.every(self.base.steps, self.base.eval_interval)

    @property
    def batches(self) -> tuple[int, ...]:
        """Every batch size that trials may have."""
        axis = self.axes.get("data.batch", (self.base.data.batch,))
        return tuple(range(math.ceil(axis.low), math.floor(axis.high) + 1)) if isinstance(axis, Range) else axis


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


def _format_name(name: str) -> str:
    if name.upper() in BLOCK_FORMATS:
        return name.upper()
    if name.upper() == UNQUANTIZED:
        return UNQUANTIZED
    try:
        return get_format(name).name
    except ValueError as error:
        allowed = (UNQUANTIZED, *ALL_FORMATS, *BLOCK_FORMATS)
        reason = "" if str(error).startswith("unknown format") else f" ({error})"
        raise ValueError(
            f"{name!r} is no usable format{reason}; allowed: {', '.join(allowed)}, other ExMy of 4 to 16 bits, INT8, "
            f"INT4 and what torch, ml_dtypes and P3109 call theirs{nearest(name, (*allowed, *OTHERS_NAMES))}"
        ) from error


def _all_of(names: tuple[str, ...], every: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for name in names for item in (every if name == "all" else (name,))))
