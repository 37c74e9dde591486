"""Populations exchange alike in every order and after every interruption; their trials are nobody else's."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from altgrad.sweep.engine.executors import GUARDED, PAUSED
from altgrad.sweep.pace.population import Population
from altgrad.sweep.pace.schedulers import HealthScheduler
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.populations import PREFIX
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.checkpoint import load_checkpoint, save_checkpoint
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import to_plain

SHA = "a" * 64
SPEC = SweepSpec.model_validate(
    {
        "formats": "E5M2",
        "optimizers": "grid,adamw",
        "seeds": 2,
        "lrs": "1e-3,2e-3,4e-3,8e-3",
        "scheduler": "pbt",
        "pbt": {"interval": 20},
    }
)
TRIALS = SPEC.trials(SHA)
GRID = [name for name, config in TRIALS.items() if config.arm == "grid" and config.seed == 0]
LOSSES = dict(zip(GRID, (3.0, 1.0, 2.0, math.nan), strict=True))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[tuple[Ledger, Path]]:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials(TRIALS, SHA)
        yield ledger, tmp_path / "trials"


def write(folder: Path, name: str, step: int) -> None:
    state = {
        "step": step,
        "seconds": float(GRID.index(name)),
        "model": name,
        "optimizer": {"param_groups": [{"lr": 1.0, "rung_clip": 10.0}]},
    }
    save_checkpoint(folder / name / "checkpoint", state)


def arrive(ledger: Ledger, folder: Path, name: str, step: int = 20, loss: float | None = None) -> None:
    """The member has trained to the step and written what the driver then reads."""
    ledger.record_rows(name, [{"step": step, "val_loss": LOSSES[name] if loss is None else loss}])
    write(folder, name, step)


def test_members_have_ids_of_their_own_and_references_do_not() -> None:
    ordinary = SPEC.changed(scheduler="none").trials(SHA)
    assert len(TRIALS) == len(ordinary) and not set(GRID) & set(ordinary)
    for name, config in TRIALS.items():
        assert name.startswith(PREFIX) != config.is_reference and (name in ordinary) == config.is_reference
    fewer = SPEC.changed(lrs=SPEC.lrs[:3]).trials(SHA)
    assert not [name for name in fewer if name.startswith(PREFIX) and name in TRIALS], "another population"
    alone = SweepSpec.model_validate(SPEC.model_dump() | {"lrs": (), "rung_clip": (1, 3)}).trials(SHA)
    assert {config.arm for name, config in alone.items() if name.startswith(PREFIX)} == {"grid"}


def exchange(out: tuple[Ledger, Path], order: tuple[str, ...]) -> list[tuple]:
    ledger, folder = out
    population = Population(TRIALS, SPEC, ledger, folder)
    for number, name in enumerate(order):
        assert population.pause_step(name) == 20 and not population.is_waiting(name)
        arrive(ledger, folder, name)
        population.observe(name, 20, LOSSES[name])
        assert population.is_waiting(name) == (number < 3)
    assert {population.pause_step(name) for name in GRID} == {40}
    return ledger.mutations(GRID)[0]


def test_the_worst_takes_over_from_the_best_in_every_order(tmp_path: Path) -> None:
    found = []
    for number, order in enumerate(itertools.permutations(GRID)):
        with Ledger(tmp_path / str(number) / "ledger.sqlite") as ledger:
            found.append(exchange((ledger, tmp_path / str(number)), order))
    assert all(item == found[0] for item in found)
    best, worst = GRID[1], GRID[3]
    (_, step, field, before, after, source), clip = found[0]
    assert (step, field, before, source) == (20, "lr", 8e-3, best) and after in (pytest.approx(1.6e-3), 2.5e-3)
    assert clip[:4] == (worst, 20, "rung_clip", 10.0) and clip[4] in (8.0, 12.5)
    state = load_checkpoint(tmp_path / "0" / worst / "checkpoint")
    assert state is not None and (state["model"], state["step"], state["seconds"]) == (best, 20, 3.0)
    assert state["optimizer"]["param_groups"][0]["rung_clip"] == clip[4]


def test_the_next_attempt_trains_with_the_values_taken_over(out: tuple[Ledger, Path]) -> None:
    exchange(out, tuple(GRID))
    population = Population(TRIALS, SPEC, *out)
    request = {"trial_id": GRID[3], "config": TRIALS[GRID[3]].model_dump_json()}
    config = type(TRIALS[GRID[3]]).model_validate_json(population.adjusted(GRID[3], request)["config"])
    _, _, _, _, after, _ = out[0].mutations(GRID)[0][0]
    assert config.optimizer.lr == after != TRIALS[GRID[3]].optimizer.lr
    assert config.model_copy(update={"optimizer": TRIALS[GRID[3]].optimizer}) == TRIALS[GRID[3]]
    same = {"trial_id": GRID[1], "config": TRIALS[GRID[1]].model_dump_json()}
    assert type(config).model_validate_json(population.adjusted(GRID[1], same)["config"]) == TRIALS[GRID[1]]


def test_an_exchange_that_a_killed_driver_began_is_finished(
    out: tuple[Ledger, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, folder = out
    for name in GRID:
        arrive(ledger, folder, name)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as planted:
        planted.setattr("altgrad.sweep.pace.population.save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            Population(TRIALS, SPEC, ledger, folder)
    begun, unfinished = ledger.mutations(GRID)
    assert unfinished == {20} and load_checkpoint(folder / GRID[3] / "checkpoint")["model"] == GRID[3]
    population = Population(TRIALS, SPEC, ledger, folder)
    assert ledger.mutations(GRID) == (begun, set())
    assert load_checkpoint(folder / GRID[3] / "checkpoint")["model"] == GRID[1]
    assert population.pause_step(GRID[0]) == 40


def test_a_step_recorded_without_its_checkpoint_is_trained_again_before_others_take_it_over(
    out: tuple[Ledger, Path],
) -> None:
    ledger, folder = out
    for name in GRID:
        arrive(ledger, folder, name)
    write(folder, GRID[1], 10)
    population = Population(TRIALS, SPEC, ledger, folder)
    assert [population.is_waiting(name) for name in GRID] == [True, False, True, True]
    assert ledger.mutations(GRID)[0] == []
    write(folder, GRID[1], 20)
    population.observe(GRID[1], 20, 1.0)
    assert len(ledger.mutations(GRID)[0]) == 2 and not population.is_waiting(GRID[0])


def test_who_a_guard_ended_leaves_and_the_last_one_runs_through(out: tuple[Ledger, Path]) -> None:
    ledger, folder = out
    population = Population(TRIALS, SPEC, ledger, folder)
    for name in GRID[:2]:
        arrive(ledger, folder, name)
        population.observe(name, 20, LOSSES[name])
    population.ended(GRID[2], OutcomeKind.DIVERGED, 10)
    assert population.is_waiting(GRID[0])
    population.lost(GRID[3])
    assert [item[0] for item in ledger.mutations(GRID)[0]] == [GRID[0]] * 2
    population.ended(GRID[0], OutcomeKind.STALLED, 30)
    assert population.pause_step(GRID[1]) is None
    rule = next(rule for rule in TRIALS[GRID[2]].guards if rule.kind == "diverged")
    ledger.record_outcome(GRID[2], Outcome(OutcomeKind.DIVERGED, 10, rule.signal, None, 9.0, rule.limit))
    ledger.record_outcome(GRID[0], Outcome(OutcomeKind.DIVERGED, 30, rule.signal, None, 9.0, rule.limit))
    ledger.record_outcome(GRID[3], Outcome(OutcomeKind.DIVERGED, 30, rule.signal, None, 9.0, rule.limit))
    assert Population(TRIALS, SPEC, ledger, folder).pause_step(GRID[1]) is None


def test_a_member_is_judged_by_the_counts_of_the_weights_that_it_took_over(out: tuple[Ledger, Path]) -> None:
    """Its own checkpoint's gradient was not finite; the one it goes on from was."""
    ledger, folder = out
    scheduler = HealthScheduler(TRIALS, Population(TRIALS, SPEC, ledger, folder))

    def result(name: str, step: int, norm: float) -> tuple[SimpleNamespace, dict[str, Any]]:
        row = json.dumps(to_plain({"step": step, "grad_norm": norm}))
        return SimpleNamespace(config={"trial": {"trial_id": name}}), {"step": step, GUARDED: row}

    for name in GRID:
        arrive(ledger, folder, name)
        trial, paused = result(name, 20, 1.0 if name == GRID[1] else math.nan)
        scheduler.on_trial_complete(None, trial, paused | {"val_loss": LOSSES[name], PAUSED: True, "done": True})
    assert {item[0] for item in ledger.mutations(GRID)[0]} == {GRID[3]}
    answers = {name: scheduler.on_trial_result(None, *result(name, 30, math.nan)) for name in (GRID[0], GRID[3])}
    assert answers == {GRID[0]: "STOP", GRID[3]: "CONTINUE"}
    assert scheduler.on_trial_result(None, *result(GRID[3], 40, math.nan)) == "STOP"
