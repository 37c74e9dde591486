"""The three answers of sweeps whose truth is known; above all, what they must not claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planted import BASE
from synthetic import Plan, explode, stall, write_ledger

from altgrad.analysis.finding import Finding, find
from altgrad.analysis.records import load, unevaluated
from altgrad.analysis.study import build_study

GEOMETRY = ["adamw", "manifold"]


def finding_of(tmp_path: Path, plan: Plan, **options: float) -> Finding:
    trials = load(write_ledger(tmp_path, plan)).trials
    results = int((trials["state"] != "unresolved").sum())
    scope = str(trials["scope"].iloc[0])
    return find(build_study(trials, **options), results, len(trials), unevaluated=unevaluated(trials), scope=scope)


def offsets(table: dict[tuple[str, str], object], spread: float = 0.002) -> Callable[..., object]:
    """Offsets by (format, arm) with a little noise by seed and cell."""

    def offset(name: str, arm: str, seed: int) -> object:
        value = table.get((name, arm), 0.0)
        noise = np.random.default_rng([seed, *map(ord, name + arm)]).normal(0, spread)
        return value + noise if isinstance(value, float) else value

    return offset


def test_the_first_answer_states_its_scope_and_margin(tmp_path: Path) -> None:
    table = {("E7M0", "adamw"): 1.0, ("E7M0", "manifold"): 1.2}
    trains, _, fails = finding_of(
        tmp_path, Plan(["BF16", "E4M3", "E5M2", "E7M0"], GEOMETRY, seeds=3, offset=offsets(table))
    ).answers
    assert trains.question == "Which 8-bit formats train?"
    assert trains.text.startswith(
        "Within 10 % of BF16 AdamW's loss (2.430 nats; lm on pydoc, GPT 2 × 64, 100 steps of 8 × 128 tokens; 3 seeds): "
        "E4M3 and E5M2 train (decided), most safely E"
    )
    assert (
        "3 clean seeds of an arm leave it a stop rate of up to 63 %. E7M0 fails in every arm (decided)." in trains.text
    )
    assert fails.text.startswith("E7M0: adamw and manifold end +41 % to +49 % from BF16")


def test_no_difference_says_what_the_seeds_can_show_and_what_is_equal(tmp_path: Path) -> None:
    plan = Plan(["BF16", "E4M3", "E5M2"], GEOMETRY, seeds=4, offset=offsets({}))
    text = finding_of(tmp_path, plan, equal_within=0.05).answers[1].text
    assert "Neither of the 2 format–arm pairs is decided to gain more" in text
    assert "Equal to BF16's gain within 0.05 nats: E4M3 manifold and E5M2 manifold." in text
    assert "4 seeds can show differences from BF16's gain of about 0.0" in text and "(power 80 %)" in text


def test_stops_are_told_with_when_and_how_many_finish(tmp_path: Path) -> None:
    table = {("E7M0", "adamw"): stall(), ("E7M0", "manifold"): explode(), ("E5M2", "adamw"): stall()}
    found = finding_of(tmp_path, Plan(["BF16", "E5M2", "E7M0"], GEOMETRY, 3, offset=offsets(table)))
    why = found.answers[2].text
    assert (
        "E7M0: adamw stopped in 3 of 3 seeds by flip_yield in lm_head (step 30, median 30; 0 % to 71 % of runs finish)"
        in why
    )
    assert "manifold stopped in 3 of 3 seeds by train_loss (step 12" in why
    assert "adamw fails in E5M2 (stopped in 3 of 3 seeds by flip_yield" in why


@pytest.mark.parametrize(
    ("formats", "arms", "said"),
    [
        (["BF16", "E5M2"], ["adamw"], "no geometry-aware arm was run in an 8-bit format"),
        (["BF16", "E5M2"], ["adamw", "grid"], "E5M2 grid (its plain arm, adamw_sr, was not run: any other lives else"),
    ],
)
def test_what_is_lacking_for_an_interaction_is_named(
    tmp_path: Path, formats: list[str], arms: list[str], said: str
) -> None:
    assert said in finding_of(tmp_path, Plan(formats, arms, 3)).answers[1].text


def test_without_the_arm_in_bf16_the_step_rule_is_not_known(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], 3))
    text = finding_of(tmp_path, Plan(["E5M2"], GEOMETRY, 3)).answers[1].text
    assert text == (
        "Not compared: E5M2 manifold (the arm was not run in BF16, so the step rule's own gain is not known)."
    )


def test_of_many_reasons_four_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    names = ["E3M4", "E4M3", "E5M2", "E6M1", "E7M0"]
    stops = offsets({(name, "adamw"): stall() for name in names})
    text = finding_of(tmp_path, Plan(["BF16", *names], GEOMETRY, 3, offset=stops)).answers[1].text
    assert text.count("(stopped runs of ") == 4 and text.endswith("; 1 more pair for other reasons.")


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    found = finding_of(
        tmp_path, Plan(["BF16", "E5M2", "E7M0"], GEOMETRY, 1, offset=offsets({("E7M0", "adamw"): stall()}))
    )
    assert not any("(decided" in answer.text for answer in found.answers)
    assert "Not decided: E5M2 (1 seed)" in found.answers[0].text
    assert (
        "Not compared: E5M2 manifold (one seed); E7M0 manifold (stopped runs of E7M0 adamw)." in found.answers[1].text
    )


def test_grids_that_differ_are_said(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], 3, lrs=(3e-3,)))
    found = finding_of(tmp_path, Plan(["E5M2"], ["adamw"], 3, lrs=(1e-3, 3e-3)))
    assert "compared over the rates that all have (0.003): adamw ran 2." in str(found)


def test_a_reference_that_lost_a_seed_is_said(tmp_path: Path) -> None:
    plan = Plan(
        ["BF16", "E5M2"], ["adamw"], 4, offset=lambda name, _, seed: None if (name, seed) == ("BF16", 2) else 0.0
    )
    found = finding_of(tmp_path, plan)
    assert "BF16 AdamW has no loss at seed 2: nothing is compared there." in str(found)
    assert "E5M2 trains (decided)" in found.answers[0].text


def test_everything_stopped(tmp_path: Path) -> None:
    plan = Plan(["BF16", "E5M2", "E4M3"], ["adamw"], 3, offset=lambda name, *_: 0.0 if name == "BF16" else explode())
    assert "E4M3 and E5M2 fail in every arm (decided)." in finding_of(tmp_path, plan).answers[0].text
    gone = finding_of(tmp_path / "all", Plan(["BF16", "E5M2"], ["adamw"], offset=lambda *_: explode()))
    assert "Stopped in every seed: E5M2 adamw." in gone.answers[0].text
    assert [answer.text for answer in gone.answers[1:]] == ["Not known: there is no measure of any format."] * 2


def test_without_a_reference_nothing_is_said_to_train(tmp_path: Path) -> None:
    text = finding_of(tmp_path, Plan(["E4M3", "E5M2"], ["adamw"])).answers[0].text
    assert text.startswith("Not known: no BF16 AdamW reference has finished") and "lowest loss is 2.415 nats" in text


def test_pending_trials_make_it_incomplete(tmp_path: Path) -> None:
    plan = Plan(["BF16", "E5M2"], ["adamw"], offset=lambda name, _, seed: None if (name, seed) == ("E5M2", 1) else 0.0)
    found = finding_of(tmp_path, plan)
    assert "Incomplete: 3 of 4 trials have a result." in found.notes and "E5M2 (1 seed)" in found.answers[0].text


@pytest.mark.parametrize("formats", [["BF16"], ["BF16", "FP32"], ["FP32"]])
def test_no_eight_bit_format(tmp_path: Path, formats: list[str]) -> None:
    found = finding_of(tmp_path, Plan(formats, ["adamw", "manifold"], 3))
    assert "trains" not in str(found).replace("Which 8-bit formats train", "")


def test_nothing_has_run_yet(tmp_path: Path) -> None:
    found = finding_of(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], offset=lambda *_: None))
    assert found.notes[0].startswith("Incomplete: 0 of 4 trials have a result.") and "decided" not in str(found)


def test_another_policy_is_named(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"]))
    found = finding_of(tmp_path, Plan(["E5M2"], ["adamw"], policy="classic"))
    assert "under policy classic" in found.answers[0].text


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [(5.5, 1.2e11, "ends at 1.2e+11 nats, first step 5.500"), (2.425, 2.4, "ends at 2.415 nats, first step 2.425")],
)
def test_a_reference_that_did_not_learn_says_nothing_of_any_format(
    tmp_path: Path, start: float, end: float, said: str
) -> None:
    plan = Plan(["BF16", "E5M2", "E4M3"], GEOMETRY, start=start, offset=lambda *_: end - BASE)
    assert finding_of(tmp_path, plan).answers[0].text == (
        f"Nothing can be said of any format: the reference, BF16 AdamW, did not learn ({said})."
    )


def test_one_seed_of_the_reference_that_did_not_learn_is_counted(tmp_path: Path) -> None:
    plan = Plan(["BF16", "E5M2"], ["adamw"], offset=lambda name, _, seed: 9.0 if (name, seed) == ("BF16", 1) else 0.0)
    assert "BF16 AdamW, did not learn in 1 of 2 seeds" in finding_of(tmp_path, plan).answers[0].text


def test_a_length_without_evaluations_is_named(tmp_path: Path) -> None:
    formats = ["BF16", "E5M2"]
    write_ledger(tmp_path, Plan(formats, ["adamw"], steps=40))
    found = finding_of(tmp_path, Plan(formats, ["adamw"], steps=20, offset=lambda *_: None))
    assert "4 trials were trained past the steps asked for without an evaluation there" in found.notes[1]
