"""The sweep as a space of Ray Tune: what Tune's own generator makes of it is what the sweep runs, minus named rules."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune.search.variant_generator import generate_variants

from altgrad.sweep.space.presets import PRESETS
from altgrad.sweep.space.spec import SweepSpec

SETTLED = {
    name: {"adamw": {"uniform": lr, "uniform_full": 2 * lr}, "grid": {"uniform": 3 * lr, "uniform_full": 4 * lr}}
    for name, lr in (("BF16", 1e-3), ("E4M3", 2e-3), ("E7M0", 4e-3))
}
SAME = ("raw_unit_has_its_own_lr", "recipe_changes_nothing")
"""What these leave out is another configuration's trial."""
SPACES: dict[str, Any] = {
    "quick": {},
    "standard": PRESETS["standard"],
    "policies": {"formats": "E4M3,BF16", "optimizers": "all", "policies": "all", "lrs": [1e-3, 2e-3]},
    "parameters": {
        "formats": "E4M3",
        "optimizers": "grid,lion",
        "axes": {"grid.rung_clip": [1, 3], "lion.beta2": [0.9]},
    },
    "settings": {
        "axes": {"schedule.kind": ["constant", "wsd"], "schedule.decay_fraction": [0.2, 0.5], "data.batch": [4, 8]}
    },
    "models": {"formats": "E5M2", "axes": {"model": ["quick", {"layers": 1}], "clip_grad_norm": [None, 1.0]}},
    "recipes": {
        "formats": "E4M3,MXFP8,BF16",
        "optimizers": "adamw,manifold",
        "axes": {"recipe.weight.scale.kind": ["current", "block"], "recipe.weight.scale.block_size": [16, 64]},
    },
    "constraints": {"constraints": [{"name": "none", "when": {"format": "E7M0", "optimizer": "grid"}}]},
    "settled": {
        "formats": "E4M3,E7M0",
        "optimizers": "adamw,grid",
        "policies": "uniform,uniform_full",
        "settled_lrs": SETTLED,
    },
}


@pytest.mark.parametrize("name", SPACES)
def test_a_grid_is_what_tune_makes_of_its_space(name: str) -> None:
    given = SPACES[name]
    spec = given if isinstance(given, SweepSpec) else SweepSpec(**given)
    drawn = [config["config"] for _, config in generate_variants({"config": spec.param_space()})]
    trials = {trial.trial_id(""): trial for config in drawn if (trial := spec.trial_of(config)) is not None}
    expanded = {trial.trial_id(""): trial for trial in spec.expand()}
    cells = {key for key, trial in expanded.items() if not trial.is_reference}
    assert cells == {key for key, trial in trials.items() if not trial.is_reference}
    assert trials.keys() <= expanded.keys()
    left_out = any(spec.trial_of(config) is None for config in drawn)
    assert left_out == any(item.trials for item in spec.exclusions() if item.rule not in SAME), "by the same rules"


def test_a_search_draws_from_domains_within_the_ranges() -> None:
    axes = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "data.batch": {"low": 4, "high": 16, "step": 4}}
    spec = SweepSpec(search="random", optimizers=("adamw", "grid"), axes=axes, seeds=1)
    found = []
    for state in range(60):
        (config,) = (c["config"] for _, c in generate_variants({"config": spec.param_space()}, random_state=state))
        if (trial := spec.trial_of(config)) is not None:
            found.append(trial)
    assert {trial.arm for trial in found} == {"adamw", "grid"} and len({trial.optimizer.lr for trial in found}) > 20
    assert all(1e-4 <= trial.optimizer.lr <= 1e-2 and trial.data.batch in (4, 8, 12, 16) for trial in found)
