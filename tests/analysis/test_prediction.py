"""What is predicted of formats from a reference run, and how right it is said to have been."""

from __future__ import annotations

import pandas as pd
import pytest
from planted import BASE, cell

from altgrad.analysis.prediction import accuracy_texts, judged, planned, predict, prediction_table, prospects_of
from altgrad.analysis.study import study_of
from altgrad.quantization import named_policy
from altgrad.training import ARMS, TrainConfig

GOOD = {"weight_sqnr": 30.0, "activation_sqnr": 30.0, "gradient_sqnr": 30.0, "flip_yield": 0.9, "flip_rate": 0.3}
GOOD |= {f"{role}_underflow": 0.0 for role in ("weight", "activation", "gradient")}


def prospects(**changes: dict[str, float]) -> dict[str, dict[str, float]]:
    return {name: GOOD | changes.get(name, {}) for name in ("E3M4", "E4M3", "E5M2", "E7M0")}


CASES = (
    ("E5M2", "uniform", "adamw", {}, "trains", ""),
    ("E5M2", "uniform", "adamw", {"E5M2": {"weight_sqnr": 8.0}}, "fails", "weight_sqnr"),
    ("E5M2", "uniform", "adamw", {"E5M2": {"gradient_sqnr": 8.0, "flip_rate": 0.1}}, "trains", ""),
    ("E5M2", "uniform_full", "adamw", {"E5M2": {"gradient_underflow": 0.99}}, "fails", "gradient_underflow"),
    ("E4M3", "uniform_full", "adamw", {"E4M3": {"gradient_underflow": 0.99}}, "trains", ""),
    ("E4M3", "uniform_full", "adamw", {"E5M2": {"gradient_underflow": 0.99}}, "fails", "gradient_underflow"),
    ("E5M2", "uniform", "adamw_nearest", {"E5M2": {"flip_rate": 0.1}}, "fails", "flip_rate"),
    ("E5M2", "uniform", "adamw_sr", {"E5M2": {"flip_rate": 0.1}}, "trains", ""),
)


@pytest.mark.parametrize(
    ("name", "policy", "arm", "changes", "word", "signal"),
    CASES,
    ids=[f"{name}-{policy}-{arm}-{place}" for place, (name, policy, arm, *_) in enumerate(CASES)],
)
def test_a_limit_counts_for_the_roles_that_are_rounded(name, policy, arm, changes, word, signal) -> None:
    found = predict(prospects(**changes), name, named_policy(policy, name), ARMS[arm])
    assert found is not None and found.word == word
    assert signal in ("", found.signal)


def test_nothing_is_said_of_what_was_not_looked_at() -> None:
    assert predict({}, "E5M2", named_policy("uniform", "E5M2"), ARMS["adamw"]) is None
    assert predict(prospects(), "BF16", named_policy("uniform", "BF16"), ARMS["adamw"]) is None
    assert predict(prospects(), "E4M3", named_policy("mxfp8", "E4M3"), ARMS["adamw"]) is None, "scales of blocks"


def test_the_last_look_counts() -> None:
    rows = [(step, "a", f"weight_sqnr@{name}", value) for step, value in ((10, 5.0), (20, 30.0)) for name in ("E5M2",)]
    rows += [(20, "b", "weight_sqnr@E5M2", 20.0), (20, "b", "weight_binade@3", 0.5), (20, "b", "weight_sqnr", 1.0)]
    assert prospects_of(pd.DataFrame(rows, columns=["step", "layer", "signal", "value"])) == {
        "E5M2": {"weight_sqnr": 25}
    }


def test_the_report_counts_what_was_right() -> None:
    """E7M0 fails as predicted, E3M4 trains against the prediction; the order is that of the scores but for it."""
    good = {seed: BASE + 0.001 * seed for seed in range(6)}
    cells = [cell(good, format="BF16")]
    ends = {"E3M4": 0.0, "E4M3": 0.01, "E5M2": 0.02, "E7M0": 2.0}
    cells += [cell({seed: loss + ends[name] for seed, loss in good.items()}, format=name) for name in ends]
    study = study_of(cells)
    found = judged(
        study,
        prospects(
            E3M4={"weight_sqnr": 9.0}, E4M3={"weight_sqnr": 25.0}, E5M2={"weight_sqnr": 20.0}, E7M0={"weight_sqnr": 5.0}
        ),
    )
    assert [item.prediction.word for item in found] == ["fails", "trains", "trains", "fails"]
    texts = accuracy_texts(study, found)
    assert texts[0] == "Right in 3 of 4 decided cells; of 1 that fail 1 were predicted to, and 3 train."
    assert "adamw under uniform +0.400 of 4 formats" in texts[1]
    table = prediction_table(study, found)
    assert [line[-1] for line in table.lines] == ["no", "yes", "yes", "yes"]


def test_a_plan_names_what_is_expected_to_fail() -> None:
    trials = [
        TrainConfig(format=name, optimizer=ARMS[arm]) for name in ("BF16", "E5M2") for arm in ("adamw", "adamw_nearest")
    ]
    lines = planned(prospects(E5M2={"flip_rate": 0.1}), trials)
    assert lines == ["predicted to fail, adamw_nearest under uniform: E5M2 (flip_rate 0.1)"]
    assert planned(prospects(), trials) == ["no format is predicted to fail"]
    assert planned(prospects(), trials[:2]) == []
