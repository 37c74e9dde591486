"""Verdicts, choices and comparisons of cells on ledgers whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats
from synthetic import Plan, explode, stall, write_ledger

from altgrad.analysis.cells import Cell, Study, build_study, compare, judge
from altgrad.analysis.load import load


def cell(
    losses: dict[int, float], stops: tuple[int, ...] = (), missing: tuple[int, ...] = (), **changes: object
) -> Cell:
    fields = {
        "format": "E5M2",
        "arm": "adamw",
        "policy": "uniform",
        "lr": 1e-3,
        "rung_clip": math.nan,
        "geometry": False,
        "outcomes": {},
        "signals": {},
    } | changes
    fields.setdefault("starts", dict.fromkeys(losses, 5.5))
    return Cell(losses=losses, stops=dict.fromkeys(stops, ("flip_yield", "lm_head")), missing=missing, **fields)  # type: ignore[arg-type]


def study_of(tmp_path: Path, plan: Plan) -> Study:
    return build_study(load(write_ledger(tmp_path, plan)).trials)


BF16 = cell({0: 2.0, 1: 2.02}, format="BF16")


@pytest.mark.parametrize(
    ("own", "verdict", "decided"),
    [
        (cell({0: 2.05, 1: 2.06}), "trains", True),
        (cell({0: 1.90, 1: 1.91}), "trains", True),
        (cell({0: 2.05}), "trains", False),  # one seed
        (cell({0: 2.05, 1: 2.06}, missing=(2,)), "trains", False),  # a seed is still to come
        (cell({0: 2.00, 1: 2.21}), "trains", False),  # a third seed could well be outside
        (cell({0: 2.60, 1: 2.61}), "fails", True),
        (cell({0: 2.60}), "fails", False),
        (cell({}, stops=(0, 1)), "fails", True),
        (cell({}, stops=(0,)), "fails", False),
        (cell({1: 2.6}, stops=(0,)), "fails", True),  # stopped or outside, in every seed
        (cell({1: 2.05}, stops=(0,)), "unclear", False),
        (cell({0: 2.05, 1: 2.60}), "unclear", False),
        (cell({}, missing=(0, 1)), "no result", False),
    ],
)
def test_verdicts(own: Cell, verdict: str, decided: bool) -> None:
    judged = judge(own, BF16)
    assert (judged.verdict, judged.decided) == (verdict, decided)


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


def test_a_format_that_did_not_learn_never_trains() -> None:
    reference = cell({0: 4.95, 1: 4.96}, format="BF16")
    assert judge(cell({0: 5.30, 1: 5.31}), reference).verdict == "fails", "within 10 %, yet where it began"
    assert judge(cell({0: 4.90, 1: 5.31}), reference).verdict == "unclear"
    assert judge(cell({0: 4.90, 1: 4.91}), reference).verdict == "trains"


def test_finishing_without_learning_rescues_nothing() -> None:
    stopped, blown = cell({}, stops=(0, 1)), cell({0: 1e11, 1: 2e11}, arm="manifold")
    assert (compare(blown, stopped).kind, compare(stopped, blown).kind) == ("stopped", "stopped")
    healthy = cell({0: 2.0, 1: 2.1}, arm="manifold")
    assert (compare(healthy, stopped).kind, compare(stopped, healthy).kind) == ("rescued", "lost")


def test_a_failure_that_overlaps_the_reference_is_not_decided() -> None:
    noisy = cell({0: 2.0, 1: 2.6}, format="BF16")
    judged = judge(cell({0: 2.25, 1: 2.9}), noisy)
    assert (judged.verdict, judged.decided) == ("fails", False)


def test_differences_are_paired_by_seed_not_by_place() -> None:
    item = compare(cell({2: 3.0, 0: 2.1}), cell({0: 2.0, 1: 9.0, 2: 2.7}))
    assert item.differences == pytest.approx({0: 0.1, 2: 0.3})
    assert item.paired is not None and item.paired.mean == pytest.approx(0.2)


def test_a_stopped_seed_leaves_no_mean_and_no_difference() -> None:
    own = cell({0: 2.0}, stops=(1,))
    assert math.isnan(own.mean) and compare(own, BF16).paired is None
    assert own.rank > cell({0: 99.0, 1: 99.0}).rank


def test_interval_of_a_difference_equals_scipys_paired_t(tmp_path: Path) -> None:
    offsets = np.random.default_rng(5).normal(0.05, 0.02, 5)
    study = study_of(
        tmp_path,
        Plan(
            ["BF16", "E5M2"], ["adamw"], seeds=5, offset=lambda name, _, seed: offsets[seed] if name == "E5M2" else 0.0
        ),
    )
    item = study.comparison(study.cells[0])
    assert item is not None and item.paired is not None
    oracle = scipy_stats.ttest_rel(list(item.cell.losses.values()), list(item.other.losses.values()))
    assert (item.paired.low, item.paired.high) == pytest.approx(tuple(oracle.confidence_interval(0.95)))


def test_the_best_learning_rate_stands_for_its_cell(tmp_path: Path) -> None:
    plan = Plan(["BF16"], ["adamw"], lrs=(1e-3, 3e-3, 1e-2))
    ledger = write_ledger(tmp_path, plan)
    trials = load(ledger).trials
    trials["val_loss"] += trials["lr"].map({1e-3: 0.2, 3e-3: 0.0, 1e-2: 0.1})
    assert build_study(trials).cells[0].lr == 3e-3
    stopped = (trials["lr"] == 3e-3) & (trials["seed"] == 1)
    trials.loc[stopped, "state"] = "failed"
    assert build_study(trials).cells[0].lr == 1e-2, "survivors must not win over unstopped seeds"
    assert build_study(trials).cells[0].choices == 3


def test_geometry_rescues_and_losses_are_told_from_measured_gains(tmp_path: Path) -> None:
    def offset(name: str, arm: str, seed: int):
        if name == "E7M0":
            return stall() if arm == "adamw" else 0.1
        if name == "E0M7" and arm == "grid":
            return explode()
        return -0.05 if arm == "manifold" else 0.0

    study = study_of(tmp_path, Plan(["BF16", "E0M7", "E7M0"], ["adamw", "manifold", "grid"], offset=offset))
    kinds = {(item.cell.format, item.cell.arm): (item.kind, item.decided) for item in study.geometry}
    assert kinds["E7M0", "manifold"] == ("rescued", True)
    assert kinds["E0M7", "grid"] == ("lost", True)
    assert kinds["E0M7", "manifold"] == ("measured", False), "two seeds decide no measured difference"
    assert ("E0M7", "adamw") not in kinds


def test_arms_on_the_grid_are_also_compared_with_the_plain_arm_on_the_grid(tmp_path: Path) -> None:
    study = study_of(tmp_path, Plan(["E4M3"], ["adamw", "adamw_sr", "manifold", "manifold_sr", "grid"]))
    pairs = {(item.cell.arm, item.other.arm) for item in study.geometry}
    assert pairs == {
        ("manifold", "adamw"),
        ("manifold_sr", "adamw"),
        ("manifold_sr", "adamw_sr"),
        ("grid", "adamw"),
        ("grid", "adamw_sr"),
    }


def test_formats_are_in_order_of_exponent_bits(tmp_path: Path) -> None:
    study = study_of(tmp_path, Plan(["FP32", "E7M0", "BF16", "E0M7", "FP16", "E4M3"], ["adamw"], seeds=1))
    assert [item.format for item in study.cells] == ["E0M7", "E4M3", "E7M0", "FP16", "BF16", "FP32"]


def test_the_reference_is_the_uniform_one_and_needs_a_finished_seed(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], policy="classic"))
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"]))
    reference = build_study(load(tmp_path).trials).reference
    assert reference is not None and reference.policy == "uniform"
    gone = study_of(tmp_path / "stopped", Plan(["BF16", "E5M2"], ["adamw"], offset=lambda *_: stall()))
    assert gone.reference is None


def test_nothing_is_decided_by_a_reference_that_did_not_learn(tmp_path: Path) -> None:
    def offset(name: str, arm: str, seed: int) -> float:
        return 1e11 if (name, arm) == ("BF16", "adamw") else (-0.5 if arm == "manifold" else 0.0) + 0.001 * seed

    study = study_of(tmp_path, Plan(["BF16", "E5M2"], ["adamw", "manifold"], seeds=8, offset=offset))
    assert study.reference is not None and not study.is_sound and not study.judgements
    assert not any(item.decided for item in (*study.geometry, *study.against_reference.values()))
    assert min(item.p_adjusted for item in study.geometry) < 0.05, "it would be decided otherwise"
