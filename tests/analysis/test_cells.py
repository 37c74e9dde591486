"""What stands for a cell, what its settings are compared over, and when a run has learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from planted import cell
from synthetic import Plan, stall, write_ledger

from altgrad.analysis import settled_lrs
from altgrad.analysis.cells import Cell, find_reference
from altgrad.analysis.grids import build_cells, compared_rates
from altgrad.analysis.records import load
from altgrad.analysis.study import build_study
from altgrad.sweep import SweepSpec
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome, OutcomeKind


def trials_of(tmp_path: Path, plan: Plan) -> pd.DataFrame:
    return load(write_ledger(tmp_path, plan)).trials


@pytest.mark.parametrize(
    ("start", "end", "learned"),
    [
        (5.545, 5.503, False),
        (5.5, 5.01, False),
        (5.5, 4.99, True),  # half a nat
        (2.0, 1.81, False),
        (2.0, 1.79, True),  # a tenth
        (5.5, 1.2e11, False),
        (math.nan, 2.0, False),
        (5.5, math.nan, False),
    ],
)
def test_learning_is_a_clear_fall_from_the_first_step(start: float, end: float, learned: bool) -> None:
    assert cell({0: end}, starts={0: start}).learned is learned


def test_one_seed_that_did_not_learn_is_enough_to_say_so() -> None:
    assert not cell({0: 2.0, 1: 5.4}).learned and not cell({}, stops=(0,)).learned
    assert not cell({0: 2.0}, starts={}).learned, "where the first step is unknown nothing is taken for granted"


def test_a_stopped_seed_leaves_no_mean_and_ranks_below_any_number() -> None:
    own = cell({0: 2.0}, stops=(1,))
    assert math.isnan(own.mean) and own.rank > cell({0: 99.0, 1: 99.0}).rank


def test_the_best_learning_rate_stands_for_its_cell(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, Plan(["BF16"], ["adamw"], lrs=(1e-3, 3e-3, 1e-2)))
    trials["val_loss"] += trials["lr"].map({1e-3: 0.2, 3e-3: 0.0, 1e-2: 0.1})
    (chosen,) = build_cells(trials)
    assert (chosen.lr, chosen.settings, chosen.rates) == (3e-3, 3, (1e-3, 3e-3, 1e-2))
    stopped = (trials["lr"] == 3e-3) & (trials["seed"] == 1)
    trials.loc[stopped, "state"] = "failed"
    assert build_cells(trials)[0].lr == 1e-2, "survivors must not win over unstopped seeds"
    trials.loc[stopped, ["state", "outcome"]] = ["unresolved", "pruned"]
    found = build_cells(trials)[0]
    assert found.lr == 1e-2, "a setting that a race pruned ranks below every other"
    trials["state"], trials["outcome"] = "unresolved", "pruned"
    pruned = build_cells(trials)[0]
    assert pruned.pruned == (0, 1) and not pruned.has_result


GRID = (1e-3, 2e-3, 4e-3)


@pytest.mark.parametrize(
    ("ran", "expected"),
    [
        ({("E4M3", "adamw"): GRID, ("BF16", "adamw"): GRID}, {"adamw": GRID}),
        ({("E4M3", "adamw"): GRID, ("BF16", "adamw"): GRID[:2]}, {"adamw": GRID[:2]}),  # cut to what all formats ran
        ({("E4M3", "adamw"): GRID, ("BF16", "adamw"): (9e-3,)}, {}),  # nothing shared
        (  # one stray cell costs itself
            {("E4M3", "adamw"): GRID, ("BF16", "adamw"): GRID, ("E3M4", "adamw"): (9e-3,)},
            {("E4M3", "adamw"): GRID, ("BF16", "adamw"): GRID},
        ),
        ({("E4M3", "adamw"): (1e-3,), ("E4M3", "manifold"): (9e-3,)}, {"adamw": (1e-3,), "manifold": (9e-3,)}),
        ({("E4M3", "adamw"): GRID, ("E4M3", "manifold"): GRID[1:]}, {"adamw": GRID[1:], "manifold": GRID[1:]}),
        ({("E4M3", "adamw"): GRID, ("E4M3", "lion"): (1e-4,)}, {"adamw": GRID, "lion": (1e-4,)}),  # another unit
    ],
)
def test_cells_are_compared_over_equal_grids(
    ran: dict[tuple[str, str], tuple[float, ...]], expected: dict[str | tuple[str, str], tuple[float, ...]]
) -> None:
    units = {"adamw": "weight", "manifold": "weight", "lion": "lion"}
    found = compared_rates({(*key, "uniform"): rates for key, rates in ran.items()}, units)
    by_cell = {key: expected.get(key, expected.get(key[1])) for key in ran}
    assert found == {(*key, "uniform"): rates for key, rates in by_cell.items() if rates}


def test_what_shares_no_rate_is_exploratory_and_says_what_it_was_chosen_from(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], lrs=(1e-3,)))
    cells = build_cells(trials_of(tmp_path, Plan(["E5M2"], ["adamw"], lrs=(2e-3, 4e-3))))
    assert [(item.format, item.exploratory, item.settings) for item in cells] == [("E5M2", True, 2), ("BF16", True, 1)]


def test_a_cell_at_its_settled_rate_is_compared_whatever_others_ran_at(tmp_path: Path) -> None:
    rates = {("BF16", "adamw"): 1e-3, ("BF16", "manifold"): 2e-3, ("E5M2", "adamw"): 4e-3, ("E5M2", "manifold"): 5e-4}
    trials = pd.concat(
        trials_of(tmp_path / f"{format}-{arm}", Plan([format], [arm], lrs=(lr,))) for (format, arm), lr in rates.items()
    )
    settled: dict[str, dict[str, dict[str, float]]] = {}
    for (format, arm), lr in rates.items():
        settled.setdefault(format, {})[arm] = {"uniform": lr}
    assert {item.exploratory for item in build_cells(trials)} == {True}
    cells = build_cells(trials, settled)
    assert {(item.format, item.arm): item.lr for item in cells} == rates
    assert {(item.exploratory, item.rates == (item.lr,)) for item in cells} == {(False, True)}
    assert build_study(trials, settled=settled).beyond[0].status == "identical", "every run ends alike here"
    settled["E5M2"]["adamw"]["uniform"] = 9e-3
    assert [item.exploratory for item in build_cells(trials, settled)] == [True, False, False, False], "ran at another"


def test_rates_are_settled_where_a_cell_ends_lowest(tmp_path: Path) -> None:
    best = {("BF16", "adamw"): 1e-3, ("E0M7", "adamw"): 4e-3, ("BF16", "manifold"): 2e-3, ("E0M7", "manifold"): 2e-3}

    def ending(lr: float) -> Callable[[str, str, int], float | Outcome]:
        def of(format: str, arm: str, seed: int) -> float | Outcome:
            far = abs(math.log2(lr / best[format, arm]))
            return stall() if far and seed else 0.1 * far - 0.3 * bool(far)  # a seed that survives ends lower

        return of

    for lr in GRID:
        write_ledger(tmp_path, Plan(["BF16", "E0M7"], ["adamw", "manifold"], lrs=(lr,), offset=ending(lr)))
    found = settled_lrs(tmp_path)
    assert {(f, arm): own["uniform"] for f, arms in found.items() for arm, own in arms.items() if f != "E1M6"} == best
    assert found["E1M6"] == found["E0M7"], "one grid"
    SweepSpec(formats=("E1M6",), optimizers=("adamw", "manifold"), settled_lrs=found)
    write_ledger(tmp_path, Plan(["E4M3"], ["adamw"], offset=lambda *_: None))
    with pytest.raises(ValueError, match="2 of 26 trials have no result yet"):
        settled_lrs(tmp_path)


def searched(values: list[float]) -> list[TrainConfig]:
    return [
        TrainConfig(format=name, optimizer=ARMS["grid"].model_copy(update={"rung_clip": clip}), seed=seed, steps=20)
        for name in ("BF16", "E5M2")
        for clip in values
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("values", "arms", "exploratory"),
    [
        ([1.0, 3.0], {"grid, rung_clip 1", "grid, rung_clip 3"}, False),
        ([10.0], {"grid"}, False),
        ([1 + i / 10 for i in range(20)], {"grid"}, True),  # what a search has drawn
    ],
)
def test_a_parameter_that_varies_makes_an_arm_of_its_own(
    tmp_path: Path, values: list[float], arms: set[str], exploratory: bool
) -> None:
    class Searched(Plan):
        def configs(self) -> list[TrainConfig]:
            return searched(values)

    cells = build_cells(trials_of(tmp_path, Searched([], [])))
    assert {item.arm for item in cells} == arms and {item.family for item in cells} == {"grid"}
    assert {item.exploratory for item in cells} == {exploratory}
    assert {item.plain for item in cells} == {"adamw_sr"}


def test_formats_are_in_order_of_exponent_bits(tmp_path: Path) -> None:
    cells = build_cells(trials_of(tmp_path, Plan(["FP32", "E7M0", "BF16", "E0M7", "FP16", "E4M3"], ["adamw"], seeds=1)))
    assert [item.format for item in cells] == ["E0M7", "E4M3", "E7M0", "FP16", "BF16", "FP32"]


def test_the_reference_is_the_uniform_one_and_needs_a_finished_seed(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], policy="classic"))
    reference = find_reference(build_cells(trials_of(tmp_path, Plan(["BF16"], ["adamw"]))))
    assert reference is not None and reference.policy == "uniform"
    gone = trials_of(tmp_path / "stopped", Plan(["BF16", "E5M2"], ["adamw"], offset=lambda *_: stall()))
    assert find_reference(build_cells(gone)) is None


def test_lost_pruned_and_stopped_seeds_are_told_apart(tmp_path: Path) -> None:
    endings = {0: 0.0, 1: Outcome(OutcomeKind.OOM, 5), 2: Outcome(OutcomeKind.PRUNED, 50), 3: stall(), 4: None}
    own: Cell
    (own,) = build_cells(trials_of(tmp_path, Plan(["E5M2"], ["adamw"], 5, offset=lambda *place: endings[place[2]])))
    assert (sorted(own.losses), sorted(own.stops), own.missing, own.pruned) == ([0], [3], (1, 4), (2,))
    assert own.stops[3].step == 30 and set(own.starts) == {0, 3}
