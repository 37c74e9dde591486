"""What a plan says that its seeds can decide, held against the procedures that will decide."""

from __future__ import annotations

import re

import pytest
from planted import planted

from altgrad.analysis.power import planned_power
from altgrad.sweep.space.spec import SweepSpec

ARMS = ("adamw", "adamw_sr", "manifold", "grid")
FORMATS = ("BF16", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1")


def lines(seeds: int, formats: tuple[str, ...] = FORMATS, arms: tuple[str, ...] = ARMS, **options: float) -> list[str]:
    spec = SweepSpec(formats=formats, optimizers=arms, seeds=seeds)
    return planned_power(spec.expand(), seeds, **options)


def shown(line: str) -> float:
    found = re.search(r"from ([\d.]+) standard deviations", line)
    assert found is not None
    return float(found.group(1))


@pytest.mark.parametrize("seeds", [3, 6])
def test_the_difference_that_a_plan_promises_is_decided_four_times_in_five(seeds: int) -> None:
    promised = shown(lines(seeds)[1])
    spread = 0.01
    effect = promised * 2 * spread  # an interaction has four runs' noise
    hits = 0
    for key in range(100):
        study = planted(FORMATS, ARMS, {("E4M3", "manifold"): -effect}, seeds, spread=spread, key=key)
        hits += next(item for item in study.beyond if (item.cell.format, item.cell.arm) == ("E4M3", "manifold")).decided
    assert 0.66 <= hits / 100 <= 0.94


def test_more_seeds_show_less_and_decide_more() -> None:
    few, many = lines(3), lines(8)
    assert shown(few[1]) > 2 * shown(many[1])
    powers = [
        [int(value) for value in re.findall(r"(\d+) %", line.split("from run to run")[1])] for line in (few[0], many[0])
    ]
    assert powers[0][0] < powers[1][0] and powers[1][0] >= 95
    assert "10 differences together" in few[1] and "distribution-free test stands beside it from 6 seeds on" in few[1]


def test_a_plan_says_what_it_lacks() -> None:
    assert lines(1) == ["power: one seed has no spread, so nothing can be decided; 6 and more are expected of a study"]
    assert "no gain beyond BF16 can be measured" in lines(3, arms=("adamw", "grid"))[1]
    assert "no format can be said to train" in lines(3, formats=("BF16",))[0]


def test_the_margin_changes_what_can_be_decided() -> None:
    tight, wide = (lines(4, margin=margin)[0] for margin in (0.03, 0.2))
    trains = [int(re.findall(r"(\d+) %", line.split("from run to run")[1])[0]) for line in (tight, wide)]
    assert trains[0] < trains[1], "a wider margin is easier to stay within"
