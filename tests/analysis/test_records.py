"""What the ledger says comes back as it was, and what says nothing is kept apart."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import DATA, Plan, explode, stall, write_ledger

from altgrad.analysis.frames import results_table
from altgrad.analysis.records import load, newest_setting, of_sweep
from altgrad.sweep.record.ledger import Ledger
from altgrad.training.config import ModelConfig, TrainConfig
from altgrad.training.guards import DEFAULT_GUARDS
from altgrad.training.outcome import Outcome, OutcomeKind


def record(out_dir: Path, config: TrainConfig, outcome: Outcome | None, rows: list[dict] | None = None) -> None:
    trial_id = config.trial_id(DATA)
    with Ledger(out_dir / "ledger.sqlite") as ledger:
        ledger.add_trials({trial_id: config}, DATA)
        ledger.record_rows(trial_id, rows or [])
        if outcome is not None:
            ledger.record_outcome(trial_id, outcome)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_come_back(tmp_path: Path, value: float) -> None:
    row = {"step": 1, "train_loss": value, "flip_yield": None}
    record(tmp_path, TrainConfig(), explode(value=value), [row])
    records = load(tmp_path)
    for found in (records.trials["value"][0], records.rows["train_loss"][0]):
        assert isinstance(found, float) and (found == value or (math.isnan(found) and math.isnan(value)))
    assert records.trials["state"][0] == "failed"


@pytest.mark.parametrize(
    ("outcome", "state", "shown"),
    [
        (None, "unresolved", "pending"),
        (Outcome(OutcomeKind.DONE, 100), "finished", "done"),
        (Outcome(OutcomeKind.DONE, 60), "unresolved", "pending"),
        (stall(), "failed", "stalled"),
        (Outcome(OutcomeKind.PRUNED, 20, val_loss=3.0), "unresolved", "pruned"),
        (Outcome(OutcomeKind.OOM, 20), "unresolved", "oom"),
        (Outcome(OutcomeKind.BUG, 0, message="boom"), "unresolved", "bug"),
        (Outcome(OutcomeKind.DONE, 100, formats="lm_head: E5M2->E4M3"), "shifted", "done"),
        (replace(stall(), formats="lm_head: E5M2->E4M3"), "shifted", "stalled"),
        (Outcome(OutcomeKind.PRUNED, 20, formats="lm_head: E5M2->E4M3"), "unresolved", "pruned"),
        (Outcome(OutcomeKind.OOM, 20, formats="lm_head: E5M2->E4M3"), "unresolved", "oom"),
    ],
)
def test_state_of_an_ending(tmp_path: Path, outcome: Outcome | None, state: str, shown: str) -> None:
    record(tmp_path, TrainConfig(steps=100), outcome, [{"step": 100, "val_loss": 2.5}])
    trial = load(tmp_path).trials.iloc[0]
    assert (trial["state"], trial["outcome"]) == (state, shown)
    assert trial["formats"] == ((outcome and outcome.formats) or "")


@pytest.mark.parametrize(("value", "state"), [(2.5, "finished"), (math.nan, "failed"), (None, "unresolved")])
def test_the_final_loss_is_read_from_the_last_row(tmp_path: Path, value: float | None, state: str) -> None:
    """An outcome's own loss may be of an earlier evaluation: of a run that was resumed at its last step."""
    outcome = Outcome(OutcomeKind.DONE, 100, val_loss=1.0)
    record(tmp_path, TrainConfig(steps=100), outcome, [{"step": 50, "val_loss": 1.0}, {"step": 100, "val_loss": value}])
    trial = load(tmp_path).trials.iloc[0]
    assert trial["state"] == state and (trial["val_loss"] == 2.5) == (state == "finished")


LATER = [
    Outcome(OutcomeKind.DONE, 40, val_loss=1.9),
    stall(step=30),
    explode(step=33),
    Outcome(OutcomeKind.PRUNED, 40, signal="val_loss"),
]


@pytest.mark.parametrize("later", LATER, ids=lambda outcome: str(outcome.kind))
def test_a_longer_run_is_read_at_the_step_asked_for(tmp_path: Path, later: Outcome) -> None:
    rows = [
        {"step": 10, "train_loss": 5.0, "flip_yield": 0.9},
        {"step": 20, "train_loss": 2.7, "val_loss": 2.8, "bits_per_byte": 4.0, "flip_yield": 0.8},
        {"step": 30, "train_loss": 2.2, "flip_yield": 0.1},
    ]
    record(tmp_path, TrainConfig(steps=20), later, rows)
    records = load(tmp_path)
    trial = records.trials.iloc[0]
    assert (trial["state"], trial["outcome"], trial["step"]) == ("finished", "done", 20)
    assert (trial["train_loss"], trial["val_loss"], trial["bits_per_byte"]) == (2.7, 2.8, 4.0)
    assert trial["flip_yield"] == 0.8 and trial["first_loss"] == 5.0 and trial["signal"] == ""
    assert list(records.rows["step"]) == [10, 20], "pictures, too, compare at equal steps"


def test_a_longer_run_without_an_evaluation_there_says_so(tmp_path: Path) -> None:
    record(tmp_path, TrainConfig(steps=20), LATER[0], [{"step": 20, "train_loss": 2.7}])
    trial = load(tmp_path).trials.iloc[0]
    assert (trial["state"], trial["message"]) == ("unresolved", "not evaluated at step 20 (trained to step 40)")


def test_a_stop_at_the_last_step_asked_for_is_a_stop(tmp_path: Path) -> None:
    record(tmp_path, TrainConfig(steps=30), stall(step=30), [{"step": 30, "val_loss": 2.8}])
    assert load(tmp_path).trials["state"][0] == "failed"


def test_a_stop_by_a_guard_that_is_gone_is_no_result(tmp_path: Path) -> None:
    kept = tuple(rule for rule in DEFAULT_GUARDS if rule.kind != "stalled")
    record(tmp_path, TrainConfig(guards=kept), stall())
    assert load(tmp_path).trials["outcome"][0] == "pending"


def test_final_signals_are_the_last_that_were_measured(tmp_path: Path) -> None:
    rows = [
        {"step": step, "train_loss": 2.0, "flip_yield": value} for step, value in enumerate([0.9, 0.7, None], start=1)
    ]
    record(tmp_path, TrainConfig(), None, rows)
    trial = load(tmp_path).trials.iloc[0]
    assert trial["flip_yield"] == 0.7 and math.isnan(trial["stable_rank"])


def test_columns_of_the_results(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw", "grid"], seeds=2))
    results = results_table(load(tmp_path).trials)
    assert len(results) == 8 and set(results["optimizer"]) == {"adamw", "grid"}
    assert results[results["optimizer"] == "grid"]["rung_clip"].eq(10).all()
    assert results[results["optimizer"] == "adamw"]["rung_clip"].isna().all()
    needed = (
        "trial_id format optimizer policy lr rung_clip seed outcome signal layer step value limit "
        "val_loss bits_per_byte"
    )
    assert set(needed.split()) <= set(results.columns)


def test_settings_are_not_mixed(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], seeds=3))
    wider = ModelConfig(width=128)
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], seeds=2, overrides={"model": wider}))
    records = newest_setting(load(tmp_path))
    assert (len(records.trials), records.outside) == (2, 3)
    assert set(records.rows["trial_id"]) == set(records.trials["trial_id"])


def test_a_sweep_is_its_trials_in_its_order(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], seeds=2))
    ids = list(load(tmp_path).trials["trial_id"])
    records = of_sweep(load(tmp_path), [ids[2], ids[0], "unknown"])
    assert list(records.trials["trial_id"]) == [ids[2], ids[0]] and records.outside == 2
    assert set(records.rows["trial_id"]) == {ids[2], ids[0]}


def test_the_ledger_is_opened_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"]))
    opened = []
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **kw: opened.append(a[0]) or connect(*a, **kw))
    load(tmp_path)
    reader = connect(opened[0], uri=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.execute("DELETE FROM trials")
    reader.close()


def test_the_ledger_is_read_beside_a_writer(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"]))
    before = (tmp_path / "ledger.sqlite").read_bytes()
    writer = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")  # a driver in the middle of writing must not stop a reader
    assert len(load(tmp_path).trials) == 2
    writer.execute("ROLLBACK")
    writer.close()
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


def test_a_folder_without_a_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ledger\.sqlite"):
        load(tmp_path)
    assert not (tmp_path / "ledger.sqlite").exists()


def test_an_empty_ledger_has_no_trials(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    assert load(tmp_path).trials.empty


def test_the_floor_needs_no_ray() -> None:
    code = (
        "import sys, altgrad.analysis.report; "
        "print([name for name in ('ray', 'wandb', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
