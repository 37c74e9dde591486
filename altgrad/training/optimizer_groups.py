"""Parameter groups: what an arm's arguments may be, what a checkpoint may change, and the groups of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from altgrad.quantization import FloatFormat, embedded_weights, get_format, quantized_parameters
from altgrad.training.rules import RULES

RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number >= 0", lambda value: 0 <= value < math.inf),
    "eps": ("a number > 0", lambda value: 0 < value < math.inf),
    "weight_decay": ("a number >= 0", lambda value: 0 <= value < math.inf),
    "betas": ("two numbers in [0, 1)", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value)),
    "momentum": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "beta2": ("a number in [0, 1)", lambda value: 0 <= value < 1),
    "max_stiffness": ("a number > 0", lambda value: value > 0),
    "rung_clip": ("a number > 0, in rungs", lambda value: value > 0),
    "tensor_scale": ("None or a number > 0", lambda value: value is None or 0 < value < math.inf),
    "rounding": ("None, 'nearest' or 'stochastic'", lambda value: value in (None, "nearest", "stochastic")),
    "precondition": ("'update' or 'gradient'", lambda value: value in ("update", "gradient")),
    "normalize": ("'rms' or 'none'", lambda value: value in ("rms", "none")),
    "step_unit": ("'weight', or the arm's own unit", lambda value: value in ("weight", "ulp", "rungs")),
    "rule": (f"one of {', '.join(RULES)}, adam", lambda value: value in RULES or value == "adam"),
    "seed": ("an integer", lambda value: isinstance(value, int)),
}
"""What each argument of an arm may be, in words and as a test."""


def check_arguments(group: dict[str, Any]) -> None:
    """Raises ValueError that names the first argument out of its range, its value and what is allowed."""
    for name, value in group.items():
        if name in RANGES and not _passes(RANGES[name][1], value):
            raise ValueError(f"{name}={value!r} is not allowed: {RANGES[name][0]}")
    own_unit = "rungs" if "rung_clip" in group else "ulp"
    if group.get("step_unit", "weight") not in ("weight", own_unit):
        raise ValueError(f"step_unit={group['step_unit']!r} is not allowed: 'weight' or {own_unit!r}")
    if group.get("carry") and group["rung_clip"] < 1:
        raise ValueError(f"rung_clip={group['rung_clip']} is not allowed with carry: at least 1, one whole rung")
    if group.get("format") is not None:
        _check_scale(get_format(group["format"]), group.get("tensor_scale"))
    if group.get("error_feedback") and (group["rounding"] is None or not group["betas"][0]):
        raise ValueError(
            f"error_feedback=True is not allowed with rounding={group['rounding']!r}, betas={group['betas']}: it needs "
            "weights on the grid ('nearest' or 'stochastic') and a first moment (betas[0] > 0)"
        )


def _passes(test: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(test(value))
    except TypeError:
        return False


def _check_scale(fmt: FloatFormat, scale: float | None) -> None:
    least, most = 2.0**-149 / fmt.min_spacing, 2.0**128 / fmt.max
    if scale is not None and not least <= scale < most:
        raise ValueError(
            f"tensor_scale={scale!r} does not fit format={fmt.name!r}: its values times the scale must be "
            f"float32 numbers, so {least:.3g} <= tensor_scale < {most:.3g}"
        )


RECIPE = (
    *("format", "rounding", "rule", "precondition", "manifold_aware", "step_unit", "normalize", "carry"),
    "error_feedback",
)
"""Keys of a group that say what its state means. Others come from a checkpoint, as with torch's optimizers."""


def check_groups(present: list[dict[str, Any]], saved: list[Mapping[str, Any]]) -> None:
    """ValueError where a saved group says another recipe than the present one: a format, a rounding, a rule, a unit.

    Keys that schedulers, users and torch's own optimizers put there are nobody's recipe.
    """
    for index, (own, other) in enumerate(zip(present, saved, strict=False)):
        if "format" not in other:
            continue  # not one of ours: torch.optim's own, whose moments mean the same
        differing = [key for key in RECIPE if (key in own, own.get(key)) != (key in other, other.get(key))]
        if differing:
            was, here = (
                ", ".join(f"{key}={group[key]!r}" for key in differing if key in group) or "nothing of these"
                for group in (other, own)
            )
            raise ValueError(
                f"parameter group {index}: the checkpoint was made with {was}; this optimizer has {here}: load it into "
                "an optimizer of the same recipe"
            )


def parameter_groups(
    model: nn.Module, formats: Mapping[nn.Parameter, FloatFormat] | None = None, rule: str | None = None
) -> list[dict[str, Any]]:
    """A group per weight format of a converted model, and one without format for norms, positions and biases.

    `formats`: which parameter has which, by default those the model's layers round to. `rule`: of `RULES`, in every
    group; embeddings are kept from rules that are for matrices.
    """
    if formats is None:
        formats = dict(quantized_parameters(model).values())
    embedded = embedded_weights(model)
    groups: dict[tuple[str | None, str | None], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        fmt = formats.get(parameter)
        is_kept = rule is not None and rule in RULES and not RULES[rule].takes_rows and parameter in embedded
        own_rule = "adam" if is_kept else rule
        groups.setdefault((None if fmt is None else fmt.name, own_rule), []).append(parameter)
    return [
        {"params": members, "format": name} | ({"rule": own_rule} if own_rule else {})
        for (name, own_rule), members in groups.items()
    ]


class LayersFormat(str):
    """An arm's default format: weights of converted layers take the one of their layer, others this one."""


def parts_of(
    param_group: dict[str, Any], format: str | None, converted: Mapping[int, FloatFormat], *, is_converted: bool
) -> list[dict[str, Any]]:
    """The group in parts of one format each, where it leaves the format to the optimizer's `format`.

    `converted`: the weights of converted layers, by id; `is_converted`: whether the optimizer has any of these, for
    then its other parameters have no format.
    """
    params = param_group["params"]
    entries = [params] if isinstance(params, Tensor) else list(params)
    whole_group = param_group | {"params": entries}
    if isinstance(params, set) or not all(isinstance(tensor_of(entry), Tensor) for entry in entries):
        return [param_group | {"params": params}]  # torch says what is wrong
    if "format" in param_group or format is None or not is_converted:
        return [whole_group]
    parts: dict[str | None, list[Any]] = {}
    for entry in entries:
        own = converted.get(id(tensor_of(entry)))
        name = None if own is None else own.name if isinstance(format, LayersFormat) else format
        parts.setdefault(name, []).append(entry)
    last = sorted(parts.items(), key=lambda part: part[0] is None)
    return [whole_group | {"params": members, "format": name} for name, members in last] or [whole_group]


def has_converted(params: Any, converted: Mapping[int, FloatFormat]) -> bool:
    """Whether any of an optimizer's parameters, or of its groups', is the weight of a converted layer."""
    groups = [entry["params"] if isinstance(entry, dict) else [entry] for entry in params]
    entries = (entry for group in groups for entry in ([group] if isinstance(group, Tensor) else group))
    return any(id(tensor_of(entry)) in converted for entry in entries)


def tensor_of(entry: Any) -> Any:
    """The tensor of a parameter that may come with its name."""
    return entry[1] if isinstance(entry, tuple) else entry


def name_of(group: Mapping[str, Any], position: int, parameter: Tensor) -> str:
    """A parameter in messages: its name, or its place in the group, and its shape."""
    names = group.get("param_names")
    return f"parameter {names[position] if names else position} {tuple(parameter.shape)}"
