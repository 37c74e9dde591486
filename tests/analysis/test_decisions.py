"""How often what a report calls decided is false, on simulated sweeps of known truth: within 5 %.

Within three standard errors of so many studies; docs/bench/decisions.md holds the table over all scenarios.
"""

from __future__ import annotations

import math

import pytest
import simulation

STUDIES = 80


def assert_rare(tally: simulation.Tally, event: str, limit: float = 0.05) -> None:
    rate, margin = tally.rate(event), 3 * math.sqrt(limit * (1 - limit) / tally.studies)
    assert rate <= limit + margin, f"{event}: {rate:.3f} of {tally.studies} studies"


QUICK = [scenario for scenario in simulation.NULL if scenario.name in ("normal", "bad runs", "one format × 4")]


@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.name)
def test_little_is_decided_where_nothing_differs(scenario: simulation.Scenario) -> None:
    tally = simulation.simulate(scenario, 4, 60, key=11)
    for event in ("false", "uncovered", "headline uncovered"):
        assert_rare(tally, event)


def test_at_the_margin_little_is_decided_with_two_seeds() -> None:
    tally = simulation.simulate(simulation.AT_MARGIN[0], 2, 60, key=12)
    for event in ("false trains", "false fails"):
        assert_rare(tally, event)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 6])
@pytest.mark.parametrize("scenario", simulation.NULL, ids=lambda scenario: scenario.name)
def test_what_is_called_decided_is_rarely_false(scenario: simulation.Scenario, seeds: int) -> None:
    tally = simulation.simulate(scenario, seeds, STUDIES, key=13)
    for event in ("false", "uncovered", "headline uncovered"):
        assert_rare(tally, event)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 4])
@pytest.mark.parametrize("scenario", simulation.AT_MARGIN, ids=lambda scenario: scenario.name)
def test_at_the_margin_little_is_decided(scenario: simulation.Scenario, seeds: int) -> None:
    tally = simulation.simulate(scenario, seeds, STUDIES, key=14)
    for event in ("false trains", "false fails"):
        assert_rare(tally, event)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 6])
@pytest.mark.parametrize("scenario", simulation.TRUE, ids=lambda scenario: scenario.name)
def test_true_effects_are_covered_and_the_best_is_in_the_set(scenario: simulation.Scenario, seeds: int) -> None:
    tally = simulation.simulate(scenario, seeds, STUDIES, key=15)
    for event in ("false", "uncovered", "headline uncovered", "best left out"):
        assert_rare(tally, event)
