"""Trains, fails or not decided, on cells whose truth is known."""

from __future__ import annotations

import pytest
from planted import cell, planted

from altgrad.analysis.cells import Cell
from altgrad.analysis.study import study_of
from altgrad.analysis.twins import twin_map
from altgrad.analysis.verdicts import open_stop_rate, survival

BF16 = cell({seed: 2.0 + 0.02 * seed for seed in range(4)}, format="BF16")


def seeds(*excesses: float) -> dict[int, float]:
    return {seed: (2.0 + 0.02 * seed) * (1 + value) for seed, value in enumerate(excesses)}


@pytest.mark.parametrize(
    ("own", "word"),
    [
        (cell(seeds(0.02, 0.021, 0.019, 0.022)), "trains"),
        (cell(seeds(-0.05, -0.06, -0.05, -0.055)), "trains"),
        (cell(seeds(0.02)), "open"),  # one seed
        (cell(seeds(0.0, 0.0, 0.0, 0.0)), "trains"),  # BF16 itself, under another name
        (cell(seeds(0.02, 0.05, 0.12, 0.03)), "open"),  # the interval reaches past the margin
        (cell(seeds(0.30, 0.31, 0.30, 0.305)), "fails"),
        (cell(seeds(0.11, 0.18, 0.12, 0.05)), "open"),
        (cell({}, stops=(0, 1, 2, 3)), "fails"),
        (cell({3: 2.6}, stops=(0, 1, 2)), "fails"),  # stopped or outside, in every seed
        (cell({1: 2.05, 2: 2.05, 3: 2.05}, stops=(0,)), "open"),  # a stop: it never trains
        (cell({}, missing=(0, 1, 2, 3)), "no result"),
        (cell(seeds(0.02, 0.021), pruned=(2, 3)), "no result"),
        (cell(seeds(0.02, 0.021, 0.019, 0.022), exploratory=True), "open"),
        (cell(seeds(0.02, 0.021, 0.019, 0.022), starts=dict.fromkeys(range(4), 2.1)), "open"),  # has not learned
    ],
)
def test_verdicts(own: Cell, word: str) -> None:
    study = study_of([own, BF16])
    assert study.verdicts[own.key].word == word
    assert [item.word for item in study.formats] == [word]


def test_a_format_trains_by_one_arm_and_fails_by_all() -> None:
    arms = ["adamw", "adamw_sr", "manifold"]
    effects: dict[tuple[str, str], float | str] = {("E7M0", arm): 1.0 for arm in arms}
    effects |= {("E5M2", "adamw_sr"): 1.0, ("E5M2", "manifold"): "stop"}
    study = planted(["BF16", "E5M2", "E7M0"], arms, effects, 3)
    assert {item.formats: item.word for item in study.formats} == {("E5M2",): "trains", ("E7M0",): "fails"}
    assert study.formats[0].best.cell.arm == "adamw"
    effects["E7M0", "adamw_sr"] = 0.24  # at the margin itself
    mixed = planted(["BF16", "E5M2", "E7M0"], arms, effects, 3, spread=0.03)
    assert {item.formats: item.word for item in mixed.formats} == {("E5M2",): "trains", ("E7M0",): "open"}


def test_a_format_with_an_arm_without_result_cannot_be_said_to_fail() -> None:
    lost = [cell(seeds(1.0, 1.0, 1.01, 1.0)), cell({}, arm="manifold", missing=(0, 1, 2, 3)), BF16]
    assert [item.word for item in study_of(lost).formats] == ["open"]


def test_a_reference_that_lost_a_seed_costs_that_seed_only() -> None:
    short = cell({0: 2.0, 1: 2.02, 2: 2.04}, format="BF16", missing=(3,))
    verdict = study_of([cell(seeds(0.02, 0.021, 0.019, 0.5)), short]).verdicts["E5M2", "adamw", "uniform"]
    assert verdict.word == "trains" and verdict.excess == pytest.approx(0.02, abs=0.001)
    stopped = cell({0: 2.0, 1: 2.02, 2: 2.04}, stops=(3,), format="BF16")
    assert study_of([cell(seeds(0.02, 0.021, 0.019, 0.02)), stopped]).formats[0].word == "trains"


@pytest.mark.parametrize(("margin", "word"), [(0.05, "fails"), (0.10, "trains"), (0.071, "open")])
def test_the_margin_can_be_asked_for(margin: float, word: str) -> None:
    study = study_of([cell(seeds(0.07, 0.072, 0.068, 0.07)), BF16], margin=margin)
    assert study.formats[0].word == word


def test_formats_that_are_one_grid_get_one_verdict() -> None:
    both = [cell(seeds(0.30, 0.31, 0.30, 0.305), format=name) for name in ("E0M7", "E1M6")]
    (item,) = study_of([*both, BF16]).formats
    assert item.formats == ("E0M7", "E1M6") and item.word == "fails"
    other = cell(seeds(0.30, 0.31, 0.30, 0.306), format="E1M6")
    assert twin_map([both[0], other]) == {"E0M7": "E0M7", "E1M6": "E1M6"}


def test_open_verdicts_say_how_many_seeds_more() -> None:
    study = planted(
        ["BF16", "E4M3"], ["adamw", "manifold"], {("E4M3", "adamw"): 0.2, ("E4M3", "manifold"): 0.2}, 3, spread=0.03
    )
    needed = study.formats[0].best.seeds_needed
    assert study.formats[0].word == "open" and needed is not None and 1 <= needed <= 40


def test_survival_and_the_stop_rate_that_clean_seeds_leave_open() -> None:
    low, high = survival(cell({0: 2.0, 1: 2.0, 2: 2.0}, stops=(3, 4, 5)))
    assert (low, high) == pytest.approx((0.118, 0.882), abs=0.001)
    assert [open_stop_rate(n) for n in (2, 3, 6, 10)] == pytest.approx([0.78, 0.63, 0.39, 0.26], abs=0.005)
