"""The report against planted truth: what it must say, and what it must never say.

A case is a sweep with known effects, written to a ledger and read back by `altgrad report`; how often decisions are
false is in test_decisions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from planted import BASE
from synthetic import Plan, explode, stall, write_ledger

from altgrad.cli import main
from altgrad.sweep.ledger import Ledger
from altgrad.training.outcome import Outcome, OutcomeKind

Effects = dict[tuple[object, ...], object]
PLAIN = ["adamw", "manifold"]
OOM = Outcome(OutcomeKind.OOM, 3, message="out of memory")
PRUNED = Outcome(OutcomeKind.PRUNED, 50)


def offsets(effects: Effects, spread: float = 0.003) -> Callable[..., object]:
    """Offsets by (format, arm), each run with noise of its own; E1M6 is E0M7 under another name."""

    def offset(name: str, arm: str, seed: int) -> object:
        name = "E0M7" if name == "E1M6" else name
        value = effects.get((name, arm), 0.0)
        noise = float(np.random.default_rng([seed, *map(ord, name + arm)]).normal(0, spread))
        return value + noise if isinstance(value, float) else value

    return offset


def said(out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """The three answers that `altgrad report` prints, and the rest."""
    assert main(["report", str(out), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    page = (out / "report" / "report.md").read_text()
    assert all(line[2:].split("? ", 1)[1] in page for line in lines[:3]), "the page says what the terminal says"
    return [*(line.split("? ", 1)[1] for line in lines[:3]), "\n".join(lines[3:])]


CASES: dict[str, tuple[list[str], list[str], int, Effects, list[tuple[int, str]], list[str]]] = {
    "the step rule gives more than the format": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("BF16", "manifold"): -0.20, ("E4M3", "manifold"): -0.12},
        [
            (1, "Neither of the 2 format–arm pairs is decided to gain more than in BF16."),
            (1, "Decided to gain less than in BF16: E5M2 manifold −0.20"),
            (1, "E4M3 manifold −0.0"),
        ],
        ["benefits most", "Decided to gain more"],
    ),
    "one format benefits": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.2},
        [(1, "Of 3 pairs compared E4M3 with manifold benefits most (decided): +0."), (1, "beyond its gain of")],
        ["Not compared"],
    ),
    "two benefit alike": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.1, ("E5M2", "manifold"): -0.1},
        [(1, "Which one is not decided: it may be E"), (1, "Decided to gain more than in BF16: E")],
        ["benefits most", "it may be E3M4"],
    ),
    "one grid under two names": (
        ["BF16", "E0M7", "E1M6", "E5M2"],
        PLAIN,
        6,
        {("E0M7", "manifold"): -0.1},
        [(1, "E0M7 = E1M6 with manifold benefits most (decided)"), (0, "E0M7, E1M6 and E5M2 train (decided)")],
        [],
    ),
    "nothing differs": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        4,
        {},
        [
            (0, "E4M3 and E5M2 train (decided)"),
            (1, "Neither of the 2 format–arm pairs is decided to gain more"),
            (1, "4 seeds can show differences from BF16's gain of about 0.0"),
            (2, "No 8-bit format or arm is decided to fail. No run was stopped."),
        ],
        ["benefits most", "Decided to gain"],
    ),
    "two seeds, close to the margin": (
        ["BF16", "E4M3", "E7M0"],
        ["adamw"],
        2,
        {("E4M3", "adamw", 0): 0.25, ("E4M3", "adamw", 1): 0.35, ("E7M0", "adamw"): 3.0},
        [
            (0, "E7M0 fails in every arm (decided)"),
            (0, "Not decided: E4M3 (its best arm, adamw, +1"),
            (0, "would decide it"),
        ],
        ["E4M3 fails", "E4M3 trains"],
    ),
    "out of memory in an unrelated cell": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.03, ("E3M4", "manifold"): OOM},
        [(1, "E4M3 with manifold benefits most (decided): +0.0"), (0, "E3M4, E4M3 and E5M2 train (decided)")],
        [],
    ),
    "the reference lost a seed": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        5,
        {("E4M3", "manifold"): -0.1, ("BF16", "adamw", 3): None},
        [
            (0, "E4M3 and E5M2 train (decided)"),
            (1, "E4M3 with manifold benefits most (decided)"),
            (3, "BF16 AdamW has no loss at seed 3"),
        ],
        [],
    ),
    "a rescue that trains": (
        ["BF16", "E4M3", "E7M0"],
        PLAIN,
        6,
        {("E7M0", "adamw"): stall(), ("E7M0", "manifold"): 0.02},
        [
            (0, "E4M3 and E7M0 train (decided)"),
            (
                1,
                "manifold rescues E7M0, decided (p = 0.0043; E7M0: manifold stopped in 0 of 6 seeds, adamw in 6 of 6).",
            ),
            (2, "adamw fails in E7M0 (stopped in 6 of 6 seeds by flip_yield in lm_head (step 30, median 30; 0 % to 46"),
        ],
        [],
    ),
    "a rescue that does not train": (
        ["BF16", "E4M3", "E7M0"],
        PLAIN,
        6,
        {("E7M0", "adamw"): stall(), ("E7M0", "manifold"): 1.0},
        [(1, "decided (p = 0.0043), but manifold fails to train there."), (0, "E7M0 fails in every arm (decided)")],
        ["rescues"],
    ),
    "too few seeds for a rescue": (
        ["BF16", "E4M3", "E7M0"],
        PLAIN,
        3,
        {("E7M0", "adamw"): stall()},
        [(1, "E7M0: manifold stopped in 0 of 3 seeds, adamw in 3 of 3: not decided (p = 0.2).")],
        ["rescues"],
    ),
    "all runs of a format were pruned": (
        ["BF16", "E5M2", "E6M1"],
        ["adamw"],
        3,
        {("E6M1", "adamw"): PRUNED},
        [(0, "Without result: E6M1 (all runs were pruned or lost)."), (0, "E5M2 trains (decided)")],
        ["E6M1 fail"],
    ),
    "arms on the grid against the plain arm on the grid": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw", "adamw_sr", "grid"],
        6,
        {("E4M3", "adamw_sr"): 0.1, ("E4M3", "grid"): 0.1, ("E5M2", "grid"): -0.05},
        [(1, "E5M2 with grid benefits most (decided): +0.0")],
        ["E4M3 with grid benefits"],
    ),
    "one run diverges to a finite number": (
        ["BF16", "E2M5", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E2M5", "adamw", 0): 3e5, ("E4M3", "manifold"): -0.1, ("E3M4", "manifold"): -0.05},
        [
            (1, "it may be E2M5 with manifold or E4M3 with manifold"),
            (1, "Decided to gain more than in BF16: E4M3 manifold +0."),
        ],
        ["As in BF16 in every seed"],
    ),
    "a rival with a stopped seed": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.1, ("E5M2", "manifold"): -0.4, ("E5M2", "manifold", 2): stall()},
        [(1, "Of 2 pairs compared"), (1, "Not compared: E5M2 manifold (stopped runs of E5M2 manifold).")],
        [],
    ),
    "a rival that was lost, and one without its plain arm": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        [*PLAIN, "grid"],
        6,
        {("E4M3", "manifold"): -0.1, ("E5M2", "manifold"): OOM},
        [
            (1, "Of 2 pairs compared E4M3 with manifold benefits most (decided)"),
            (1, "E3M4 grid, E4M3 grid and E5M2 grid (its plain arm, adamw_sr, was not run"),
            (1, "E5M2 manifold (no result of E5M2 manifold)"),
        ],
        [],
    ),
    "stops of the plain arm in BF16 too": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw", "adamw_sr", "grid"],
        6,
        {(name, "adamw_sr"): stall() for name in ("BF16", "E4M3", "E5M2")},
        [
            (1, "but runs stop in BF16 too, so that the format is not the reason"),
            (2, "Stopped elsewhere: BF16 adamw_sr"),
        ],
        ["rescues", "No run was stopped"],
    ),
    "an arm that stops more": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): stall()},
        [(1, "manifold stopped in 6 of 6 seeds, adamw in 0 of 6: manifold stops more, decided (p = 0.0043)")],
        ["rescues"],
    ),
    "a twin that lost a seed": (
        ["BF16", "E0M7", "E1M6", "E5M2"],
        PLAIN,
        6,
        {("E0M7", "manifold"): -0.1, ("E1M6", "manifold", 2): None},
        [(1, "Of 2 pairs compared E0M7 = E1M6 with manifold benefits most (decided)")],
        ["E0M7 with manifold or"],
    ),
    "a twin whose other name lost the arm that trains": (
        ["BF16", "E0M7", "E1M6"],
        PLAIN,
        4,
        {("E0M7", "adamw"): 0.5, **{("E0M7", "manifold", seed): OOM for seed in range(4)}},
        [(0, "E0M7 and E1M6 train (decided)")],
        [],
    ),
    "runs that explode in the first step": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw"],
        3,
        {("E4M3", "adamw"): explode(1)},
        [(0, "E4M3 fails in every arm (decided)"), (2, "stopped in 3 of 3 seeds by train_loss (step 1")],
        [],
    ),
    "losses beyond all measure": (
        ["BF16", "E2M5", "E4M3", "E5M2", "E6M1"],
        ["adamw"],
        2,
        {("E2M5", "adamw", 0): 1e30, ("E4M3", "adamw", 0): 1e30},
        [(0, "E2M5 (its best arm")],
        ["00000000000"],
    ),
    "an arm that ends low and has not learned": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.1, **{("E4M3", "adamw", seed): OOM for seed in range(6)}},
        [(1, "Not compared: E4M3 manifold (no result of E4M3 adamw)")],
        ["E4M3 with manifold benefits"],
    ),
    "everything explodes": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw"],
        3,
        {("E4M3", "adamw"): explode(), ("E5M2", "adamw"): explode()},
        [(0, "E4M3 and E5M2 fail in every arm (decided)."), (2, "stopped in 3 of 3 seeds by train_loss (step 12")],
        ["train (decided)"],
    ),
}


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


def test_a_lost_seed_costs_its_seed_and_changes_no_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The better rate lost a seed: it is still the better one."""
    rates = {1e-3: -0.05, 3e-3: -0.10}
    for rate, gain in rates.items():
        base = offsets({("E4M3", "manifold"): gain})

        def offset(name: str, arm: str, seed: int, rate: float = rate, base: Callable[..., object] = base) -> object:
            return OOM if (name, arm, seed, rate) == ("E4M3", "manifold", 1, 3e-3) else base(name, arm, seed)

        write_ledger(tmp_path, Plan(["BF16", "E4M3", "E5M2"], PLAIN, 6, lrs=(rate,), offset=offset))  # type: ignore[arg-type]
    answers = said(tmp_path, capsys)
    assert "E4M3 with manifold benefits most (decided): +0.10" in answers[1] or "(decided): +0.09" in answers[1]


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
