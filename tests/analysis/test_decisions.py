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


NULL = ("false", "uncovered", "headline uncovered")
MARGIN = ("false trains", "false fails")
TRUE = (*NULL, "best left out")
QUICK = [
    (scenario, 4, NULL) for scenario in simulation.NULL if scenario.name in ("normal", "bad runs", "one format × 4")
]
QUICK += [(simulation.AT_MARGIN[0], 2, MARGIN)]
WHOLE = [
    (scenario, seeds, events)
    for scenarios, counts, events in (
        (simulation.NULL, (3, 6), NULL),
        (simulation.AT_MARGIN, (2, 4), MARGIN),
        (simulation.TRUE, (3, 6), TRUE),
    )
    for scenario in scenarios
    for seeds in counts
]


def named(value: object) -> str | None:
    return value.name if isinstance(value, simulation.Scenario) else None


@pytest.mark.parametrize(("scenario", "seeds", "events"), QUICK, ids=named)
def test_little_is_decided_wrongly(scenario: simulation.Scenario, seeds: int, events: tuple[str, ...]) -> None:
    tally = simulation.simulate(scenario, seeds, STUDIES, key=11)
    for event in events:
        assert_rare(tally, event)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "seeds", "events"), WHOLE, ids=named)
def test_little_is_decided_wrongly_in_any_scenario(
    scenario: simulation.Scenario, seeds: int, events: tuple[str, ...]
) -> None:
    tally = simulation.simulate(scenario, seeds, STUDIES, key=13)
    for event in events:
        assert_rare(tally, event)
