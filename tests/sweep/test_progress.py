"""The display counts right, and its estimate is measured."""

from io import StringIO

import pytest
from rich.console import Console

from altgrad.sweep.record import progress as module
from altgrad.sweep.record.progress import Progress
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome, OutcomeKind

TRIALS = SweepSpec(formats=("E5M2",), optimizers=("grid",)).trials("a" * 64)
DONE = Outcome(kind=OutcomeKind.DONE, step=100)
STALLED = Outcome(kind=OutcomeKind.STALLED, step=30, signal="flip_yield")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_estimate_starts_with_the_first_result_and_learns_from_early_endings(clock: list[float]) -> None:
    first, second, *_ = TRIALS
    shown = Progress(TRIALS, len(TRIALS), live=False)
    assert shown.seconds_left() is None and shown.settled_share() == 0
    clock[0] += 50
    shown.reached(first, 20)
    assert shown.seconds_left() is None, "one result is no rate"
    clock[0] += 4
    shown.reached(first, 60)
    assert shown.settled_share() == pytest.approx(0.15)
    assert shown.seconds_left() == pytest.approx(4 / 0.10 * 0.85)
    clock[0] += 1
    shown.ended(first, DONE)
    shown.ended(second, STALLED)
    assert shown.settled_share() == pytest.approx(0.5)
    assert shown.seconds_left() == pytest.approx(5 / 0.45 * 0.5)


def test_the_line_counts_earlier_and_present_endings(clock: list[float]) -> None:
    first, second, third, _ = TRIALS
    shown = Progress(TRIALS, len(TRIALS) + 6, live=False)
    shown.reached(first, 10)
    shown.ended(second, STALLED)
    shown.reached(third, 10)
    shown.ended(third, None)
    assert shown.line().startswith("7/10 trials ended (1 stalled by flip_yield), 1 running, 2 waiting")


def test_a_pipe_gets_a_line_at_most_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(TRIALS, len(TRIALS), live=False) as shown:
        for step in range(1, 101):
            clock[0] += 0.25
            shown.reached(next(iter(TRIALS)), step)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("asks_token", [True, False])
def test_a_guarded_dashboard_comes_with_the_line_that_gets_its_token(
    asks_token: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(TRIALS, len(TRIALS), live=False) as shown:
        shown.watch("http://127.0.0.1:8265", asks_token=asks_token)
    said = capsys.readouterr().out
    assert "Ray dashboard: http://127.0.0.1:8265\n" in said
    assert ("ray get-auth-token\n" in said) == ("ray list actors" in said) == asks_token


def test_a_terminal_gets_a_table() -> None:
    shown = Progress(TRIALS, len(TRIALS), live=True)
    shown.watch("http://127.0.0.1:8265")
    shown.reached(next(iter(TRIALS)), 10)
    console = Console(file=StringIO(), width=120)
    console.print(shown._table())
    text = console.file.getvalue()
    assert "10/100" in text and "BF16 adamw uniform seed 0" in text and "127.0.0.1:8265" in text
