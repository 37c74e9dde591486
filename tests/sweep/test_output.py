"""Nothing dies of how, or whether, it can be printed: closed, full and broken streams, and poor encodings."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from smallest import SMALLEST

from altgrad.commands import output
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome, OutcomeKind

ASCII = {
    "PYTHONIOENCODING": {"PYTHONIOENCODING": "ascii"},
    "LC_ALL": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""},
    "latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
}
SPEC = SweepSpec(formats=("BF16", "E5M2"), optimizers=("adamw", "grid"), seeds=6, steps=20)
SHA = "a" * 64


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sweep"
    with Ledger(out / "ledger.sqlite") as ledger:
        trials = SPEC.trials(SHA)
        ledger.add_trials(trials, SHA)
        for name, config in trials.items():
            loss = 2.5 + 0.01 * config.seed + 0.02 * (config.arm == "grid")
            rows = [{"step": 1, "train_loss": 5.5}, {"step": 20, "train_loss": loss, "val_loss": loss}]
            ledger.record_rows(name, rows)
            done = Outcome(OutcomeKind.DONE, 20, val_loss=loss, train_loss=loss, message="− × é")
            ledger.record_outcome(name, done)
    return out


def call(words: str, redirect: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    line = f'exec "$0" -m altgrad {words} {redirect}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable], capture_output=True, env=os.environ | variables, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 1, b"stdout can't be written (it is closed)"),
        ("> /dev/full", 1, b"stdout can't be written (No space left on device)"),
        (">&- 2>&-", 1, b""),
        ("<&- >&- 2>&-", 1, b""),
        ("> /dev/full 2> /dev/full", 1, b""),
        ("2>&-", 0, b""),
        ("2> /dev/full", 0, b""),
        ("> >(true)", 128 + signal.SIGPIPE, b""),
    ],
)
@pytest.mark.parametrize("words", ["status {out}", "--help"], ids=["status", "help"])
def test_an_answer_that_cant_be_printed(sweep: Path, words: str, redirect: str, code: int, said: bytes) -> None:
    done = call(words.format(out=sweep), redirect)
    assert done.returncode in ({code, 0} if "true" in redirect else {code}), done
    assert done.stderr.count(b"\n") == bool(said) and said in done.stderr, done.stderr


@pytest.mark.parametrize("redirect", ["2>&-", "2> /dev/full", "> /dev/full 2>&-"])
def test_a_refusal_that_cant_be_printed_is_one_still(redirect: str) -> None:
    assert call("status /nonexistent", redirect).returncode == 2


@pytest.mark.parametrize("variables", ASCII.values(), ids=ASCII)
def test_an_answer_is_printed_in_any_encoding(sweep: Path, variables: dict[str, str]) -> None:
    name = next(iter(SPEC.trials(SHA)))
    done = call(f"why {sweep} {name}", **variables)
    assert (done.returncode, done.stderr) == (0, b""), done
    assert b"- x" in done.stdout or "− ×".encode("latin-1", "ignore") in done.stdout


@pytest.mark.slow
def test_a_report_is_written_in_a_locale_without_its_letters(sweep: Path, tmp_path: Path) -> None:
    done = call(f"report {sweep} --to {tmp_path / 'to'}", **ASCII["LC_ALL"])
    assert (done.returncode, done.stderr) == (0, b"") and b"* Which" in done.stdout, done
    report = (tmp_path / "to" / "report.html").read_text(encoding="utf-8")
    assert "−" in report or "×" in report or "·" in report


@pytest.mark.parametrize(
    ("text", "plain"),
    [("1 − 2", "1 - 2"), ("3 × 4 ± 1", "3 x 4 +- 1"), ("a ≥ b…", "a >= b..."), ("/tmp/é\udcff", "/tmp/\\xe9\\udcff")],
)
def test_what_an_encoding_lacks_is_spelled(text: str, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with output.guarded():
        print(text)
    assert raw.getvalue().decode() == f"{plain}\n"


def test_a_sweep_says_once_that_its_output_is_lost_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        with output.guarded() as out:
            out.goes_on = True
            print("one")
            print("two", flush=True)
    assert capsys.readouterr().err == (
        "altgrad: stdout can't be written (No space left on device); the sweep goes on without\n"
    )


def smallest(folder: Path) -> str:
    file = folder / "smallest.json"
    file.write_text(json.dumps(SMALLEST | {"seeds": 1, "steps": 20, "eval_interval": 10}))
    return f"run {file} --out {folder / 'out'}"


@pytest.mark.slow
@pytest.mark.parametrize(("redirect", "said"), [(">&-", b"it is closed"), ("> >(true)", b"pipe"), ("2>&-", b"")])
def test_a_sweep_without_a_reader_is_run_whole(tmp_path: Path, redirect: str, said: bytes) -> None:
    done = call(smallest(tmp_path), redirect)
    assert done.returncode == 0 and said.lower() in done.stderr.lower() and b"Traceback" not in done.stderr, done
    with Ledger.reading(tmp_path / "out" / "ledger.sqlite") as ledger:
        assert {outcome.kind for outcome in ledger.outcomes().values()} == {OutcomeKind.DONE}
    assert (tmp_path / "out" / "report" / "report.html").exists()


@pytest.mark.slow
def test_a_terminal_that_goes_away_ends_a_sweep_in_order(tmp_path: Path) -> None:
    words = smallest(tmp_path).replace("run ", "run --steps 100000 ")
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "altgrad", *words.split()],
        stdin=slave,
        stdout=slave,
        stderr=(tmp_path / "err").open("wb"),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as driver:
        os.close(slave)
        deadline = time.monotonic() + 200
        os.set_blocking(master, False)
        while not list((tmp_path / "out" / "trials").glob("*/checkpoint/state.pt")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
            with contextlib.suppress(BlockingIOError):
                os.read(master, 1 << 16)
        os.close(master)
        driver.wait(60)
    said = (tmp_path / "err").read_text(encoding="utf-8")
    assert driver.returncode == 128 + signal.SIGHUP and "what is recorded stays" in said and "Traceback" not in said
    with Ledger.reading(tmp_path / "out" / "ledger.sqlite") as ledger:
        assert ledger.row_counts()
    assert not (tmp_path / "out" / ".tune").exists()
