"""A search for one best configuration races all its samples; what is not a number decides nothing for others."""

import math

import pytest

from altgrad.sweep.pace.pooled import PooledRace
from altgrad.sweep.pace.racing import Race
from altgrad.sweep.space.pacing import RaceConfig
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import OutcomeKind

SPEC = SweepSpec(formats=("E5M2", "E7M0"), optimizers=("adamw",), lrs=(1e-3, 2e-3), seeds=2)
TRIALS: dict[str, TrainConfig] = {f"{c.format}-{c.optimizer.lr * 1e3:.0f}-{c.seed}": c for c in SPEC.expand()}
CONFIG = RaceConfig(first_rung=20, reduction=2)
GROUPS = ("E5M2-1", "E5M2-2", "E7M0-1", "E7M0-2")


def pooled() -> PooledRace:
    race = PooledRace(CONFIG, steps=100, eval_interval=20)
    race.admit(TRIALS)
    return race


def test_who_comes_is_compared_with_those_who_came_before() -> None:
    race = pooled()
    for name, loss in zip(GROUPS, (2.0, 3.0, 1.0, 1.5), strict=True):
        race.observe(f"{name}-0", 20, loss)
    assert [race.verdict(f"{name}-0") is None for name in GROUPS] == [True, False, True, True]
    lost, never = race.stopped["E5M2-2-0"], race.stopped["E5M2-2-1"]
    assert (lost.kind, lost.step, lost.value, lost.limit) == (OutcomeKind.PRUNED, 20, 3.0, 2.0)
    assert never.step == 0 and "not started: its group was pruned at rung 20 of the search" in never.message
    race.observe("E5M2-1-0", 40, 5.0)
    race.observe("E7M0-1-0", 40, 6.0)
    assert race.verdict("E5M2-1-0") is None and race.verdict("E7M0-1-0") is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_loses_and_moves_no_cutoff(bad: float) -> None:
    race = pooled()
    race.observe("E5M2-1-0", 20, bad)
    assert race.verdict("E5M2-1-0") is None, "alone, it is compared with nobody"
    race.observe("E5M2-2-0", 20, 9.0)
    race.observe("E7M0-1-0", 20, bad)
    assert race.verdict("E5M2-2-0") is None and race.verdict("E7M0-1-0") is not None
    race.observe("E7M0-2-0", 20, 9.5)
    assert race.stopped["E7M0-2-0"].limit == 9.0


def test_other_seeds_start_when_the_first_is_done_and_never_when_it_failed() -> None:
    race = pooled()
    assert all(race.is_waiting(f"{name}-1") and not race.is_waiting(f"{name}-0") for name in GROUPS)
    race.ended("E5M2-1-0", OutcomeKind.DONE, 100)
    race.ended("E5M2-2-0", OutcomeKind.DIVERGED, 30)
    race.lost("E7M0-1-0")
    assert [race.is_waiting(f"{name}-1") for name in GROUPS] == [False, True, False, True]
    assert race.verdict("E5M2-1-1") is None and "ended as diverged at step 30" in race.stopped["E5M2-2-1"].message
    assert not race.is_waiting("BF16-1-1"), "references are in no race"


def test_after_a_restart_who_is_done_has_not_lost() -> None:
    race = pooled()
    race.observe("E5M2-1-0", 20, 1.0)
    race.observe("E5M2-2-0", 20, 2.0)
    race.ended("E5M2-2-0", OutcomeKind.DONE, 100)
    assert race.verdict("E5M2-2-0") is None and race.verdict("E5M2-2-1") is None and not race.is_waiting("E5M2-2-1")


def test_a_random_search_is_one_race_over_formats() -> None:
    within, over = (Race(TRIALS, CONFIG, pooled=flag) for flag in (False, True))
    for race in (within, over):
        for name, loss in zip(GROUPS, (1.0, 2.0, 3.0, 4.0), strict=True):
            race.observe(f"{name}-0", 20, loss)
    assert {name for name in GROUPS if within.verdict(f"{name}-0") is None} == {"E5M2-1", "E7M0-1"}
    assert {name for name in GROUPS if over.verdict(f"{name}-0") is None} == {"E5M2-1", "E5M2-2"}
