"""Whole sweeps on a real local Ray: small, then with a fault planted, then killed in the middle."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.run import SweepResult, run_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import OutcomeKind

TINY = {"layers": 1, "heads": 1, "width": 16, "block": 16}


def tiny(**changes: object) -> SweepSpec:
    return SweepSpec.model_validate(
        {
            "name": "tiny",
            "formats": "E5M2",
            "optimizers": "grid",
            "seeds": 1,
            "steps": 10,
            "model": TINY,
            "data": {"batch": 2, "eval_batches": 1},
            "log_interval": 5,
            "eval_interval": 5,
            "checkpoint_interval": 5,
        }
        | changes
    )


def steps_in_files(out: Path) -> dict[str, list[int]]:
    return {
        path.parent.name: [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in (out / "trials").glob("*/metrics.jsonl")
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return run_sweep(tiny(), RunOptions(out=tmp_path_factory.mktemp("runs") / "tiny"))


def test_a_small_sweep_fills_the_ledger(first: SweepResult) -> None:
    assert (first.trials, first.ran, first.left, first.broken) == (2, 2, 0, None)
    assert first.endings == {"done": 2}
    with Ledger(first.out / "ledger.sqlite") as ledger:
        assert set(ledger.row_counts().values()) == {10}
        assert all(outcome.val_loss is not None for outcome in ledger.outcomes().values())
    assert set(map(tuple, steps_in_files(first.out).values())) == {tuple(range(1, 11))}


def test_the_folder_says_what_ran_on_what_and_keeps_no_scratch(first: SweepResult) -> None:
    found = json.loads((first.out / "sweep.json").read_text())
    assert SweepSpec.model_validate(found["spec"]) == tiny()
    assert found["trials"] == list(tiny().trials(found["data"]["sha256"])) and found["data"]["notes"] == []
    assert len(found["data"]["sha256"]) == 64 and found["versions"]["torch"]
    assert sorted(item.name for item in first.out.iterdir() if not item.name.startswith("ledger")) == [
        ".lock",
        "sweep.json",
        "trials",
    ]


@pytest.mark.slow
def test_a_race_stops_the_losers_whole_runs_the_winner_whole_and_a_restart_changes_nothing(
    tmp_path: Path, running_ray: str
) -> None:
    spec = tiny(lrs="1e-5,1e-2,2e-2", seeds=2, steps=30, scheduler="asha")
    result = run_sweep(spec, RunOptions(out=tmp_path / "race", address=running_ray))
    assert result.endings == {"done": 6 + 2, "pruned by val_loss": 4} and result.left == 0
    ran = steps_in_files(result.out)
    with Ledger(result.out / "ledger.sqlite") as ledger:
        trials, outcomes = ledger.trials(), ledger.outcomes()
        cell = {(row["lr"], row["seed"]): name for name, row in trials.items() if row["format"] == "E5M2"}
        for name, outcome in outcomes.items():
            assert len(ledger.signal(name, "train_loss")) == outcome.step
    lengths = {key: len(ran.get(name, ())) for key, name in cell.items()}
    assert [lengths[1e-5, seed] for seed in (0, 1)] == [10, 0], "a hopeless rate stops at the first rung"
    assert sorted(lengths[lr, 0] for lr in (1e-2, 2e-2)) == [20, 30]
    winner = next(lr for lr in (1e-2, 2e-2) if lengths[lr, 0] == 30)
    assert lengths[winner, 1] == 30
    assert "not started" in outcomes[cell[1e-5, 1]].message

    for name in (cell[winner, 1], cell[1e-5, 1]):
        (result.out / "trials" / name / "outcome.json").unlink()
    for path in result.out.glob("ledger.sqlite*"):
        path.unlink()
    again = run_sweep(spec, RunOptions(out=result.out, address=running_ray))
    with Ledger(again.out / "ledger.sqlite") as ledger:
        assert {name: outcome.kind for name, outcome in ledger.outcomes().items()} == {
            name: outcome.kind for name, outcome in outcomes.items()
        }
    assert steps_in_files(again.out) == ran


def test_asking_again_runs_nothing_and_starts_no_ray(first: SweepResult) -> None:
    before = {path: path.stat().st_mtime_ns for path in (first.out / "trials").rglob("*")}
    code = (
        "import sys; from pathlib import Path; from altgrad.sweep.run import *\n"
        f"spec = SweepSpec.model_validate_json({tiny().model_dump_json()!r})\n"
        f"print(run_sweep(spec, RunOptions(out=Path({str(first.out)!r}))).ran, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
    assert {path: path.stat().st_mtime_ns for path in (first.out / "trials").rglob("*")} == before


@pytest.mark.slow
def test_more_steps_go_on_from_the_checkpoint(first: SweepResult, running_ray: str) -> None:
    # A local Ray, which asks for tokens, was at work in this process before this one, which has none.
    result = run_sweep(tiny(steps=15), RunOptions(out=first.out, address=running_ray))
    assert (result.ran, result.left) == (2, 0)
    assert set(map(tuple, steps_in_files(first.out).values())) == {tuple(range(1, 16))}
    resumed = {json.loads(path.read_text())["resumed_from"] for path in (first.out / "trials").glob("*/config.json")}
    assert resumed == {10}


@pytest.mark.slow
def test_one_trials_error_is_its_own_and_three_alike_end_the_sweep(tmp_path: Path, running_ray: str) -> None:
    spec = tiny(seeds=6, formats="BF16", optimizers="adamw", steps=10)
    trials = list(spec.trials(_sha(spec)))
    for trial_id in trials[1:4]:
        folder = tmp_path / "sweep" / "trials" / trial_id / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_text("no checkpoint")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    result = run_sweep(spec, RunOptions(out=tmp_path / "sweep", max_concurrent=1, address=running_ray))
    with Ledger(tmp_path / "sweep" / "ledger.sqlite") as ledger:
        outcomes = ledger.outcomes()
    assert outcomes[trials[0]].kind is OutcomeKind.DONE
    assert [outcomes[trial_id].kind for trial_id in trials[1:4]] == [OutcomeKind.BUG] * 3
    assert result.broken is not None and result.left == 5 and trials[5] not in outcomes
    assert "Traceback" in (tmp_path / "sweep" / "trials" / trials[1] / "traceback.txt").read_text()


def _sha(spec: SweepSpec) -> str:
    from altgrad.training.data import load_corpus

    return load_corpus(spec.base.data).sha256


DRILL = ["run", "--formats", "BF16,E5M2", "--optimizers", "adamw,grid", "--steps", "300", "--guards", "off"]


def altgrad(out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "altgrad", *DRILL, "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


@pytest.mark.slow
def test_sigterm_ends_a_sweep_like_an_interrupt(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    driver = altgrad(out)
    wait_until(lambda: list((out / "trials").glob("*/checkpoint/state.pt")), 240)
    driver.terminate()
    text, _ = driver.communicate(timeout=60)
    assert driver.returncode == 143, text
    assert "terminated; what is recorded stays" in text and "Traceback" not in text and "***" not in text
    with Ledger(out / "ledger.sqlite") as ledger:
        assert ledger.row_counts()
    assert not (out / ".tune").exists()
