"""The sentence against sweeps whose answer is known; above all, what it must not claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic import Plan, explode, stall, write_ledger

from altgrad.analysis.cells import build_study
from altgrad.analysis.finding import Finding, find
from altgrad.analysis.load import load, unevaluated


def finding_of(tmp_path: Path, plan: Plan) -> Finding:
    trials = load(write_ledger(tmp_path, plan)).trials
    results = int((trials["state"] != "unresolved").sum())
    return find(build_study(trials), results, len(trials), unevaluated(trials))


def offsets(table: dict[tuple[str, str], object]) -> Callable[..., object]:
    """Offsets by (format, arm); a little noise by seed and arm, none on the reference."""

    def offset(name: str, arm: str, seed: int) -> object:
        value = table.get((name, arm), 0.0)
        noise = np.random.default_rng([seed, *map(ord, arm)]).normal(0, 0.002)
        return value if not isinstance(value, float) or (name, arm) == ("BF16", "adamw") else value + noise

    return offset


def test_two_seeds_decide_gross_failures_and_nothing_closer(tmp_path: Path) -> None:
    table = {("E7M0", "adamw"): stall(), ("E7M0", "manifold"): explode(), ("E4M3", "manifold"): -0.03}
    plan = Plan(["BF16", "E4M3", "E5M2", "E7M0"], ["adamw", "manifold"], offset=offsets(table))
    found = finding_of(tmp_path, plan)
    assert found.headline.startswith(
        "E4M3 and E5M2 train within 10% of BF16's loss (2.415 nats); best measured is E4M3 with manifold"
    )
    assert "E7M0 fails in every arm (stopped by" in found.headline
    assert "Decided (2 seeds): E4M3 and E5M2 train and E7M0 fails." in found.certainty
    assert "Whether geometry changes the loss in E4M3 is not decided" in found.certainty
    assert "Close pairs are not decided (2 seeds: p cannot go below 0.5)." in found.certainty


def test_six_seeds_decide_a_clear_gain_and_say_where_it_is(tmp_path: Path) -> None:
    table = {("E4M3", "manifold"): -0.2, ("E5M2", "manifold"): -0.01}
    plan = Plan(["BF16", "E4M3", "E5M2"], ["adamw", "manifold"], seeds=6, offset=offsets(table))
    found = finding_of(tmp_path, plan)
    assert "The largest gain of geometry-aware steps over AdamW is E4M3 with manifold: −0.2" in found.headline
    assert "The difference that geometry makes in E4M3 is decided." in found.certainty
    assert "p cannot" not in found.certainty


def test_a_rival_as_good_leaves_the_largest_gain_open(tmp_path: Path) -> None:
    def offset(name: str, arm: str, seed: int) -> float:
        noise = np.random.default_rng([seed, *map(ord, name + arm)]).normal(0, 0.004)
        return (-0.1 if arm == "manifold" and name != "BF16" else 0.0) + noise

    plan = Plan(["BF16", "E4M3", "E5M2"], ["adamw", "manifold"], seeds=6, offset=offset)
    found = finding_of(tmp_path, plan)
    assert "is decided; that no other format gains as much is not." in found.certainty


def test_one_grid_under_two_names_shares_the_gain(tmp_path: Path) -> None:
    table = {("E0M7", "manifold"): -0.1, ("E1M6", "manifold"): -0.1, ("E5M2", "manifold"): -0.02}
    plan = Plan(["BF16", "E0M7", "E1M6", "E5M2"], ["adamw", "manifold"], 6, offset=offsets(table))
    found = finding_of(tmp_path, plan)
    assert "E0M7 and E1M6 with manifold" in found.headline
    assert "The difference that geometry makes in E0M7 and E1M6 is decided." in found.certainty


def test_a_rescue_is_the_largest_gain(tmp_path: Path) -> None:
    table = {("E7M0", "adamw"): stall(), ("E4M3", "manifold"): -0.5}
    found = finding_of(tmp_path, Plan(["BF16", "E4M3", "E7M0"], ["adamw", "manifold"], offset=offsets(table)))
    assert "gain most in E7M0, where AdamW is stopped by flip_yield in lm_head and manifold finishes" in found.headline


def test_no_gain_is_said(tmp_path: Path) -> None:
    table = {("E4M3", "manifold"): 0.05, ("E5M2", "manifold"): 0.06}
    found = finding_of(tmp_path, Plan(["BF16", "E4M3", "E5M2"], ["adamw", "manifold"], offset=offsets(table)))
    assert "Geometry-aware steps gain nothing over AdamW in any 8-bit format" in found.headline


def test_a_failing_arm_of_a_format_that_trains_is_named_with_its_reason(tmp_path: Path) -> None:
    table = {("E5M2", "adamw_nearest"): stall(), ("E4M3", "adamw_nearest"): 1.0}
    plan = Plan(["BF16", "E4M3", "E5M2"], ["adamw", "adamw_nearest"], offset=offsets(table))
    found = finding_of(tmp_path, plan)
    assert "adamw_nearest fails in E4M3 (ends 42% above BF16) and E5M2 (stopped by flip_yield" in found.headline


def test_without_a_reference_nothing_is_decided(tmp_path: Path) -> None:
    found = finding_of(tmp_path, Plan(["E4M3", "E5M2"], ["adamw"]))
    assert "No BF16 AdamW reference has finished" in found.headline
    assert "Nothing is decided" in found.certainty


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    table = {("E7M0", "adamw"): stall()}
    found = finding_of(tmp_path, Plan(["BF16", "E5M2", "E7M0"], ["adamw"], seeds=1, offset=offsets(table)))
    assert "Decided (" not in found.certainty.replace("Not decided (", "")
    assert "Not decided (1 seed): whether E5M2 and E7M0 train." in found.certainty


def test_one_format(tmp_path: Path) -> None:
    found = finding_of(tmp_path, Plan(["BF16", "E5M2"], ["adamw"]))
    assert found.headline.startswith("E5M2 trains within 10% of BF16's loss (2.415 nats); best measured with adamw")


def test_everything_failed(tmp_path: Path) -> None:
    plan = Plan(["BF16", "E5M2", "E4M3"], ["adamw"], offset=lambda name, *_: 0.0 if name == "BF16" else explode())
    found = finding_of(tmp_path, plan)
    assert found.headline.startswith("None of the two 8-bit formats trains within 10%")
    assert "Decided (2 seeds): E4M3 and E5M2 fail." in found.certainty
    gone = finding_of(tmp_path / "all", Plan(["BF16", "E5M2"], ["adamw"], offset=lambda *_: explode()))
    assert "Stopped in every seed: E5M2 adamw." in gone.headline and "Nothing is decided" in gone.certainty


def test_pending_trials_make_it_incomplete(tmp_path: Path) -> None:
    plan = Plan(["BF16", "E5M2"], ["adamw"], offset=lambda name, _, seed: None if (name, seed) == ("E5M2", 1) else 0.0)
    found = finding_of(tmp_path, plan)
    assert found.certainty.startswith("Incomplete: 3 of 4 trials have a result.")
    assert "Decided (" not in found.certainty.replace("Not decided (", "")


@pytest.mark.parametrize("formats", [["BF16"], ["BF16", "FP32"], ["FP32"]])
def test_no_eight_bit_format(tmp_path: Path, formats: list[str]) -> None:
    found = finding_of(tmp_path, Plan(formats, ["adamw", "manifold"]))
    assert "No " in found.headline and "trains within" not in found.headline


def test_nothing_has_run_yet(tmp_path: Path) -> None:
    found = finding_of(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], offset=lambda *_: None))
    assert found.certainty.startswith("Incomplete: 0 of 4 trials have a result. Nothing is decided")


def test_another_policy_is_named(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"]))
    found = finding_of(tmp_path, Plan(["E5M2"], ["adamw"], policy="classic"))
    assert found.headline.startswith("Under policy classic: E5M2 trains")


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [(5.5, 1.2e11, "ends at 1.2e+11 nats, first step 5.500"), (2.425, 2.4, "ends at 2.415 nats, first step 2.425")],
)
def test_a_reference_that_did_not_learn_says_nothing_of_any_format(
    tmp_path: Path, start: float, end: float, said: str
) -> None:
    plan = Plan(["BF16", "E5M2", "E4M3"], ["adamw", "manifold"], start=start, offset=lambda *_: end - 2.4)
    found = finding_of(tmp_path, plan)
    assert found.headline == (
        f"The reference, BF16 AdamW, did not learn ({said}), so nothing can be said of any format."
    )
    assert found.certainty == (
        "Nothing is decided: without a reference that learned there is no measure of any format."
    )


def test_one_seed_of_the_reference_that_did_not_learn_is_counted(tmp_path: Path) -> None:
    plan = Plan(["BF16", "E5M2"], ["adamw"], offset=lambda name, _, seed: 9.0 if (name, seed) == ("BF16", 1) else 0.0)
    assert "BF16 AdamW, did not learn in 1 of 2 seeds" in finding_of(tmp_path, plan).headline


def test_a_format_that_did_not_learn_is_said_to_fail_so(tmp_path: Path) -> None:
    plan = Plan(["BF16", "E5M2"], ["adamw"], start=2.92, offset=lambda name, *_: 0.23 if name == "E5M2" else 0.0)
    found = finding_of(tmp_path, plan)
    assert "E5M2 fails (adamw, its best arm, did not learn: ends at 2.645 nats, first step 2.920)." in found.headline
    assert "Decided (2 seeds): E5M2 fails." in found.certainty


@pytest.mark.parametrize(
    ("formats", "headline"),
    [
        (["FP32"], "No 8-bit format and no BF16 AdamW reference was run; FP32 with adamw ends at 2.475 nats."),
        (["BF16"], "No 8-bit format was run; BF16 ends at 2.475 nats."),
        (["BF16", "FP32"], "No 8-bit format was run; BF16 ends at 2.475 nats, FP32 at 2.475."),
    ],
)
def test_a_finished_run_of_references_alone_is_not_called_unfinished(
    tmp_path: Path, formats: list[str], headline: str
) -> None:
    found = finding_of(tmp_path, Plan(formats, ["adamw"], seeds=6))
    assert found.headline == headline
    assert found.certainty == (
        "All trials have a result, but there was nothing to decide: that takes an 8-bit format beside BF16."
    )


def test_a_length_without_evaluations_is_named(tmp_path: Path) -> None:
    formats = ["BF16", "E5M2"]
    write_ledger(tmp_path, Plan(formats, ["adamw"], steps=40))
    found = finding_of(tmp_path, Plan(formats, ["adamw"], steps=20, offset=lambda *_: None))
    assert found.certainty.startswith(
        "Incomplete: 0 of 4 trials have a result. 4 trials were trained past the "
        "steps asked for without an evaluation there"
    )
