"""Races are held between groups of seeds in one cell; what is not a number never decides for others."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from altgrad.sweep.executors import GUARDED
from altgrad.sweep.racing import Race
from altgrad.sweep.schedulers import HealthScheduler
from altgrad.sweep.spec import RaceConfig, SweepSpec
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import OutcomeKind
from altgrad.training.record import to_plain

RUNG = 30
SPEC = SweepSpec(
    formats=("E5M2", "E7M0"),
    optimizers=("adamw",),
    lrs=(1e-3, 2e-3, 4e-3),
    seeds=2,
    scheduler="asha",
    race=RaceConfig(first_rung=RUNG, reduction=3),
)


def trial_name(config: TrainConfig) -> str:
    return f"{config.format}-{config.optimizer.lr * 1e3:.0f}-{config.seed}"


TRIALS = {trial_name(config): config for config in SPEC.expand()}


class Bench:
    """A scheduler with pretended trials."""

    def __init__(self, race: bool = True, trials: dict[str, TrainConfig] = TRIALS) -> None:
        self.scheduler = HealthScheduler(trials, Race(trials, SPEC.race) if race else None)

    @staticmethod
    def _trial(name: str) -> Any:
        return SimpleNamespace(config={"trial": {"trial_id": name}})

    def report(self, name: str, step: int, **row: float) -> str:
        guarded = json.dumps(to_plain({"step": step, **row}))
        return str(self.scheduler.on_trial_result(None, self._trial(name), {"step": step, GUARDED: guarded, **row}))

    def end(self, name: str, step: int, kind: str) -> None:
        self.scheduler.on_trial_complete(
            None, self._trial(name), {"step": step, "outcome": kind, "done": True}
        )

    def arrive(self, group: str, losses: tuple[float, float], step: int = RUNG) -> list[str]:
        """Both seeds reach the step; then what each is told at its next result."""
        for seed, loss in enumerate(losses):
            self.report(f"{group}-{seed}", step, train_loss=2.0, val_loss=loss)
        return [self.report(f"{group}-{seed}", step + 10, train_loss=2.0) for seed in (0, 1)]


def test_the_worse_group_stops_whole_with_its_reason() -> None:
    bench = Bench()
    assert bench.arrive("E5M2-1", (2.0, 2.2)) == ["CONTINUE"] * 2
    assert bench.arrive("E5M2-2", (3.0, 2.9)) == ["STOP"] * 2
    verdict = bench.scheduler.verdicts["E5M2-2-0"]
    assert (verdict.kind, verdict.signal, verdict.first_seen) == (OutcomeKind.PRUNED, "val_loss", RUNG)
    assert verdict.value == pytest.approx(2.95) and verdict.limit == pytest.approx(2.1)
    assert bench.arrive("E5M2-4", (1.0, 1.0)) == ["CONTINUE"] * 2


def test_a_group_is_judged_by_its_mean_and_only_when_whole() -> None:
    bench = Bench()
    bench.arrive("E5M2-1", (2.0, 2.0))
    assert bench.report("E5M2-2-0", RUNG, val_loss=9.0) == "CONTINUE"
    assert bench.report("E5M2-2-0", RUNG + 10, train_loss=9.0) == "CONTINUE", "the other seed has not arrived"
    assert bench.report("E5M2-2-1", RUNG, val_loss=0.5) == "STOP", "mean 4.75 against 2.0"
    assert bench.report("E5M2-2-0", RUNG + 20, train_loss=9.0) == "STOP"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_group_ranks_last_and_moves_no_cutoff(bad: float) -> None:
    bench = Bench()
    assert bench.arrive("E5M2-1", (bad, 2.0)) == ["CONTINUE"] * 2, "alone there is nothing better"
    assert bench.arrive("E5M2-2", (2.5, 2.5)) == ["CONTINUE"] * 2, "the only finite one is the best"
    assert bench.arrive("E5M2-4", (bad, bad)) == ["STOP"] * 2
    verdict = bench.scheduler.verdicts["E5M2-4-1"]
    assert verdict.limit == 2.5 and verdict.value == math.inf


def test_a_member_that_a_guard_ended_puts_its_group_last() -> None:
    bench = Bench()
    bench.arrive("E5M2-1", (2.0, 2.0))
    bench.end("E5M2-2-0", 20, "stalled")
    assert bench.report("E5M2-2-1", RUNG, val_loss=0.1) == "STOP"


def test_cells_do_not_race_each_other() -> None:
    bench = Bench()
    assert bench.arrive("E5M2-1", (1.0, 1.0)) == ["CONTINUE"] * 2
    assert bench.arrive("E7M0-1", (5.0, 5.0)) == ["CONTINUE"] * 2


def test_one_group_per_cell_is_never_pruned() -> None:
    trials = {name: config for name, config in TRIALS.items() if "-1-" in name}
    bench = Bench(trials=trials)
    for step in range(10, 100, 10):
        for name in trials:
            assert bench.report(name, step, train_loss=2.0, val_loss=5.0 + TRIALS[name].seed) == "CONTINUE"


def test_references_are_never_pruned() -> None:
    bench = Bench()
    for group, loss in (("BF16-1", 1.0), ("BF16-2", 9.0), ("BF16-4", math.nan)):
        assert bench.arrive(group, (loss, loss)) == ["CONTINUE"] * 2


def test_a_group_with_a_finished_member_is_left_whole() -> None:
    bench = Bench()
    bench.arrive("E5M2-1", (1.0, 1.0))
    bench.report("E5M2-2-0", RUNG, val_loss=5.0)
    bench.end("E5M2-2-0", 100, "done")
    assert bench.report("E5M2-2-1", RUNG, val_loss=5.0) == "CONTINUE"


def test_a_group_that_lost_a_member_to_a_fault_is_not_judged() -> None:
    bench = Bench()
    bench.arrive("E5M2-1", (1.0, 1.0))
    bench.report("E5M2-2-0", RUNG, val_loss=5.0)
    bench.end("E5M2-2-0", 40, "bug")
    assert bench.report("E5M2-2-1", RUNG, val_loss=5.0) == "CONTINUE"


def test_rungs_lie_a_factor_apart_and_the_last_step_decides_nothing() -> None:
    bench = Bench()
    assert bench.arrive("E5M2-1", (1.0, 1.0)) == ["CONTINUE"] * 2
    assert bench.arrive("E5M2-2", (9.0, 9.0), step=20) == ["CONTINUE"] * 2, "before the first rung"
    race = Race(TRIALS, SPEC.race)
    for name, loss in (("E5M2-1", 1.0), ("E5M2-2", 9.0)):
        for seed in (0, 1):
            race.observe(f"{name}-{seed}", SPEC.steps, loss)
    assert race.verdict("E5M2-2-0") is None


def test_no_race_without_asking() -> None:
    bench = Bench(race=False)
    for before, after in pairwise(("E5M2-1", "E5M2-2", "E5M2-4")):
        assert bench.arrive(before, (1.0, 1.0)) == bench.arrive(after, (9.0, 9.0)) == ["CONTINUE"] * 2


def test_the_backstop_waits_for_the_worker_then_stops_with_the_guards_own_rule() -> None:
    bench = Bench(race=False)
    assert bench.report("E5M2-1-0", 10, train_loss=math.nan) == "CONTINUE"
    assert bench.report("E5M2-1-0", 20, train_loss=math.nan) == "STOP"
    verdict = bench.scheduler.verdicts["E5M2-1-0"]
    assert (verdict.kind, verdict.signal, verdict.limit, verdict.step, verdict.first_seen) == (
        OutcomeKind.NONFINITE, "train_loss", None, 20, 10)


@pytest.mark.parametrize("second", [2.0, 3.5])
def test_the_backstop_forgets_when_the_loss_is_finite_again(second: float) -> None:
    bench = Bench(race=False)
    losses = (math.inf, second, math.nan)
    assert [bench.report("E5M2-1-0", 10 * i, train_loss=loss) for i, loss in enumerate(losses, 1)] == [
        "CONTINUE"
    ] * 3


@pytest.mark.parametrize(("signal", "value", "kind", "checks"), [
    ("flip_yield", 0.05, "stalled", 4), ("spread_ratio", 0.1, "rank_collapse", 3), ("frozen", 1, "stalled", 3)])
def test_the_backstop_knows_every_rule_that_ends_a_run(signal: str, value: float, kind: str, checks: int) -> None:
    bench = Bench(race=False)
    layers = {"lm_head": {signal: value}, "other": {signal: math.nan}}
    answers = [bench.report("E5M2-1-0", 20 + 10 * i, **{signal: value, "layers": layers}) for i in range(1, checks + 1)]
    assert answers == ["CONTINUE"] * (checks - 1) + ["STOP"]
    verdict = bench.scheduler.verdicts["E5M2-1-0"]
    assert (str(verdict.kind), verdict.layer, verdict.value) == (kind, "lm_head", value)
    assert verdict.message.endswith("stopped by the scheduler")


def test_a_guard_stopped_trial_enters_no_rung_with_a_number() -> None:
    bench = Bench()
    for step in (30, 40, 50, 60):
        bench.report("E5M2-1-0", step, flip_yield=0.05, val_loss=0.1)
    assert bench.scheduler.verdicts["E5M2-1-0"].kind is OutcomeKind.STALLED
    bench.arrive("E5M2-2", (3.0, 3.0))
    bench.arrive("E5M2-4", (3.1, 3.1))
    bench.report("E5M2-1-1", RUNG, val_loss=0.1)
    assert bench.report("E5M2-1-1", RUNG + 10) == "STOP"
    assert "E5M2-2-0" not in bench.scheduler.verdicts


def test_with_guards_off_a_diverged_trial_runs_on() -> None:
    trials = {name: config.model_copy(update={"guards": ()}) for name, config in TRIALS.items()}
    bench = Bench(race=False, trials=trials)
    assert {bench.report("E5M2-1-0", step, train_loss=math.nan) for step in range(10, 100, 10)} == {
        "CONTINUE"
    }
