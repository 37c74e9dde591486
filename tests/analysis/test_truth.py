"""The report against planted truth: what it must say, and what it must never say.

A case is a sweep with known effects, written to a ledger and read back by `altgrad report`; how often decisions are
false is in test_decisions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from planted import BASE
from synthetic import Plan, stall, write_ledger
from truths import CASES, OOM, PLAIN, Effects, mended, offsets

from altgrad.analysis import curves
from altgrad.cli import main
from altgrad.sweep.record.ledger import Ledger
from altgrad.training.outcome import Outcome


def said(out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """The three answers that `altgrad report` prints, and the rest."""
    assert main(["report", str(out), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    page = (out / "report" / "report.md").read_text()
    assert all(line[2:].split("? ", 1)[1] in page for line in lines[:3]), "the page says what the terminal says"
    return [*(line.split("? ", 1)[1] for line in lines[:3]), "\n".join(lines[3:])]


@pytest.mark.parametrize("name", CASES)
def test_the_report_says_what_was_planted(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    formats, arms, seeds, effects, expected, forbidden = CASES[name]
    base = offsets({key: value for key, value in effects.items() if len(key) == 2})

    def offset(*at: object) -> object:
        return effects[at] if at in effects else base(*at)  # type: ignore[index]

    answers = said(write_ledger(tmp_path, Plan(formats, arms, seeds, offset=offset)), capsys)  # type: ignore[arg-type]
    for place, text in expected:
        assert text in answers[place]
    for text in forbidden:
        assert text not in "\n".join(answers), text


@pytest.mark.parametrize(
    ("reference", "own", "expected"),
    [
        ((1e-3, 3e-3), (1e-3, 3e-3), "E5M2 trains (decided)"),
        ((3e-3,), (1e-3, 3e-3), "arms are compared over the rates that all have (0.003): adamw ran 2."),
        (
            (3e-3,),
            (1e-3, 2e-3),
            "Exploratory, for no other cell of the arm shares their settings: E5M2 adamw and BF16 adamw",
        ),
    ],
)
def test_learning_rates_are_compared_over_equal_grids(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reference: tuple[float, ...],
    own: tuple[float, ...],
    expected: str,
) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], 4, lrs=reference, offset=offsets({})))
    write_ledger(tmp_path, Plan(["E5M2"], ["adamw"], 4, lrs=own, offset=offsets({})))
    answers = said(tmp_path, capsys)
    assert expected in "\n".join(answers)
    assert ("E5M2 trains (decided)" in answers[0]) is ("Exploratory" not in expected)


@pytest.mark.parametrize(("ending", "found"), [(OOM, ("+0.10", "+0.09")), (mended(), ("+0.05", "+0.04"))])
def test_a_lost_seed_costs_its_seed_and_a_shifted_one_its_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: Outcome, found: tuple[str, ...]
) -> None:
    """A better rate that lost a seed is still the better one; one that needed another format is not."""
    rates = {1e-3: -0.05, 3e-3: -0.10}
    for rate, gain in rates.items():
        base = offsets({("E4M3", "manifold"): gain})

        def offset(name: str, arm: str, seed: int, rate: float = rate, base: Callable[..., object] = base) -> object:
            return ending if (name, arm, seed, rate) == ("E4M3", "manifold", 1, 3e-3) else base(name, arm, seed)

        write_ledger(tmp_path, Plan(["BF16", "E4M3", "E5M2"], PLAIN, 6, lrs=(rate,), offset=offset))  # type: ignore[arg-type]
    answers = said(tmp_path, capsys)
    assert any(f"E4M3 with manifold benefits most (decided): {gain}" in answers[1] for gain in found)


def test_runs_that_needed_another_format_are_shown_as_such_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    effects: Effects = {("E4M3", "adamw"): mended(), ("E5M2", "adamw"): 0.01}
    write_ledger(tmp_path, Plan(["BF16", "E4M3", "E5M2"], ["adamw"], 2, offset=offsets(effects, 0)))
    drawn: list[set[str]] = []
    monkeypatch.setattr(curves, "loss_curves", lambda own, *rest: drawn.append({*own["format"]}))
    said(tmp_path, capsys)
    assert drawn == [{"BF16", "E5M2"}], "a curve under a format's name is of that format alone"
    table = pd.read_csv(tmp_path / "report" / "results.csv")
    assert set(table[table["format"] == "E4M3"]["formats"]) == {"lm_head: E4M3->E5M2"}
    assert table[table["format"] != "E4M3"]["formats"].isna().all()
    for name in ("report.md", "report.html"):
        page = (tmp_path / "report" / name).read_text().replace("&gt;", ">")
        assert "Runs that needed another format" in page and "lm_head: E4M3->E5M2" in page
        assert (
            "6 trials: 4 done, 2 done after a shift." in page and "shifted 2 of 2" in page and "needed rescue" in page
        )
        assert "0.500" not in page.partition("Runs that needed another format")[0]
    assert main(["why", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2 and all(
        "done after a shift" in line and "shifted: lm_head: E4M3->E5M2" in line for line in lines
    )
    assert main(["status", str(tmp_path)]) == 0 and "done after a shift  2" in capsys.readouterr().out
    assert main(["best", str(tmp_path)]) == 0
    best = capsys.readouterr().out
    assert (
        best.startswith("E5M2 adamw") and "1 configuration left out: a layer had to be moved to another format" in best
    )


def test_other_policies_are_named_and_their_failures_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E4M3", "E5M2"], PLAIN, 4, offset=offsets({})))
    effects: Effects = {("E4M3", "adamw"): stall(), ("E5M2", "adamw"): 2.0}
    write_ledger(tmp_path, Plan(["E4M3", "E5M2"], PLAIN, 4, policy="head_bf16", offset=offsets(effects)))
    answers = said(tmp_path, capsys)
    assert "Stopped elsewhere: E4M3 adamw (head_bf16), 4 of 4 seeds." in answers[2]
    assert "The answers are for policy uniform; the tables hold head_bf16: 2 train, 2 fail." in answers[3]


def test_a_torn_and_growing_ledger_is_reported_as_far_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver that died, or still runs: trials without an end, rows without an outcome."""
    write_ledger(tmp_path, Plan(["BF16", "E4M3", "E5M2"], PLAIN, 4, offset=offsets({("E4M3", "manifold"): -0.1})))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection, connection:
        connection.execute(
            "DELETE FROM outcomes WHERE trial_id IN (SELECT trial_id FROM trials WHERE seed = 3 AND format != 'BF16')"
        )
        connection.execute(
            "DELETE FROM rows WHERE step > 40 AND trial_id IN (SELECT trial_id FROM trials WHERE seed = 3)"
        )
    with Ledger(tmp_path / "ledger.sqlite") as running:
        answers = said(tmp_path, capsys)
        assert running.trials()
    assert "E4M3 with manifold benefits most (decided)" in answers[1]
    assert "Incomplete: 18 of 24 trials have a result." in answers[3]


@pytest.mark.slow
def test_planted_losses_of_real_trials_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """36 trials of 20 steps, trained by a sweep on Ray; then only their final losses are written over."""
    out = tmp_path / "sweep"
    words = "--formats BF16,E4M3,E5M2 --optimizers adamw,manifold --seeds 6 --steps 20 --wandb off --max-concurrent 2"
    assert main(["run", *words.split(), "--out", str(out)]) == 0
    last = capsys.readouterr().out
    assert "Which 8-bit formats train?" in last and "36 trials: 36 done" in last
    effects: Effects = {("BF16", "manifold"): -0.20, ("E4M3", "manifold"): -0.12, ("E5M2", "adamw"): 0.9}
    offset = offsets(effects | {("E5M2", "manifold"): 0.9})
    with closing(sqlite3.connect(out / "ledger.sqlite")) as connection, connection:
        trials = connection.execute("SELECT trial_id, format, arm, seed FROM trials").fetchall()
        assert len(trials) == 36
        for trial_id, *at in trials:
            loss = BASE + offset(*at)  # type: ignore[operator]
            connection.execute("UPDATE outcomes SET val_loss = ? WHERE trial_id = ?", (loss, trial_id))
            connection.execute("UPDATE rows SET val_loss = ? WHERE trial_id = ? AND step = 20", (loss, trial_id))
    answers = said(out, capsys)
    assert "E4M3 trains (decided)" in answers[0] and "E5M2 fails in every arm (decided)" in answers[0]
    assert "benefits most" not in answers[1]
    assert "Decided to gain less than in BF16: E5M2 manifold −0." in answers[1] and "E4M3 manifold −0.0" in answers[1]
    assert "E5M2: adamw and manifold end" in answers[2]
    assert "E5M2 trains (decided)" in said(out, capsys, "--margin", "0.6")[0].replace(
        "E4M3 and E5M2 train", "E5M2 trains"
    )
