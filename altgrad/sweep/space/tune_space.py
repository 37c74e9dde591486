"""The sweep as a search space of Ray Tune, for a Tuner of one's own.

The space is nested as a trial is, and holds what varies: `format`, `policy`, `recipe`, `optimizer` (a branch per arm,
with its own parameters), `seed`, and the fields of the setting. A grid's lists are `grid_search`, a search's are
`choice` and its ranges `uniform`, `loguniform` or steps of them. What Tune's generator makes of it is the whole
product; `trial_of` gives the trial of one of its configurations, or None where a named rule leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from altgrad.sweep.space import expansion
from altgrad.sweep.space.axes import Range, is_of_recipe, is_of_setting, is_whole
from altgrad.sweep.space.declaration import Declaration
from altgrad.sweep.space.exclusions import canonical
from altgrad.sweep.space.expansion import Point
from altgrad.training.config import TrainConfig


def param_space(spec: Declaration) -> dict[str, Any]:
    """See the module. Ray is imported here."""
    from ray import tune

    is_grid = spec.search == "grid"
    listed = tune.grid_search if is_grid else tune.choice
    space: dict[str, Any] = {
        "format": listed(list(spec.formats)),
        "policy": listed(list(spec.policies)),
        "optimizer": listed([_branch(spec, arm, listed) for arm in spec.optimizers]),
        "seed": tune.grid_search(list(spec.seed_range)),
    }
    if any(map(is_of_recipe, spec.axes)):
        space["recipe"] = listed([recipe.model_dump(mode="json") for recipe in expansion.recipes(spec)])
    for path, axis in spec.axes.items():
        if is_of_setting(path):
            head, _, field = path.partition(".")
            value = _domain(axis, path, listed)
            if field:
                space.setdefault(head, {})[field] = value
            else:
                space[head] = value
    return space


def trial_of(spec: Declaration, config: Mapping[str, Any]) -> TrainConfig | None:
    """The trial of a configuration that was drawn from the space; None where a rule leaves it out.

    ValueError, naming the values, where they make no valid trial.
    """
    combination = expansion.combination_of(spec, config["format"], config["policy"], config["optimizer"]["arm"])
    if "recipe" in config:
        changed = combination._replace(recipe=expansion.recipe_of(spec, {"recipe": config["recipe"]}))
        combination = canonical(changed)  # the same training, by the name under which the sweep runs it
    parameters = {name: value for name, value in config["optimizer"].items() if name != "arm"}
    setting = {}
    for path in filter(is_of_setting, spec.axes):
        head, _, field = path.partition(".")
        setting[path] = config[head][field] if field else config[head]
    read = {path: value for path, value in setting.items() if expansion.is_read(spec, setting, path)}
    point = Point(combination, read, parameters)
    return None if expansion.excluded(spec, point) is not None else point.config(spec, config["seed"])


def _branch(spec: Declaration, arm: str, listed: Any) -> dict[str, Any]:
    """An arm and its parameters; a rate that was settled for each cell is looked up in the others' values."""
    from ray import tune

    own = {
        field: _domain(axis, f"{arm}.{field}" if f"{arm}.{field}" in spec.axes else f"optimizer.{field}", listed)
        for field, axis in expansion.arm_axes(spec, arm).items()
    }
    if spec.settled_lrs:
        own["lr"] = tune.sample_from(partial(_settled, spec, arm))
    return {"arm": arm, **own}


def _settled(spec: Declaration, arm: str, resolved: Any) -> float | None:
    config = resolved.get("config", resolved)
    return expansion.settled_lr(spec, expansion.combination_of(spec, config["format"], config["policy"], arm))


def _domain(axis: Any, path: str, listed: Any) -> Any:
    from ray import tune

    if not isinstance(axis, Range):
        return listed(list(axis))
    if is_whole(path):
        low, high = round(axis.low), round(axis.high) + 1
        return tune.lograndint(low, high) if axis.log else tune.qrandint(low, high - 1, round(axis.step or 1))
    if axis.log:
        return tune.loguniform(axis.low, axis.high)
    return tune.uniform(axis.low, axis.high) if axis.step is None else tune.quniform(axis.low, axis.high, axis.step)
