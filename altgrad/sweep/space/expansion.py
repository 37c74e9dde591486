"""From a sweep's axes to its trials: the product, what is left out of it and why, and single points of it.

A point is an arm in a format under a policy, with values for the axes that apply to it: those of the setting, which
all arms share, and those of its arm's own parameters. A point becomes a `TrainConfig` and is checked by becoming one.
Constraints are asked first, so a rule may leave out what would be no valid training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from altgrad.quantization import Recipe, get_format, own_format
from altgrad.sweep.space.axes import CONDITIONS, REFUSED, Range, accepts, arm_fields, is_of_recipe, is_of_setting
from altgrad.sweep.space.declaration import Declaration
from altgrad.sweep.space.exclusions import (
    BLOCK_FORMATS,
    RAW_LR,
    RAW_LR_REASON,
    RULES,
    Combination,
    Exclusion,
    canonical,
    excluded_by,
    in_place_of,
)
from altgrad.training.arm_configs import ARMS, OptimizerConfig
from altgrad.training.config import BASELINE, UNQUANTIZED, TrainConfig
from altgrad.training.record import flat

_OPTIMIZER: TypeAdapter[Any] = TypeAdapter(OptimizerConfig)


@dataclass(frozen=True)
class Point:
    """`setting`: values by path; `parameters`: the arm's own, by field. What neither names is the sweep's own value."""

    combination: Combination
    setting: Mapping[str, Any]
    parameters: Mapping[str, Any]

    @cached_property
    def optimizer(self) -> Any:
        """The arm with its parameters; ValidationError where they don't go together."""
        base = ARMS[self.combination.arm]
        # Not copied: what belongs together (rounding and error feedback) has to be checked together.
        return _OPTIMIZER.validate_python(base.model_dump() | dict(self.parameters)) if self.parameters else base

    def values(self, spec: Declaration) -> dict[str, Any]:
        """By path, for constraints: every field of the arm and of the setting."""
        asked = self.combination
        try:
            arm = self.optimizer.arm
        except ValidationError:
            arm = asked.arm
        own = ARMS[asked.arm].model_dump() | dict(self.parameters)
        found = {"format": asked.format, "policy": asked.policy, "optimizer": arm, "recipe": asked.recipe.model_dump()}
        found |= {f"recipe.{path}": value for path, value in flat(found["recipe"]).items()}
        found |= {f"{head}.{field}": value for field, value in own.items() for head in ("optimizer", asked.arm)}
        for name in type(spec.base).model_fields:
            if name in OF_CELLS or name in REFUSED:
                continue
            value = self.setting.get(name, getattr(spec.base, name))
            plain = value.model_dump() if isinstance(value, BaseModel) else value
            found[name] = plain
            if isinstance(plain, Mapping):
                found |= {f"{name}.{field}": item for field, item in plain.items()}
        return found | dict(self.setting)

    def config(self, spec: Declaration, seed: int) -> TrainConfig:
        """The trial; ValueError, naming the values, where they are no valid training together."""
        try:
            return TrainConfig(
                format=self.combination.format,
                policy=self.combination.policy,
                recipe=self.combination.recipe,
                optimizer=self.optimizer,
                seed=seed,
                **_shared(spec, self.setting),
            )
        except ValidationError as error:
            first = error.errors()[0]
            text = str(first["msg"]).removeprefix("Value error, ")
            varied = {**self.setting, **{f"{self.combination.arm}.{name}": v for name, v in self.parameters.items()}}
            if not varied:
                raise ValueError(text) from None
            named = ", ".join(f"{path}={value!r}" for path, value in varied.items())
            raise ValueError(f"{named} makes no valid trial ({text}); a constraint can leave it out") from None


OF_CELLS = ("format", "policy", "recipe", "optimizer", "seed")
"""Fields of a trial that are no part of the setting which all cells share."""


def _shared(spec: Declaration, setting: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {name: value for name, value in dict(spec.base).items() if name not in OF_CELLS}
    for path, value in setting.items():
        head, _, field = path.partition(".")
        if not field:
            found[head] = value
            continue
        held = found[head]
        plain = held.model_dump() if isinstance(held, BaseModel) else dict(held)
        found[head] = plain | {field: value}
    return found


def expand(spec: Declaration) -> list[TrainConfig]:
    """Every trial of a grid once: references first, then cells with their seeds adjacent."""
    cells = [point for point, excluded in points(spec) if excluded is None]
    settings = settings_of(cells)
    if not settings and not spec.constraints:
        settings = [{}]  # FP32 alone: nothing but references
    return trials_of(spec, [*references(spec, settings), *cells])


def trials_of(spec: Declaration, found: Sequence[Point]) -> list[TrainConfig]:
    """The points' trials, each repeated over the seeds, equal ones once."""
    trials = (point.config(spec, seed) for point in found for seed in spec.seed_range)
    return list({trial.trial_id(""): trial for trial in trials}.values())


def references(spec: Declaration, settings: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """BF16 AdamW, and FP32 where asked for, in each of the settings, as far as constraints leave them."""
    # BF16 first: the others wait for it, and FP32 fills what is left of its time.
    for combination in reference_combinations(spec):
        for setting in settings:
            for parameters in ({},) if spec.search != "grid" else _variants(spec, combination):
                point = Point(combination, setting, parameters)
                if _constraint(spec, point) is None:
                    yield point


def reference_combinations(spec: Declaration) -> list[Combination]:
    """BF16 AdamW, then FP32 where it is asked for."""
    names = (BASELINE, UNQUANTIZED) if UNQUANTIZED in spec.formats else (BASELINE,)
    return [Combination(name, "uniform", "adamw", name) for name in names]


def whole(spec: Declaration) -> list[Combination]:
    """What runs of format × policy × arm, references first, whatever constraints leave of it."""
    return [*reference_combinations(spec), *(point for point in combinations(spec) if excluded_by(point) is None)]


def settled_lr(spec: Declaration, point: Combination) -> float | None:
    """The rate that the sweep names for this cell."""
    return spec.settled_lrs.get(point.format, {}).get(point.arm, {}).get(point.policy)


def exclusions(spec: Declaration) -> list[Exclusion]:
    """What the product of the axes would hold and `expand` leaves out, by rule; declared constraints even where
    they leave out nothing."""
    found = {rule.name: Exclusion(rule.name, rule.reason, 0) for rule in RULES}
    found[RAW_LR] = Exclusion(RAW_LR, RAW_LR_REASON, 0)
    found |= {rule.name: Exclusion(rule.name, rule.text, 0) for rule in spec.constraints}
    for point, rule in points(spec):
        if rule is not None:
            found[rule] = found[rule].plus(spec.seeds)
        elif ARMS[point.combination.arm].has_own_lr_unit:
            found[RAW_LR] = found[RAW_LR].plus(spec.seeds * len(general_lrs(spec)))
    declared = {rule.name for rule in spec.constraints}
    return [exclusion for exclusion in found.values() if exclusion.trials or exclusion.rule in declared]


def points(spec: Declaration) -> Iterator[tuple[Point, str | None]]:
    """The whole product, each point with the name of the rule that leaves it out, or None."""
    settings = _product({path: axis for path, axis in spec.axes.items() if is_of_setting(path)})
    settings = _unread_dropped(spec, settings)
    for combination in combinations(spec):
        for setting in settings:
            for parameters in _variants(spec, combination):
                point = Point(combination, setting, parameters)
                yield point, excluded(spec, point)


def combinations(spec: Declaration) -> Iterator[Combination]:
    """Format × policy × arm × recipe; of recipes that are the same training only the first is not left out."""
    changes = recipes(spec)
    for name in spec.formats:
        policies = (BLOCK_FORMATS[name],) if name in BLOCK_FORMATS else spec.policies
        for policy, arm in product(policies, spec.optimizers):
            yield from _of_recipes(combination_of(spec, name, policy, arm), changes)


def combination_of(spec: Declaration, name: str, policy: str, arm: str) -> Combination:
    """A format as it is asked for, a policy and an arm, under the formats that policies name themselves."""
    policy = BLOCK_FORMATS.get(name, policy)
    own = own_format(policy)
    stands = name in BLOCK_FORMATS or name == (own if own in spec.formats else lead(spec))
    format = own if own is not None and stands else name
    return in_place_of(Combination(format, policy, arm, lead(spec)), spec.policies)


def _of_recipes(point: Combination, changes: Sequence[Recipe]) -> Iterator[Combination]:
    seen = set()
    for recipe in changes:
        changed = point._replace(recipe=recipe)
        shortest = canonical(changed)
        yield changed if shortest in seen else shortest
        seen.add(shortest)


def recipes(spec: Declaration) -> list[Recipe]:
    """The sweep's own recipe, under every combination of values of the axes over it, each once."""
    found: list[Recipe] = []
    for values in _unread_dropped(
        spec, _product({path: axis for path, axis in spec.axes.items() if is_of_recipe(path)})
    ):
        recipe = recipe_of(spec, values)
        if recipe not in found:
            found.append(recipe)
    return found


def recipe_of(spec: Declaration, values: Mapping[str, Any]) -> Recipe:
    """The sweep's own recipe with these values by path; ValueError where they don't go together."""
    plain: Any = copy.deepcopy(values.get("recipe", spec.base.recipe.model_dump()))
    for path, value in values.items():
        names = path.split(".")[1:]
        inner = plain
        for name in names[:-1]:
            inner[name] = dict(inner[name] or {})
            inner = inner[name]
        if names:
            inner[names[-1]] = value
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("recipe", *map(str, first["loc"])))
        named = ", ".join(f"{path}={value!r}" for path, value in values.items())
        raise ValueError(f"{where}: {str(first['msg']).removeprefix('Value error, ')} ({named})") from None


def lead(spec: Declaration) -> str:
    """The first 8-bit format asked for, or the first format."""
    quantized = [name for name in spec.formats if name != UNQUANTIZED and name not in BLOCK_FORMATS]
    if not quantized and spec.formats[0] in BLOCK_FORMATS:
        return str(own_format(BLOCK_FORMATS[spec.formats[0]]))
    return next((name for name in quantized if get_format(name).total_bits == 8), spec.formats[0])


def excluded(spec: Declaration, point: Point) -> str | None:
    """The name of the first rule that leaves the point out, or None."""
    rule = excluded_by(point.combination)
    return rule.name if rule is not None else _constraint(spec, point)


def general_lrs(spec: Declaration) -> tuple[Any, ...]:
    """The learning rates in AdamW's unit that the sweep gives to all arms that have it."""
    given = spec.axes.get("optimizer.lr", spec.lrs)
    return given if isinstance(given, tuple) else ()


def arm_axes(spec: Declaration, arm: str) -> dict[str, Any]:
    """The axes of an arm's parameters, by field: those of its own, else those for all arms that have the field."""
    fields, own_unit = arm_fields(arm), ARMS[arm].has_own_lr_unit
    found: dict[str, Any] = {}
    given = {"optimizer.lr": spec.lrs, "optimizer.rung_clip": spec.rung_clip} | spec.axes
    for path, axis in given.items():
        head, _, field = path.partition(".")
        if head != "optimizer" or field not in fields or not axis or (field == "lr" and own_unit):
            continue
        taken = axis if isinstance(axis, Range) else tuple(value for value in axis if accepts(arm, field, value))
        if taken:
            found[field] = taken
    return found | {path.partition(".")[2]: axis for path, axis in spec.axes.items() if path.partition(".")[0] == arm}


def population_axes(spec: Declaration, arm: str) -> list[dict[str, Any]]:
    """What the members of a population of this arm start from: learning rates and rung clips."""
    return _product({field: axis for field, axis in arm_axes(spec, arm).items() if field in ("lr", "rung_clip")})


def is_read(spec: Declaration, setting: Mapping[str, Any], path: str) -> bool:
    """Whether the field is read under this setting."""
    if path not in CONDITIONS:
        return True
    other, values = CONDITIONS[path]
    inner: Any = spec.base
    for name in other.split("."):
        inner = getattr(inner, name, None)
    return setting.get(other, inner) in values


def _constraint(spec: Declaration, point: Point) -> str | None:
    if not spec.constraints:
        return None
    values = point.values(spec)
    return next((rule.name for rule in spec.constraints if rule.holds(values)), None)


def _variants(spec: Declaration, combination: Combination) -> list[dict[str, Any]]:
    settled = settled_lr(spec, combination)
    return _product(arm_axes(spec, combination.arm) | ({} if settled is None else {"lr": (settled,)}))


def _product(axes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _unread_dropped(spec: Declaration, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for setting in settings:
        kept = {path: value for path, value in setting.items() if is_read(spec, setting, path)}
        if kept not in found:
            found.append(kept)
    return found


def settings_of(found: Sequence[Point]) -> list[Mapping[str, Any]]:
    settings: list[Mapping[str, Any]] = []
    for point in found:
        if point.setting not in settings:
            settings.append(point.setting)
    return settings
