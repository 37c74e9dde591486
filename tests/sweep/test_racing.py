"""Races are held between groups of seeds in one cell; what is not a number never decides for others."""

import json
import math
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest

from altgrad.sweep.engine.executors import GUARDED
from altgrad.sweep.pace.racing import Race
from altgrad.sweep.pace.schedulers import HealthScheduler
from altgrad.sweep.space.pacing import RaceConfig
from altgrad.sweep.space.spec import SweepSpec
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
    race=RaceConfig(first_rung=RUNG, reduction=3, seeds=2),
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
        self.scheduler.on_trial_add(None, self._trial(name))
        guarded = json.dumps(to_plain({"step": step, **row}))
        return str(self.scheduler.on_trial_result(None, self._trial(name), {"step": step, GUARDED: guarded, **row}))

    def end(self, name: str, step: int, kind: str) -> None:
        self.scheduler.on_trial_add(None, self._trial(name))
        self.scheduler.on_trial_complete(None, self._trial(name), {"step": step, "outcome": kind, "done": True})

    def pause(self, name: str, step: int, loss: float, **rest: str) -> None:
        """The trial has come to the rung and gives its slot back."""
        self.scheduler.on_trial_complete(
            None, self._trial(name), {"step": step, "val_loss": loss, "paused": True, "done": True} | rest
        )

    def arrive(self, group: str, losses: tuple[float, float], step: int = RUNG) -> None:
        """Both seeds come to the rung."""
        for seed, loss in enumerate(losses):
            self.pause(f"{group}-{seed}", step, loss)

    def waiting(self, group: str) -> list[bool]:
        return [self.race.is_waiting(f"{group}-{seed}") for seed in (0, 1)]

    @property
    def race(self) -> Race:
        assert self.scheduler._pace is not None
        return self.scheduler._pace


def test_all_wait_for_the_last_and_then_the_worse_groups_stop_whole_with_their_reason() -> None:
    bench = Bench()
    assert bench.race.pause_step("E5M2-1-0") == 40, "the first evaluation behind the rung"
    bench.arrive("E5M2-2", (3.0, 2.9), 40)
    bench.arrive("E5M2-1", (2.0, 2.2), 40)
    bench.pause("E5M2-4-0", 40, 1.0)
    assert bench.waiting("E5M2-2") == bench.waiting("E5M2-1") == [True, True]
    assert bench.waiting("E5M2-4") == [True, False] and bench.scheduler.pruned() == []
    bench.pause("E5M2-4-1", 40, 9.0)
    assert sorted(bench.scheduler.pruned()) == ["E5M2-2-0", "E5M2-2-1", "E5M2-4-0", "E5M2-4-1"]
    assert bench.scheduler.pruned() == []
    verdict = bench.scheduler.verdicts["E5M2-4-0"]
    assert (verdict.kind, verdict.signal, verdict.step, verdict.first_seen) == (
        OutcomeKind.PRUNED,
        "val_loss",
        40,
        RUNG,
    )
    assert verdict.value == 5.0 and verdict.limit == pytest.approx(2.1) and verdict.val_loss == 1.0
    assert bench.waiting("E5M2-1") == [False, False]
    assert bench.race.pause_step("E5M2-1-0") is None, "alone, it runs to its end"


@pytest.mark.parametrize("order", list(permutations(("E5M2-1", "E5M2-2", "E5M2-4"))))
def test_the_order_of_arrival_decides_nothing(order: tuple[str, ...]) -> None:
    bench = Bench()
    for group in order:
        bench.arrive(group, {"E5M2-1": (2.0, 2.0), "E5M2-2": (1.9, 2.2), "E5M2-4": (2.1, 2.0)}[group])
    assert sorted(bench.scheduler.pruned()) == ["E5M2-2-0", "E5M2-2-1", "E5M2-4-0", "E5M2-4-1"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_group_ranks_last_and_moves_no_cutoff(bad: float) -> None:
    bench = Bench()
    bench.arrive("E5M2-1", (bad, 2.0))
    bench.arrive("E5M2-2", (2.5, 2.5))
    bench.arrive("E5M2-4", (bad, bad))
    assert sorted(bench.scheduler.pruned()) == ["E5M2-1-0", "E5M2-1-1", "E5M2-4-0", "E5M2-4-1"]
    verdict = bench.scheduler.verdicts["E5M2-4-1"]
    assert verdict.limit == 2.5 and verdict.value == math.inf


def test_where_no_group_is_finite_nobody_is_stopped_by_the_race() -> None:
    bench = Bench()
    for group in ("E5M2-1", "E5M2-2", "E5M2-4"):
        bench.arrive(group, (math.nan, 2.0))
    assert bench.scheduler.pruned() == []


def test_a_member_that_a_guard_ended_puts_its_group_last() -> None:
    bench = Bench()
    bench.arrive("E5M2-1", (2.0, 2.0))
    bench.arrive("E5M2-4", (2.1, 2.0))
    bench.end("E5M2-2-0", 20, "stalled")
    bench.pause("E5M2-2-1", RUNG, 0.1)
    assert sorted(bench.scheduler.pruned()) == ["E5M2-2-1", "E5M2-4-0", "E5M2-4-1"]
    assert bench.scheduler.verdicts["E5M2-4-0"].limit == 2.0


def test_a_member_that_a_shift_mended_puts_its_group_last_and_keeps_its_own_loss() -> None:
    bench = Bench()
    bench.arrive("E5M2-1", (2.0, 2.0))
    bench.arrive("E5M2-4", (2.1, 2.0))
    bench.pause("E5M2-2-0", RUNG, 0.1, formats="lm_head: E5M2->E4M3")
    bench.pause("E5M2-2-1", RUNG, 0.1, formats="")
    assert sorted(bench.scheduler.pruned()) == ["E5M2-2-0", "E5M2-2-1", "E5M2-4-0", "E5M2-4-1"]
    verdicts = [bench.scheduler.verdicts[f"E5M2-2-{seed}"] for seed in (0, 1)]
    assert [(verdict.formats, verdict.val_loss) for verdict in verdicts] == [("lm_head: E5M2->E4M3", 0.1), (None, 0.1)]
    assert bench.scheduler.verdicts["E5M2-4-0"].limit == 2.0


def test_cells_do_not_race_each_other() -> None:
    bench = Bench()
    for group, loss in (("E5M2-1", 1.0), ("E5M2-2", 2.0), ("E7M0-1", 5.0), ("E7M0-2", 6.0)):
        bench.arrive(group, (loss, loss))
    assert bench.scheduler.pruned() == [] and bench.waiting("E7M0-1") == [True, True]
    bench.arrive("E7M0-4", (7.0, 7.0))
    assert {name[:6] for name in bench.scheduler.pruned()} == {"E7M0-2", "E7M0-4"}


def test_one_group_per_cell_is_never_paused_nor_pruned() -> None:
    trials = {name: config for name, config in TRIALS.items() if "-1-" in name}
    bench = Bench(trials=trials)
    assert {bench.race.pause_step(name) for name in trials} == {None}


def test_references_are_never_paused_nor_pruned() -> None:
    bench = Bench()
    assert {bench.race.pause_step(f"BF16-{lr}-{seed}") for lr in (1, 2, 4) for seed in (0, 1)} == {None}


@pytest.mark.parametrize("kind", ["done", "bug"])
def test_a_group_with_a_finished_or_lost_member_is_compared_with_nobody(kind: str) -> None:
    bench = Bench()
    bench.arrive("E5M2-1", (1.0, 1.0))
    bench.arrive("E5M2-4", (2.0, 2.0))
    bench.pause("E5M2-2-0", RUNG, 5.0)
    bench.end("E5M2-2-0", 100, kind)
    assert sorted(bench.scheduler.pruned()) == ["E5M2-4-0", "E5M2-4-1"]
    assert bench.race.pause_step("E5M2-2-1") is None


def test_rungs_lie_a_factor_apart_and_the_last_step_decides_nothing() -> None:
    spec = SPEC.changed(steps=300, lrs=(1e-3, 2e-3, 4e-3, 8e-3))
    trials = {trial_name(config): config for config in spec.expand()}
    race = Race(trials, RaceConfig(first_rung=40, reduction=2))
    for lr in (1, 2, 4, 8):
        for seed in (0, 1):
            race.observe(f"E5M2-{lr}-{seed}", 40, float(lr))
    assert [race.verdict(f"E5M2-{lr}-0") is None for lr in (1, 2, 4, 8)] == [True, True, False, False]
    assert race.pause_step("E5M2-1-0") == 80
    race.observe("E5M2-1-0", spec.base.steps, 9.0)
    assert not race.is_waiting("E5M2-1-0")


def test_one_seed_leads_and_the_others_start_when_their_group_has_won() -> None:
    trials = {name: config for name, config in TRIALS.items() if config.format == "E5M2"}
    race = Race(trials, RaceConfig(first_rung=40, reduction=3))
    assert [race.is_waiting(f"E5M2-{lr}-1") for lr in (1, 2, 4)] == [True] * 3, "before anything ran"
    assert race.pause_step("E5M2-1-0") == 40
    race.observe("E5M2-1-1", 40, 0.0)
    for lr, loss in ((1, 2.0), (2, 1.5), (4, math.nan)):
        assert not race.stopped
        race.observe(f"E5M2-{lr}-0", 40, loss)
    assert {name for name in trials if race.verdict(name) is None} == {"E5M2-2-0", "E5M2-2-1"}
    assert not race.is_waiting("E5M2-2-1") and race.pause_step("E5M2-2-1") is None
    never, leader = race.stopped["E5M2-1-1"], race.stopped["E5M2-1-0"]
    assert (never.step, leader.step, leader.val_loss) == (0, 40, 2.0)
    assert "not started" in never.message and leader.message == "pruned at rung 40: val_loss 2, cutoff 1.5"


def test_the_others_of_a_lost_leader_run() -> None:
    race = Race(TRIALS, RaceConfig(first_rung=40, reduction=3))
    assert race.is_waiting("E5M2-1-1")
    race.lost("E5M2-1-0")
    assert not race.is_waiting("E5M2-1-1") and race.is_waiting("E5M2-2-1")


def test_a_race_that_was_decided_before_a_restart_is_recorded_after_it() -> None:
    bench = Bench()
    for group, loss in (("E5M2-1", 1.0), ("E5M2-2", 2.0), ("E5M2-4", 3.0)):
        for seed in (0, 1):
            bench.race.observe(f"{group}-{seed}", 40, loss)
    assert sorted(bench.scheduler.pruned()) == ["E5M2-2-0", "E5M2-2-1", "E5M2-4-0", "E5M2-4-1"]
    assert bench.scheduler.verdicts["E5M2-4-1"].val_loss == 3.0


def test_no_race_without_asking() -> None:
    bench = Bench(race=False)
    bench.arrive("E5M2-1", (1.0, 1.0))
    bench.arrive("E5M2-2", (9.0, 9.0))
    assert bench.scheduler.pruned() == []


def test_the_backstop_waits_for_the_worker_then_stops_with_the_guards_own_rule() -> None:
    bench = Bench(race=False)
    assert bench.report("E5M2-1-0", 10, train_loss=math.nan) == "CONTINUE"
    assert bench.report("E5M2-1-0", 20, train_loss=math.nan) == "STOP"
    verdict = bench.scheduler.verdicts["E5M2-1-0"]
    assert (verdict.kind, verdict.signal, verdict.limit, verdict.step, verdict.first_seen) == (
        OutcomeKind.NONFINITE,
        "train_loss",
        None,
        20,
        10,
    )


@pytest.mark.parametrize("second", [2.0, 3.5])
def test_the_backstop_forgets_when_the_loss_is_finite_again(second: float) -> None:
    bench = Bench(race=False)
    losses = (math.inf, second, math.nan)
    assert [bench.report("E5M2-1-0", 10 * i, train_loss=loss) for i, loss in enumerate(losses, 1)] == ["CONTINUE"] * 3


@pytest.mark.parametrize(
    ("signal", "value", "kind", "checks"),
    [("flip_yield", 0.05, "stalled", 4), ("spread_ratio", 0.1, "rank_collapse", 3), ("frozen", 1, "stalled", 3)],
)
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
    bench.pause("E5M2-1-1", RUNG, 0.1)
    assert sorted(bench.scheduler.pruned()) == ["E5M2-1-1", "E5M2-4-0", "E5M2-4-1"]
    assert bench.scheduler.verdicts["E5M2-4-0"].limit == 3.0


def test_with_guards_off_a_diverged_trial_runs_on() -> None:
    trials = {name: config.model_copy(update={"guards": ()}) for name, config in TRIALS.items()}
    bench = Bench(race=False, trials=trials)
    assert {bench.report("E5M2-1-0", step, train_loss=math.nan) for step in range(10, 100, 10)} == {"CONTINUE"}
