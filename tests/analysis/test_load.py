"""What the ledger says comes back as it was, and what says nothing is kept apart."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import DATA, Plan, explode, stall, write_ledger

from altgrad.analysis.load import load, newest_setting, results_table
from altgrad.sweep.ledger import Ledger
from altgrad.training.config import ModelConfig, TrainConfig
from altgrad.training.guards import DEFAULT_GUARDS
from altgrad.training.outcome import Outcome, OutcomeKind


def record(out_dir: Path, config: TrainConfig, outcome: Outcome | None,
           rows: list[dict] | None = None) -> None:
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


@pytest.mark.parametrize(("outcome", "state", "shown"), [
    (None, "unresolved", "pending"),
    (Outcome(OutcomeKind.DONE, 100, val_loss=2.5), "finished", "done"),
    (Outcome(OutcomeKind.DONE, 100, val_loss=math.nan), "failed", "done"),
    (Outcome(OutcomeKind.DONE, 100), "unresolved", "done"),
    (Outcome(OutcomeKind.DONE, 60, val_loss=2.5), "unresolved", "pending"),
    (stall(), "failed", "stalled"),
    (Outcome(OutcomeKind.PRUNED, 20, val_loss=3.0), "unresolved", "pruned"),
    (Outcome(OutcomeKind.OOM, 20), "unresolved", "oom"),
    (Outcome(OutcomeKind.BUG, 0, message="boom"), "unresolved", "bug"),
])
def test_state_of_an_ending(tmp_path: Path, outcome: Outcome | None, state: str, shown: str) -> None:
    record(tmp_path, TrainConfig(steps=100), outcome)
    trial = load(tmp_path).trials.iloc[0]
    assert (trial["state"], trial["outcome"]) == (state, shown)


def test_a_stop_by_a_guard_that_is_gone_is_no_result(tmp_path: Path) -> None:
    kept = tuple(rule for rule in DEFAULT_GUARDS if rule.kind != "stalled")
    record(tmp_path, TrainConfig(guards=kept), stall())
    assert load(tmp_path).trials["outcome"][0] == "pending"


def test_final_signals_are_the_last_that_were_measured(tmp_path: Path) -> None:
    rows = [{"step": step, "train_loss": 2.0, "flip_yield": value}
            for step, value in enumerate([0.9, 0.7, None], start=1)]
    record(tmp_path, TrainConfig(), None, rows)
    trial = load(tmp_path).trials.iloc[0]
    assert trial["flip_yield"] == 0.7 and math.isnan(trial["stable_rank"])


def test_columns_of_the_results(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw", "grid"], seeds=2))
    results = results_table(load(tmp_path).trials)
    assert len(results) == 8 and set(results["optimizer"]) == {"adamw", "grid"}
    assert results[results["optimizer"] == "grid"]["rung_clip"].eq(10).all()
    assert results[results["optimizer"] == "adamw"]["rung_clip"].isna().all()
    needed = ("trial_id format optimizer policy lr rung_clip seed outcome signal layer step value limit "
              "val_loss bits_per_byte")
    assert set(needed.split()) <= set(results.columns)


def test_settings_are_not_mixed(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], seeds=3))
    wider = ModelConfig(width=128)
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], seeds=2, overrides={"model": wider}))
    records = newest_setting(load(tmp_path))
    assert (len(records.trials), records.outside) == (2, 3)
    assert set(records.rows["trial_id"]) == set(records.trials["trial_id"])


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
    code = ("import sys, altgrad.analysis.report; "
            "print([name for name in ('ray', 'wandb', 'datasets') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
