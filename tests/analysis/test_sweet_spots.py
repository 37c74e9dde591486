"""Which format each kind of layer takes best, from planted signals and planted recipes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from planted import BASE, cell

from altgrad.analysis.study import Study, study_of
from altgrad.analysis.sweet_spots import answers, recipe_text, relief_table, reliefs, spots_picture, spots_table
from altgrad.analysis.twins import twin_map

SEEDS = range(4)
KINDS = ("attention in", "MLP up", "head")
BEST = {"attention in": "E3M4", "MLP up": "E5M2"}
"""Of the head neither is."""


def study(**losses: float) -> Study:
    """E3M4 and E5M2 under the policies named, each so much above BASE, beside E0M7 = E1M6."""
    cells = [cell(dict.fromkeys(SEEDS, BASE), format="BF16", trial_ids=tuple(f"BF16-{seed}" for seed in SEEDS))]
    for policy, above in ({"uniform": 0.0} | losses).items():
        for name in ("E0M7", "E1M6", "E3M4", "E5M2"):
            own = {"E3M4": 0.0002, "E5M2": 0.0001}.get(name, 0.0)
            ends = {seed: BASE + above + 0.001 * (seed - 1.5) + own * seed for seed in SEEDS}
            ids = tuple(f"{name}-{policy}-{seed}" for seed in SEEDS)
            cells.append(cell(ends, format=name, policy=policy, trial_ids=ids))
    return study_of(cells)


def signals(found: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trials and their signals by kind: 40 dB for the best format of a kind, 30 dB else, 20 dB in E0M7 = E1M6."""
    trials, rows = [], []
    for item in found.cells:
        for seed, name in zip(SEEDS, item.trial_ids, strict=True):
            trials.append((name, seed))
            for kind in KINDS:
                value = 20.0 if item.format in ("E0M7", "E1M6") else 40.0 if BEST.get(kind) == item.format else 30.0
                rows += [(name, "weight_sqnr", kind, step, value + 0.1 * seed - (step == 10) * 15) for step in (10, 20)]
    columns = ["trial_id", "signal", "kind", "step", "value"]
    return pd.DataFrame(trials, columns=["trial_id", "seed"]), pd.DataFrame(rows, columns=columns)


def test_a_single_name_is_a_decision(tmp_path: Path) -> None:
    found = study()
    (answer,) = answers(found, *signals(found))
    assert (answer.question.signal, answer.arm, answer.policy) == ("weight_sqnr", "adamw", "uniform")
    assert {spot.kind: set(spot.best) for spot in answer.spots} == {
        "attention in": {"E3M4"},
        "MLP up": {"E5M2"},
        "head": {"E3M4", "E5M2"},
    }
    twins = twin_map(found.cells)
    lines = dict(spots_table([answer], twins).lines)
    assert lines["MLP up"] == "E5M2 (40.1 dB)" or lines["MLP up"] == "E5M2 (40.2 dB)"
    assert lines["head"].startswith("not decided: E3M4")
    assert spots_picture([answer], twins, tmp_path / "spots.png") and (tmp_path / "spots.svg").exists()
    assert not spots_picture([], twins, tmp_path / "none.png")


def test_what_a_recipe_gives_back_is_measured_against_uniform() -> None:
    found = study(attention_bf16=-0.05, head_bf16=0.0, uniform_full=0.2)
    items = reliefs(found)
    assert {(item.cell.policy, round(item.mean, 3)) for item in items} == {
        ("attention_bf16", 0.05),
        ("head_bf16", 0.0),
        ("uniform_full", -0.2),
    }
    table = relief_table(items, "nats")
    assert len(table.lines) == 4 and {line[-1] for line in table.lines} == {"attention_bf16: attention in BF16"}


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("attention_bf16", "attention_bf16: attention in BF16"),
        ("mlp_bf16", "mlp_bf16: MLP in BF16"),
        ("head_bf16", "head_bf16: head in BF16"),
        ("uniform_act", "uniform_act: activations in 8 bits too"),
        ("uniform_full", "uniform_full: activations and gradients in 8 bits too"),
        ("uniform", "uniform"),
    ],
)
def test_a_recipe_says_what_it_changes(policy: str, text: str) -> None:
    assert recipe_text(cell({0: BASE}, policy=policy)) == text
