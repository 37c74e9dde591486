"""Torn files and read-only places: the file is named, what is whole is read, and nothing is changed by looking."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.cli import main
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome, OutcomeKind

SHA = "a" * 64
SPEC = SweepSpec(formats=("BF16", "E5M2"), optimizers=("adamw",), seeds=2, steps=20)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    out = tmp_path / "sweep"
    trials = SPEC.trials(SHA)
    with Ledger(out / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, SHA)
        for name, config in trials.items():
            loss = 2.5 + 0.01 * config.seed
            rows = [{"step": 1, "train_loss": 5.5}, {"step": 20, "train_loss": loss, "val_loss": loss}]
            ledger.record_rows(name, rows)
            ledger.record_outcome(name, Outcome(OutcomeKind.DONE, 20, val_loss=loss, train_loss=loss))
    manifest = {"spec": SPEC.model_dump(mode="json"), "trials": list(trials)}
    (out / "sweep.json").write_text(json.dumps(manifest))
    return out


def row(step: int) -> str:
    return json.dumps({"step": step, "train_loss": 2.0}) + "\n"


@pytest.mark.parametrize("torn", ['{"step": 2, "tra\n', "\n", "[]\n", '{"train_loss": 1.0}\n', "\x00\x00\x00\n"])
def test_a_torn_line_is_named_and_skipped(sweep: Path, torn: str, caplog: pytest.LogCaptureFixture) -> None:
    name = next(iter(SPEC.trials(SHA)))
    folder = sweep / "trials" / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(row(1) + torn + row(3))
    with Ledger(sweep / "ledger.sqlite") as ledger, caplog.at_level(logging.WARNING):
        Recorder(ledger, sweep / "trials").follow(name)
        assert ledger.row_counts()[name] == 3, "steps 1 and 3, beside 20"
    assert f"{folder / 'metrics.jsonl'}: the line at byte {len(row(1))} is torn" in caplog.text


@pytest.mark.parametrize("torn", ["", "{", '{"kind": "nonsense", "step": 1}', "[]", '{"step": 3}'])
def test_a_torn_outcome_leaves_the_trial_to_go_on(sweep: Path, torn: str, caplog: pytest.LogCaptureFixture) -> None:
    name = next(iter(SPEC.trials(SHA)))
    folder = sweep / "trials" / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(row(1))
    (folder / "outcome.json").write_text(torn)
    with Ledger(sweep / "new.sqlite") as ledger, caplog.at_level(logging.WARNING):
        ledger.add_trials(SPEC.trials(SHA), SHA)
        Recorder(ledger, sweep / "trials").ingest([name])
        assert name in ledger.remaining(SPEC.trials(SHA))
    assert f"{folder / 'outcome.json'} is torn" in caplog.text


COMMANDS = (["status", "{out}"], ["why", "{out}"], ["best", "{out}"], ["report", "{out}", "--to", "{to}"])


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("torn", ["pages", "no database", "empty"])
def test_a_damaged_ledger_is_named_with_the_mend(
    sweep: Path, torn: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        if torn == "pages":
            for place in range(4096, size, 4096):
                file.seek(place)
                file.write(b"\xde\xad" * 2048)
        else:
            file.truncate(0)
            file.write(b"no database at all, but long enough" * 40 if torn == "no database" else b"")
    assert main([word.format(out=sweep, to=sweep.parent / "to") for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said
    assert torn == "empty" or "move it aside" in said


@pytest.mark.parametrize("words", COMMANDS[2:], ids=lambda words: words[0])
@pytest.mark.parametrize("torn", ["", '{"trials": [', "[1]"])
def test_a_torn_manifest_is_named(sweep: Path, torn: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (sweep / "sweep.json").write_text(torn)
    assert main([word.format(out=sweep, to=sweep.parent / "to") for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{sweep / 'sweep.json'} is torn" in said and "writes it again" in said


def seen(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_looking_changes_nothing(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = seen(sweep)
    for words in COMMANDS:
        assert main([word.format(out=sweep, to=sweep.parent / "to") for word in words]) == 0
    assert {name: found for name, found in seen(sweep).items() if not name.endswith(("-wal", "-shm"))} == {
        name: found for name, found in before.items() if not name.endswith(("-wal", "-shm"))
    }


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a read-only mount needs root")
@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "killed with its log"])
def test_a_read_only_mount_can_be_read(sweep: Path, is_open: bool) -> None:
    """Also where the write-ahead log holds what the database does not, as a killed driver leaves it."""
    if is_open:
        copy = sweep.parent / "copy"
        with Ledger(sweep / "ledger.sqlite") as ledger:
            ledger.record_rows(next(iter(ledger.trials())), [{"step": 19, "train_loss": 2.6}])
            shutil.copytree(sweep, copy)
        assert (copy / "ledger.sqlite-wal").stat().st_size, "the last row is in the log alone"
        (copy / "ledger.sqlite-shm").unlink(missing_ok=True)
        sweep = copy
    script = f"mount --bind {sweep} {sweep} && mount -o remount,bind,ro {sweep} && cd {sweep.parent} && "
    for words in (["status"], ["why"], ["best"], ["report"]):
        command = " ".join([sys.executable, "-m", "altgrad", *words, str(sweep)])
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", script + command], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        if words == ["status"]:
            assert f"4 of 4 trials ended, {8 + is_open} steps recorded" in done.stdout
        if words == ["report"]:
            assert "the report goes to" in done.stdout and (sweep.parent / f"{sweep.name}-report/report.md").exists()


def test_an_older_ledger_is_read_without_being_changed(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE rows DROP COLUMN f1_macro")
        connection.execute("DROP TABLE notices")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    before = path.read_bytes()
    for words in COMMANDS:
        assert main([word.format(out=sweep, to=sweep.parent / "to") for word in words]) == 0
    assert path.read_bytes() == before
