"""What is compared with what: signs, pairs, ties, twins, stops, lost seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from planted import cell, cells_of, everywhere, noisy, planted

from altgrad.analysis.cells import Cell
from altgrad.analysis.contrasts import Contrast, against_reference, gains, interactions, measured
from altgrad.analysis.study import Study, study_of

ARMS = ["adamw", "adamw_sr", "manifold", "grid"]


def beyond(study: Study, format: str, arm: str, kind: str = "beyond BF16") -> Contrast:
    return next(item for item in study.beyond if (item.cell.format, item.cell.arm, item.kind) == (format, arm, kind))


def test_gains_are_over_the_plain_arm_of_the_same_residence_and_positive_where_better() -> None:
    found = planted(["BF16", "E4M3"], ARMS, {("E4M3", "manifold"): -0.1, ("E4M3", "adamw_sr"): 0.2}, 4).gains
    pairs = {(item.cell.format, item.cell.arm): item for item in found}
    assert {key: item.other.arm for key, item in pairs.items()} == {
        (name, arm): plain for name in ("BF16", "E4M3") for arm, plain in (("manifold", "adamw"), ("grid", "adamw_sr"))
    }
    assert pairs["E4M3", "manifold"].mean == pytest.approx(0.1, abs=0.01)
    assert pairs["E4M3", "grid"].mean == pytest.approx(0.2, abs=0.01), "against the arm that lives on the grid too"
    assert not gains(cells_of([("E4M3", "grid"), ("E4M3", "adamw")], noisy({}), 4)), "no plain arm of its residence"


def test_the_interaction_takes_away_what_the_arm_gains_anyway() -> None:
    found = planted(["BF16", "E4M3", "E5M2"], ARMS, {("BF16", "manifold"): -0.2, ("E4M3", "manifold"): -0.12}, 4)
    own, none = beyond(found, "E4M3", "manifold"), beyond(found, "E5M2", "manifold")
    assert own.mean == pytest.approx(-0.08, abs=0.01) and own.decided and own.high < 0
    assert none.mean == pytest.approx(-0.2, abs=0.01)
    assert not beyond(found, "E4M3", "grid").decided


def test_the_fp32_control_is_the_same_steps_over_weights_that_nothing_rounds() -> None:
    names = [*everywhere(["FP32", "BF16", "E4M3"], ["adamw", "manifold"]), ("E4M3", "manifold_fp32")]
    effects = {("E4M3", "manifold"): -0.12, ("E4M3", "manifold_fp32"): -0.11, ("FP32", "adamw"): -0.01}
    study = study_of(cells_of(names, noisy(effects), 4))
    assert beyond(study, "E4M3", "manifold", "beyond FP32").mean == pytest.approx(0.12 - 0.10, abs=0.01)
    assert beyond(study, "E4M3", "manifold").mean == pytest.approx(0.12, abs=0.01)
    gain = next(item for item in study.gains if item.cell.arm == "manifold_fp32")
    assert gain.other.format == "FP32" and gain.mean == pytest.approx(0.10, abs=0.01)
    assert not any(item.cell.arm == "manifold_fp32" for item in study.beyond)
    assert ("E4M3", "manifold_fp32", "uniform") not in study.verdicts, "it rounds nothing: it is no E4M3"
    full = [replace(own, policy="uniform_full") for own in study.cells if own.arm in ("adamw", "manifold")]
    rounded = [own for own in full if own.format == "E4M3"]
    spared = [replace(own, policy="attention_bf16") for own in rounded]
    found = {item.cell.policy for item in interactions([*study.cells, *rounded, *spared]) if item.kind == "beyond FP32"}
    assert found == {"uniform", "uniform_full"}, "float32 weights step by the spacings of the formats they would have"


def test_arms_of_one_parameter_are_compared_with_each_other() -> None:
    names = [(name, arm) for name in ("BF16", "E4M3") for arm in ("adamw_sr", "grid")]
    base = cells_of(names, noisy({}), 3)
    cells: list[Cell] = []
    for own in base:
        for clip in (1, 3) if own.family == "grid" else (None,):
            knobs: dict[str, Any] = {} if clip is None else {"rung_clip": clip}
            shifted = {seed: loss - 0.1 * (clip == 3) for seed, loss in own.losses.items()}
            label = own.arm + (f", rung_clip {clip}" if clip else "")
            cells.append(replace(own, arm=label, knobs=knobs, losses=shifted))
    found = {item.cell.arm: item for item in interactions(cells)}
    assert set(found) == {"grid, rung_clip 1", "grid, rung_clip 3"}
    assert [other.arm for other, _ in found["grid, rung_clip 3"].terms] == ["adamw_sr", "grid, rung_clip 3"] * 2


def test_differences_are_paired_by_seed_not_by_place() -> None:
    reference = cell({0: 2.0, 1: 9.0, 2: 2.7}, format="BF16")
    (item,) = measured(against_reference([cell({2: 3.0, 0: 2.1})], reference), {}, reference)
    assert item.differences == pytest.approx({0: 0.1, 2: 0.3}) and item.mean == pytest.approx(0.2)


def test_one_lost_seed_costs_itself_and_nothing_else() -> None:
    names = everywhere(["BF16", *(f"E{e}M{7 - e}" for e in range(2, 7))], ARMS)
    effects = {("E4M3", "manifold"): -0.03}
    whole = noisy(effects)
    lost = study_of(cells_of(names, lambda *at: None if at == ("E2M5", "grid", 1) else whole(*at), 6))
    assert beyond(lost, "E4M3", "manifold").decided
    assert beyond(lost, "E2M5", "grid").n == 5 and not math.isnan(beyond(lost, "E4M3", "manifold").p_free)
    without = study_of(cells_of(names, lambda *at: None if at == ("BF16", "adamw", 1) else whole(*at), 6))
    assert {item.n for item in without.beyond if item.cell.arm == "manifold"} == {5}
    assert {item.n for item in without.beyond if item.cell.arm == "grid"} == {6}


def test_float_noise_is_a_tie_and_a_tie_takes_no_power_away() -> None:
    """Two formats that are one number: a variance at rounding error would let no other difference be found."""
    formats = ["BF16", "E2M5", "E3M4", "E4M3", "E5M2"]
    effects = {("E4M3", "manifold"): -0.05}
    base = noisy(effects)

    def tied(name: str, arm: str, seed: int) -> float:
        value = base("BF16", "adamw", seed) if name in ("E2M5", "BF16") else base(name, arm, seed)
        assert isinstance(value, float)
        return value + (1e-7 if (name, seed % 2) == ("E2M5", 0) else 0.0)

    study = study_of(cells_of(everywhere(formats, ["adamw", "manifold"]), tied, 4))
    assert beyond(study, "E2M5", "manifold").status == "identical" and not beyond(study, "E2M5", "manifold").decided
    own, plain = beyond(study, "E4M3", "manifold"), planted(formats, ["adamw", "manifold"], effects, 4)
    assert own.decided and own.spread > 1e-3
    assert beyond(plain, "E4M3", "manifold").decided


def test_one_grid_under_two_names_counts_once() -> None:
    formats = ["BF16", "E0M7", "E1M6", "E4M3"]
    base = noisy({("E0M7", "manifold"): -0.1})
    same = study_of(
        cells_of(
            everywhere(formats, ["adamw", "manifold"]),
            lambda name, arm, seed: base("E0M7" if name == "E1M6" else name, arm, seed),
            4,
        )
    )
    alone = study_of(cells_of(everywhere([f for f in formats if f != "E1M6"], ["adamw", "manifold"]), base, 4))
    assert beyond(same, "E0M7", "manifold").half == beyond(same, "E1M6", "manifold").half
    assert beyond(same, "E0M7", "manifold").half == pytest.approx(beyond(alone, "E0M7", "manifold").half)
    assert [[item.cell.format for item in group] for group in same.best] == [["E0M7", "E1M6"]]


def test_stops_are_compared_by_their_own_test_and_never_averaged() -> None:
    effects: dict[tuple[str, str], float | str] = {("E7M0", "adamw"): "stop", ("E7M0", "manifold"): 0.1}
    found = {
        item.cell.format: item for item in planted(["BF16", "E4M3", "E7M0"], ["adamw", "manifold"], effects, 6).gains
    }
    assert found["E7M0"].status == "stopped" and math.isnan(found["E7M0"].mean)
    # The half of the error is for the intervals.
    assert found["E7M0"].p_stop == pytest.approx(4 / math.comb(12, 6)) and found["E7M0"].decided
    few = planted(["BF16", "E4M3", "E7M0"], ["adamw", "manifold"], effects, 3).gains
    assert not any(item.decided for item in few if item.cell.format == "E7M0"), "three of three against none: p .2"


def test_two_seeds_decide_no_small_difference() -> None:
    small = planted(["BF16", "E4M3", "E5M2"], ARMS, {("E4M3", "manifold"): -0.02}, 2)
    assert not any(item.decided for item in small.beyond)


def test_nothing_is_decided_by_a_reference_that_did_not_learn() -> None:
    study = planted(["BF16", "E5M2"], ["adamw", "manifold"], {("E5M2", "manifold"): -0.5}, 8)
    blown = [
        replace(own, losses=dict.fromkeys(own.losses, 1e11)) if own.format == "BF16" else own for own in study.cells
    ]
    unsound = study_of(blown)
    assert not unsound.is_sound and not unsound.verdicts and not unsound.best
    assert not any(item.decided for item in (*unsound.gains, *unsound.beyond, *unsound.against_reference.values()))


def test_from_ten_seeds_on_both_tests_have_to_agree() -> None:
    found = beyond(
        planted(["BF16", "E4M3"], ["adamw", "manifold"], {("E4M3", "manifold"): -0.05}, 10), "E4M3", "manifold"
    )
    assert found.decided and found.p_free <= 0.05
    assert not replace(found, p_free=0.2).decided and replace(found, p_free=0.2).disagrees


def test_what_shares_no_learning_rate_is_never_decided() -> None:
    study = planted(["BF16", "E4M3"], ["adamw", "manifold"], {("E4M3", "manifold"): -0.5}, 6)
    loose = study_of([replace(own, exploratory=own.arm == "manifold") for own in study.cells])
    item = beyond(loose, "E4M3", "manifold")
    assert item.status == "exploratory" and item.mean == pytest.approx(0.5, abs=0.01) and not item.decided


@pytest.mark.parametrize(("limit", "equal"), [(0.02, True), (0.001, False)])
def test_equal_is_an_interval_within_the_limit(limit: float, equal: bool) -> None:
    study = planted(["BF16", "E4M3", "E5M2"], ["adamw", "manifold"], {}, 6, equal_within=limit)
    item = beyond(study, "E4M3", "manifold")
    assert item.within(study.equal_limit(item)) is equal


def test_the_limit_is_a_quarter_of_the_gain_in_bf16() -> None:
    effects: dict[tuple[str, str], float | str] = {(name, "manifold"): -0.2 for name in ("BF16", "E4M3", "E5M2")}
    study = planted(["BF16", "E4M3", "E5M2"], ["adamw", "manifold"], effects, 4)
    item = beyond(study, "E4M3", "manifold")
    assert study.equal_limit(item) == pytest.approx(0.05, abs=0.003) and item.within(study.equal_limit(item))
