"""Another program holds the ledger: who writes waits, who reads gives up in one line; both say so and lose nothing."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from smallest import SMALLEST

from altgrad.cli import main
from altgrad.sweep.options import RunOptions
from altgrad.sweep.record import held, monitor, read_only
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.spend import Spend
from altgrad.sweep.run import preflight, run_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome, OutcomeKind

SHA = "a" * 64
SPEC = SweepSpec.model_validate(SMALLEST | {"name": "held", "seeds": 1, "steps": 20})
TRIALS = SPEC.trials(SHA)
NAME = next(iter(TRIALS))
HOLDS = {
    "exclusive": ("PRAGMA journal_mode=delete", "BEGIN EXCLUSIVE"),
    "exclusive, with a log": ("PRAGMA journal_mode=wal", "BEGIN EXCLUSIVE"),
    "a reader of a journal": ("PRAGMA journal_mode=delete", "BEGIN", "SELECT * FROM trials"),
    "locking mode": ("PRAGMA journal_mode=wal", "PRAGMA locking_mode=exclusive", "BEGIN IMMEDIATE"),
}
WRITES: dict[str, Callable[[Ledger], object]] = {
    "trials": lambda ledger: ledger.add_trials(TRIALS, SHA),
    "rows": lambda ledger: ledger.record_rows(NAME, [{"step": 21, "train_loss": 1.0}]),
    "outcome": lambda ledger: ledger.record_outcome(NAME, Outcome(OutcomeKind.DONE, 21)),
    "sample": lambda ledger: ledger.add_sample("s", 0, {}, [NAME]),
    "mutations": lambda ledger: ledger.add_mutations([(NAME, 5, "lr", 1.0, 2.0, NAME)]),
    "applied": lambda ledger: ledger.mutations_applied([(NAME, 5, "lr", 1.0, 2.0, NAME)]),
    "note": lambda ledger: ledger.note("a", "b"),
    "spend": lambda ledger: ledger.record_spend(1.0, Spend(1.0, 1.0, 1.0)),
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    out = tmp_path / "sweep"
    with Ledger(out / "ledger.sqlite") as ledger:
        ledger.add_trials(TRIALS, SHA)
        for name in TRIALS:
            ledger.record_rows(name, [{"step": 20, "train_loss": 2.0, "val_loss": 2.0}])
            ledger.record_outcome(name, Outcome(OutcomeKind.DONE, 20, val_loss=2.0, train_loss=2.0))
    return out


@contextlib.contextmanager
def holding(path: Path, how: tuple[str, ...]) -> Iterator[sqlite3.Connection]:
    """The database, held by another connection until it is rolled back or the context ends."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for statement in how:
            other.execute(statement).fetchone()
        yield other
    finally:
        other.close()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("how", [HOLDS["exclusive"], HOLDS["a reader of a journal"]], ids=["writer", "reader"])
def test_a_write_waits_says_so_once_and_is_done(
    sweep: Path,
    how: tuple[str, ...],
    write: Callable[[Ledger], object],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(held, "TRY_SECONDS", 0.01)
    monkeypatch.setattr(held, "SAID_AFTER_SECONDS", 0.1)
    path = sweep / "ledger.sqlite"
    with holding(path, how[:1]), Ledger(path) as ledger, holding(path, how[1:]) as other:
        free = threading.Timer(0.3, other.close)
        free.start()
        write(ledger)
        free.join()
        said = [record.getMessage() for record in caplog.records]
        assert [line for line in said if "another program" in line] == said[:1] and str(path) in said[0], said
    before = dump(path)
    with Ledger(path) as ledger:
        write(ledger)
    assert [line for line in dump(path) if "trials" in line] == [line for line in before if "trials" in line]
    assert len(dump(path)) == len(before), "what was to be written stood there once already"


def dump(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize(
    "words",
    [["status", "{out}"], ["why", "{out}"], ["report", "{out}"], ["best", "{out}"], ["compare", "{out}", "{out}"]],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("how", ["exclusive", "locking mode"])
def test_a_reader_gives_up_in_one_line(
    sweep: Path, how: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "TRY_SECONDS", 0.01)
    monkeypatch.setattr(monitor, "READER_SECONDS", 0.2)
    path = sweep / "ledger.sqlite"
    with holding(path, HOLDS[how]):
        assert main([word.format(out=sweep) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and "another program holds" in said and "aside" not in said
    assert main([word.format(out=sweep) for word in words]) == 0, capsys.readouterr().err


def test_what_is_held_in_the_middle_of_reading_is_one_line_too(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, patience: float = 0) -> bool:
        raise held.HeldError(f"{path}: another program holds this file")

    monkeypatch.setattr(read_only, "current", refuse)
    for command in ("status", "why", "report", "best"):
        assert main([command, str(sweep)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "another program holds" in said and "aside" not in said


def test_an_interrupt_is_answered_while_a_write_waits(sweep: Path) -> None:
    path = sweep / "ledger.sqlite"
    with Ledger(path) as ledger, holding(path, HOLDS["exclusive"][1:]):
        ledger.hurry(0.1)
        begun = time.monotonic()
        with ledger.unless_held():
            ledger.note("a", "b")
        assert time.monotonic() - begun < 2 * held.TRY_SECONDS
    with Ledger.reading(path) as ledger:
        assert ledger.notices() == {}


def test_a_driver_waits_at_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "TRY_SECONDS", 0.01)
    monkeypatch.setattr(held, "SAID_AFTER_SECONDS", 0.1)
    path = tmp_path / "sweep" / "ledger.sqlite"
    trials = SPEC.trials(preflight(SPEC).sha256)
    with Ledger(path) as ledger:
        ledger.add_trials(trials, SHA)
        for name in trials:
            ledger.record_outcome(name, Outcome(OutcomeKind.DONE, 20, val_loss=2.0, train_loss=2.0))
    with holding(path, HOLDS["exclusive"]) as other:
        free = threading.Timer(1.0, other.close)
        free.start()
        result = run_sweep(SPEC, RunOptions(out=path.parent))
        free.join()
    assert result.endings == {"done": 2} and not result.ran
    assert sum("another program holds" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.slow
def test_a_sweep_waits_and_goes_on(tmp_path: Path, running_ray: str, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "sweep"
    path = out / "ledger.sqlite"
    spec = SPEC.changed(steps=500)

    def hold() -> None:
        while not list(out.glob("trials/*/metrics.jsonl")):
            time.sleep(0.1)
        with holding(path, HOLDS["exclusive"][1:]):
            time.sleep(40)

    with caplog.at_level(logging.WARNING):
        holder = threading.Thread(target=hold)
        holder.start()
        result = run_sweep(spec, RunOptions(out=out, address=running_ray))
        holder.join()
    assert result.endings == {"done": 2}
    with Ledger.reading(path) as ledger:
        assert set(ledger.row_counts().values()) == {500}
    said = [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]
    assert len(said) == 2 and "another program holds" in said[0] and "going on" in said[1]
