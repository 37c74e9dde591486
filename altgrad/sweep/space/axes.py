"""Axes over the fields of a trial's configuration: which fields can be one, and which values they take.

An axis is a path and its points: a list of values, or a range to sample from. Paths are those of `TrainConfig`:

    optimizer.beta2      a field of the arm; multiplies only the arms that have it (precondition, rung_clip, …)
    lion.lr              the same for one arm, in place of what the sweep says for all
    schedule.kind, data.batch, clip_grad_norm, model, interventions, …      the setting that all arms share
    recipe.weight.scale.kind, recipe.gradient.rounding, recipe, …           what is changed of a policy, as a policy is

A field that can't change a training, or that has an axis of its own (formats, seeds, …), is refused with the reason.
A field that is read only under some value of another (`CONDITIONS`) multiplies only trials with that value.
A constraint leaves out the combinations that it names, under a name of its own, and they are counted.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from altgrad.quantization.roles import ROLES
from altgrad.training.arm_configs import ARMS, Frozen
from altgrad.training.config import MODELS, TrainConfig

CONDITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "schedule.decay_fraction": ("schedule.kind", ("wsd",)),
    **{
        f"recipe.{role}.scale.{field}": (f"recipe.{role}.scale.kind", kinds)
        for role in ROLES
        for field, kinds in (
            ("block_size", ("block",)),
            ("block_scale_format", ("block",)),
            ("history", ("delayed",)),
            ("shared", ("delayed",)),
            ("margin", ("current", "delayed", "per_channel")),
            ("headroom", ("current", "delayed", "per_channel")),
            ("power_of_two", ("current", "delayed", "per_channel")),
        )
    },
}
"""Fields that are read only where another has one of these values."""

_NUMBERLESS = "it can't change what a training computes"
_ONE_CORPUS = "a sweep has one corpus"
REFUSED = {
    "format": "its axis is formats",
    "policy": "its axis is policies",
    "seed": "replicates are seeds: N",
    "optimizer": "arms are the axis optimizers, their parameters optimizer.lr and the like",
    "optimizer.kind": "arms are the axis optimizers",
    "steps": "a longer run is the same trial, continued",
    "task": "a sweep has one task",
    **dict.fromkeys(("guards", "observe", "log_interval", "eval_interval", "checkpoint_interval"), _NUMBERLESS),
    **dict.fromkeys(
        (
            "data",
            "data.source",
            "data.revision",
            "data.text_field",
            "data.label_field",
            "data.label_names",
            "data.val_fraction",
            "model.encoder",
        ),
        _ONE_CORPUS,
    ),
}
"""Fields that are no axis, and why."""


class Range(Frozen):
    """Values from `low` to `high`, whole ones where the field is; to be sampled from, evenly or by order of magnitude.

    `step` counts from `low`; without one, every value in between.
    """

    low: FiniteFloat
    high: FiniteFloat
    log: bool = Field(False, description="evenly by order of magnitude")
    step: Annotated[FiniteFloat, Field(gt=0)] | None = Field(None, description="from low on; not with log")

    @model_validator(mode="after")
    def _spans(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be less than high={self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log=true needs low above 0 and no step; got low={self.low:g}, step={self.step}")
        return self


Axis = Range | tuple[Any, ...]


class Bounds(Frozen):
    """Numbers from `low` to `high`, both included; one end may be left open."""

    low: FiniteFloat | None = None
    high: FiniteFloat | None = None

    def holds(self, value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


class Constraint(Frozen):
    """Leaves out every combination for which all of `when` hold: a value, one of a list, or `{low, high}`.

    Keys are paths as in axes, and `format`, `policy` and `optimizer` (the arm's name as the ledger gives it).
    """

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="names the rule where exclusions are counted")
    when: dict[str, Bounds | tuple[Any, ...]] = Field(min_length=1, description="path to value, list or {low, high}")
    reason: str = Field("", description="shown where exclusions are counted")

    @model_validator(mode="before")
    @classmethod
    def _one_value_is_a_list(cls, values: Any) -> Any:
        when = values.get("when") if isinstance(values, Mapping) else None
        if not isinstance(when, Mapping):
            return values
        found = {
            path: item
            if isinstance(item, Mapping | Bounds | tuple)
            else tuple(item)
            if isinstance(item, list)
            else (item,)
            for path, item in when.items()
        }
        return dict(values) | {"when": found}

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether the combination, by path, is left out; a path that it does not have holds for nothing."""
        return all(path in point and _matches(point[path], wanted) for path, wanted in self.when.items())

    @property
    def text(self) -> str:
        """The reason, or the rule itself."""
        return self.reason or " and ".join(f"{path} {_text(wanted)}" for path, wanted in self.when.items())


def _matches(value: Any, wanted: Bounds | tuple[Any, ...]) -> bool:
    return wanted.holds(value) if isinstance(wanted, Bounds) else value in wanted


def _text(wanted: Bounds | tuple[Any, ...]) -> str:
    if isinstance(wanted, Bounds):
        ends = (("≥", wanted.low), ("≤", wanted.high))
        return " and ".join(f"{sign} {end:g}" for sign, end in ends if end is not None)
    return "is " + " or ".join(map(str, wanted))


def paths(arms: Sequence[str]) -> Iterator[str]:
    """Every path that can be an axis in a sweep of these arms."""
    for field in dict.fromkeys(name for arm in arms for name in arm_fields(arm)):
        yield f"optimizer.{field}"
    yield from (f"{arm}.{field}" for arm in arms for field in arm_fields(arm))
    for name, info in TrainConfig.model_fields.items():
        if name not in REFUSED:
            yield name
        if REFUSED.get(name) != _NUMBERLESS:
            yield from _inner_paths(name, info.annotation)


def _inner_paths(path: str, annotation: Any) -> Iterator[str]:
    model = _model_of(annotation)
    for name, info in model.model_fields.items() if model is not None else ():
        if (inner := f"{path}.{name}") not in REFUSED:
            yield inner
            yield from _inner_paths(inner, info.annotation)


def arm_fields(arm: str) -> dict[str, Any]:
    """The parameters of an arm, by name."""
    return {name: info for name, info in type(ARMS[arm]).model_fields.items() if name != "kind"}


def arms_of(path: str, arms: Sequence[str]) -> list[str]:
    """The arms that an axis multiplies; empty for an axis of the setting."""
    head, _, field = path.partition(".")
    return [arm for arm in arms if head in ("optimizer", arm) and field in arm_fields(arm)]


def is_of_arm(path: str) -> bool:
    """Whether the path is a parameter of arms, and not of the setting."""
    head = path.partition(".")[0]
    return head == "optimizer" or head in ARMS


def is_of_recipe(path: str) -> bool:
    """Whether the path is the recipe or a part of it."""
    return path.partition(".")[0] == "recipe"


def is_of_setting(path: str) -> bool:
    """Whether the path is of what all cells share."""
    return not is_of_arm(path) and not is_of_recipe(path)


def check_path(path: str, arms: Sequence[str], what: str = "axis", also: Sequence[str] = ()) -> None:
    """ValueError where no trial of these arms has such a field, or it is no axis; `also` is allowed too."""
    allowed = [*also, *paths(arms)]
    if path in REFUSED and path not in also:
        raise ValueError(f"{path!r} is no {what}: {REFUSED[path]}")
    if path in allowed:
        return
    head, _, field = path.partition(".")
    if head in ARMS and head not in arms:
        raise ValueError(f"{path!r} is no {what} here: the sweep has no arm {head}; it has {', '.join(arms)}")
    owners = [arm for arm in ARMS if field in arm_fields(arm)] if head == "optimizer" else []
    if owners:
        raise ValueError(f"{path!r} is no {what} here: none of {', '.join(arms)} has it, but {', '.join(owners)}")
    close = get_close_matches(path, allowed, n=1, cutoff=0.4)
    shown = [name for name in allowed if name.partition(".")[0] not in ARMS]
    raise ValueError(f"{path!r} is no {what}; allowed: {', '.join(shown)}{f'; nearest: {close[0]}' if close else ''}")


def read_axis(path: str, given: Any, arms: Sequence[str]) -> Axis:
    """The axis as it was meant: values of the field's type, or a range. ValueError, naming the path, otherwise."""
    check_path(path, arms)
    if isinstance(given, Range):
        given = given.model_dump()
    if isinstance(given, Mapping) and path not in ("model", "recipe"):
        return _read_range(path, given, arms)
    if not isinstance(given, list | tuple):
        raise ValueError(f"{path}: {given!r} is not allowed: a list of values, or a range {{low, high, log}}")
    if not given:
        raise ValueError(f"{path}: [] names nothing: one value is expected at least")
    found = []
    for value in given:
        read = _read_value(path, value, arms)
        if read not in found:
            found.append(read)
    return tuple(found)


def is_whole(path: str) -> bool:
    """Whether the field takes whole numbers."""
    return int in _plain_types(_field(path, list(ARMS)).annotation)


def accepts(arm: str, field: str, value: Any) -> bool:
    """Whether this arm's field takes the value: fields of one name may allow different words."""
    try:
        _adapter_of_arm(arm, field).validate_python(value)
    except ValidationError:
        return False
    return True


def _read_range(path: str, given: Mapping[str, Any], arms: Sequence[str]) -> Range:
    try:
        found = Range.model_validate(dict(given))
    except ValidationError as error:
        # A misspelt key is the cause where its right spelling is missing, too.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        where = ".".join((path, *map(str, first["loc"])))
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{where}: unknown key; a range has {', '.join(Range.model_fields)}") from None
        raise ValueError(f"{where}: {_message(first)}") from None
    if not {int, float} & _plain_types(_field(path, arms).annotation):
        raise ValueError(f"{path}: a range is for numbers; a list of values is expected")
    for end in (found.low, found.high):
        _read_value(path, end, arms)
    return found


def _read_value(path: str, value: Any, arms: Sequence[str]) -> Any:
    """The value as plain data of the field's type."""
    info = _field(path, arms)
    if path == "model" and isinstance(value, str):
        if value not in MODELS:
            close = get_close_matches(value, MODELS, n=1)
            near = f"; nearest: {close[0]}" if close else ""
            raise ValueError(f"{path}: {value!r} is no model; allowed: {', '.join(MODELS)}{near}")
        value = MODELS[value]
    if isinstance(value, bool) and bool not in _plain_types(info.annotation):
        raise ValueError(f"{path}: {value!r} is not allowed: a yes or no is not expected here")
    candidates = [arm_fields(arm)[path.partition(".")[2]] for arm in arms_of(path, arms)] or [info]
    failure: ValidationError | None = None
    for candidate in candidates:
        adapter = _adapter(candidate)
        try:
            return adapter.dump_python(adapter.validate_python(value), mode="json")
        except ValidationError as error:
            failure = error
    assert failure is not None
    raise ValueError(f"{path}: {_message(failure.errors()[0])}") from None


def _message(error: Any) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return text
    return f"{error['input']!r} is not allowed: {text[:1].lower()}{text[1:]}"


def _field(path: str, arms: Sequence[str]) -> Any:
    head, *tail = path.split(".")
    if is_of_arm(path):
        (field,) = tail
        return next(arm_fields(arm)[field] for arm in (arms_of(path, arms) or ARMS) if field in arm_fields(arm))
    info: Any = TrainConfig.model_fields[head]
    for name in tail:
        model = _model_of(info.annotation)
        assert model is not None, "check_path has found the field"
        info = model.model_fields[name]
    return info


def _adapter(info: Any) -> TypeAdapter[Any]:
    annotation: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return TypeAdapter(annotation)


@cache
def _adapter_of_arm(arm: str, field: str) -> TypeAdapter[Any]:
    return _adapter(arm_fields(arm)[field])


def _plain_types(annotation: Any) -> set[Any]:
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return set().union(*map(_plain_types, get_args(annotation)))
    return {annotation}


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, if any."""
    found = [kind for kind in _plain_types(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return found[0] if len(found) == 1 else None
