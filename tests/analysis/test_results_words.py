"""What RESULTS.md calls more, less, equal or open, against effects that were planted; its warnings and forecasts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted import BASE, cell, cells_of, everywhere, noisy, planted

from altgrad.analysis.cells import Cell
from altgrad.analysis.study import Study, study_of
from altgrad.results import forecasts, geometry, training
from altgrad.results.expectations import ours

FORMATS = ("BF16", "E0M7", "E3M4", "E4M3", "E5M2", "E7M0")
ARMS = ("adamw", "adamw_sr", "manifold", "manifold_sr", "grid")
GAIN = 0.08
SIZES = {"E3M4": 0.05, "E4M3": 0.0, "E5M2": 0.0, "E7M0": -0.05, "E0M7": -GAIN}
"""What manifold gains beyond its gain in BF16."""


def effects(sizes: dict[str, float] = SIZES) -> dict[tuple[str, str], float | str]:
    own: dict[tuple[str, str], float | str] = {("BF16", arm): -GAIN for arm in ("manifold", "manifold_sr", "grid")}
    own |= {(name, "manifold"): -GAIN - size for name, size in sizes.items()}
    return own | {(name, arm): -GAIN for name in sizes for arm in ("manifold_sr", "grid")}


def words(study: Study, arm: str = "manifold") -> dict[str, str]:
    return {one.item.cell.format: one.word for one in geometry.judged_pairs(study) if one.item.cell.arm == arm}


def test_words_are_those_of_the_planted_effects() -> None:
    study = planted(FORMATS, ARMS, effects(), 10, spread=0.002)
    assert words(study) == {"E0M7": "less", "E3M4": "more", "E4M3": "equal", "E5M2": "equal", "E7M0": "less"}
    assert set(words(study, "grid").values()) == {"equal"}
    pairs = geometry.judged_pairs(study)
    text = geometry.sentence(pairs)
    assert "Of 13 pairs" in text and "1 gain more" in text and "1 gain less" in text, "E0M7's manifold steps are plain"
    assert geometry.named(pairs, "less") == "manifold: E7M0"
    assert geometry.most(study, "uniform") == "uniform: E3M4 manifold gains most (decided)."
    (line,) = (line for line in geometry.table(pairs, "uniform").lines if line[:2] == ("manifold", "E0M7"))
    assert "**less** (by construction)" in line
    noise = geometry.judged_pairs(planted(FORMATS, ARMS, effects(), 10, spread=0.1))
    assert all(one.word == "open" and "seeds more" in one.why for one in noise if one.item.cell.format != "E0M7")


def test_where_nothing_gains_more_the_answer_is_none() -> None:
    study = planted(FORMATS, ARMS, effects({"E3M4": -0.01, "E4M3": -0.02, "E7M0": -0.05}), 10, spread=0.002)
    assert "none is decided to gain more than in BF16" in geometry.most(study, "uniform")


def test_a_lost_seed_does_not_lose_the_second_test() -> None:
    whole = noisy(effects(), spread=0.002)

    def lost(name: str, arm: str, seed: int) -> float | str | None:
        return None if (name, arm, seed) == ("E3M4", "manifold", 9) else whole(name, arm, seed)

    study = study_of(cells_of(everywhere(FORMATS, ARMS), lost, 10))
    (pair,) = (one for one in geometry.judged_pairs(study) if one.name == "E3M4 manifold")
    assert pair.item.n == 9 and pair.word == "more" and pair.item.p_free <= 0.05
    assert geometry._word(study, replace(pair.item, p_free=0.2)) == ("open", "the tests disagree")


@pytest.mark.parametrize(
    ("stops", "word"),
    [
        ({("E7M0", "adamw"): 9}, "more"),
        ({("E7M0", "manifold"): 9}, "less"),
        ({("E7M0", "manifold"): 1}, "open"),
        ({("E7M0", "adamw"): 9, ("BF16", "manifold"): 2}, "open"),
    ],
    ids=str,
)
def test_stops_speak_by_their_own_test(stops: dict[tuple[str, str], int], word: str) -> None:
    plain = noisy(effects(), spread=0.002)

    def offset(name: str, arm: str, seed: int) -> float | str:
        return "stop" if seed < stops.get((name, arm), 0) else plain(name, arm, seed)

    study = study_of(cells_of(everywhere(FORMATS, ARMS), offset, 10))
    (pair,) = (one for one in geometry.judged_pairs(study) if one.name == "E7M0 manifold")
    assert pair.word == word and "stopped" in pair.why


@pytest.mark.parametrize(("later", "again"), [(0.05, "confirmed"), (-0.05, "contradicted"), (0.0, "not decided")])
def test_longer_runs_confirm_or_contradict(later: float, again: str) -> None:
    study = planted(FORMATS, ARMS, effects(), 10, spread=0.002)
    longer = planted(FORMATS, ARMS, effects(SIZES | {"E3M4": later}), 6, spread=0.002, key=5)
    (pair,) = (one for one in geometry.judged_pairs(study, longer) if one.name == "E3M4 manifold")
    assert pair.again == again


def test_a_sign_that_turns_at_one_rate_is_told() -> None:
    study = planted(FORMATS, ARMS, effects(), 10, spread=0.002)
    found = {}
    for high in (-0.05, 0.1):
        pairs = geometry.judged_pairs(study, None, {("E3M4", "manifold", "uniform"): (-0.1, -0.2, high)})
        (found[high],) = (one for one in pairs if one.name == "E3M4 manifold")
    assert found[-0.05].turns and geometry._said(found[-0.05]) == "**more** (at its own rate)"
    assert not found[0.1].turns


def test_at_one_rate_every_format_takes_the_rate_that_is_best_in_bf16() -> None:
    """BF16's manifold is best at .004, E4M3's at .002; there it would gain .1 more than it does at .004."""

    def tried(name: str, arm: str, by_rate: dict[float, float]) -> Cell:
        each = [
            cell({seed: BASE + loss + 0.01 * seed for seed in range(3)}, format=name, arm=arm, lr=lr)
            for lr, loss in by_rate.items()
        ]
        return replace(min(each, key=lambda one: one.rank), tried=tuple(each), rates=tuple(by_rate))

    rates = study_of(
        [
            tried("BF16", "adamw", {0.002: 0.0, 0.004: 0.1}),
            tried("BF16", "manifold", {0.002: -0.05, 0.004: -0.1}),
            tried("E4M3", "adamw", {0.002: 0.0, 0.004: 0.1}),
            tried("E4M3", "manifold", {0.002: -0.15, 0.004: -0.05}),
        ]
    )
    mean, low, high = geometry.at_one_rate(rates)["E4M3", "manifold", "uniform"]
    assert mean == pytest.approx(-0.05) and low == pytest.approx(mean) and high == pytest.approx(mean)
    (item,) = (item for item in rates.beyond if item.kind == "beyond BF16")
    assert item.mean == pytest.approx(0.05), "at each one's own rate"


ORDERED = dict(zip(training.LAW, (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2), strict=True))


@pytest.mark.parametrize(
    ("losses", "word"),
    [(ORDERED, "agrees"), ({name: -value for name, value in ORDERED.items()}, "does not agree")],
    ids=["the law's", "reversed"],
)
def test_the_order_of_formats_is_held_against_the_laws(losses: dict[str, float], word: str) -> None:
    study = planted(("BF16", *training.LAW), ["adamw"], {(name, "adamw"): loss for name, loss in losses.items()}, 6)
    assert f"The order **{word}**" in training.order_text(study, "uniform")


def runs(correlated: str) -> pd.DataFrame:
    """Runs whose end follows flip yield, or the early loss."""
    generator = np.random.default_rng(3)
    end = generator.normal(2.5, 0.2, 200)
    noise = generator.normal(0, 0.2, 200)
    near, far = end + 0.1 * noise, end + 3 * noise
    early_yield, early_loss = (-near, far) if correlated == "yield" else (-far, near)
    return pd.DataFrame({"early_yield": early_yield, "early_loss": early_loss, "end": end, "seed": np.arange(200) % 10})


@pytest.mark.parametrize(("correlated", "word"), [("yield", "confirmed"), ("loss", "refuted")])
def test_which_forecast_is_better_is_found(correlated: str, word: str) -> None:
    table = runs(correlated)
    table.loc[:4, "end"] = math.inf  # stopped: last
    found = forecasts._forecast(table, "uniform", "all", 0)
    assert found.word == word and found.low <= found.by_yield - found.by_loss <= found.high


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        ((100, 98, 400, 5), "useful"),
        ((100, 98, 400, 390), "refuted"),
        ((100, 20, 400, 5), "refuted"),
        ((20, 17, 400, 5), "open"),
        ((9, 9, 400, 0), "not measured"),
    ],
)
def test_an_alarm_is_judged_by_exact_intervals(counts: tuple[int, int, int, int], word: str) -> None:
    assert forecasts.Alarm("", *counts).word == word


@pytest.mark.parametrize(
    ("wrong", "known", "word"), [(0, 60, "holds"), (0, 5, "open"), (20, 60, "refuted"), (0, 0, "not measured")]
)
def test_guards_do_harm_where_stops_are_surely_wrong(wrong: int, known: int, word: str) -> None:
    assert forecasts._harm(wrong, known) == word


def test_our_expectations_follow_from_words() -> None:
    study = planted(FORMATS, ARMS, effects({"E3M4": 0.0, "E4M3": 0.0, "E7M0": -0.05}), 10, spread=0.002)
    both = [
        replace(one, item=replace(one.item, cell=replace(one.item.cell, policy=policy)))
        for policy in ("uniform", "uniform_full")
        for one in geometry.judged_pairs(study)
    ]
    assert ours(both, [], "open", "open")[0].word == "holds"
    gaining = planted(FORMATS, ARMS, effects(), 10, spread=0.002)
    assert ours(geometry.judged_pairs(gaining), [], "open", "open")[0].word == "refuted"
