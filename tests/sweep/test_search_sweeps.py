"""Searches, populations and the best configuration on a real local Ray, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState
from trained import train

from altgrad.cli import main
from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.resolve import resolve
from altgrad.sweep.space.sampling import OptunaSearch
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import OutcomeKind

TINY = {"layers": 1, "heads": 1, "width": 16, "block": 16}
CONFIGS = sorted((Path(__file__).parents[2] / "sweeps" / "configs").glob("*.yaml"))


def tiny(**changes: object) -> SweepSpec:
    return SweepSpec.model_validate(
        {
            "name": "tiny",
            "formats": "E5M2",
            "optimizers": "grid",
            "seeds": 2,
            "steps": 20,
            "model": TINY,
            "data": {"batch": 2, "eval_batches": 1},
            "log_interval": 5,
            "eval_interval": 5,
            "checkpoint_interval": 5,
        }
        | changes
    )


def losses(out: Path) -> dict[str, dict[int, float]]:
    with Ledger(out / "ledger.sqlite") as ledger:
        return {name: dict(ledger.signal(name, "train_loss")) for name in ledger.row_counts()}


AXES = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "optimizer.rung_clip": {"low": 1, "high": 10}}
SEARCH = {"search": "optuna", "optimizers": "grid,adamw", "formats": "E5M2,E3M4", "axes": AXES}


@pytest.mark.slow
def test_an_optuna_search_goes_on_where_it_was_and_repeats_nothing(tmp_path: Path, running_ray: str) -> None:
    first = run_sweep(tiny(**SEARCH, num_samples=4), RunOptions(out=tmp_path / "s", address=running_ray))
    assert (first.trials, first.ran, first.left) == (2 + 4 * 2,) * 2 + (0,)
    rows = losses(first.out)
    more = run_sweep(tiny(**SEARCH, num_samples=6), RunOptions(out=tmp_path / "s", address=running_ray))
    assert (more.trials, more.ran, more.left) == (2 + 6 * 2, 4, 0)
    assert {name: row for name, row in losses(more.out).items() if name in rows} == rows
    assert len(json.loads((more.out / "sweep.json").read_text())["trials"]) == 14
    code = (
        "import sys; from pathlib import Path; from altgrad.sweep.run import *\n"
        f"spec = SweepSpec.model_validate_json({tiny(**SEARCH, num_samples=6).model_dump_json()!r})\n"
        f"print(run_sweep(spec, RunOptions(out=Path({str(more.out)!r}))).ran, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
    with Ledger(more.out / "ledger.sqlite") as ledger:
        sha = json.loads((more.out / "sweep.json").read_text())["data"]["sha256"]
        study = OptunaSearch(tiny(**SEARCH, num_samples=6), sha, ledger).study
    assert len(study.trials) >= 6 and not any(trial.state is TrialState.RUNNING for trial in study.trials)


@pytest.mark.slow
def test_a_search_under_asha_prunes_and_lets_the_best_run_through(tmp_path: Path, running_ray: str) -> None:
    spec = tiny(**SEARCH | {"search": "random"}, num_samples=4, scheduler="asha", guards="off", seeds=1)
    result = run_sweep(spec, RunOptions(out=tmp_path / "s", address=running_ray))
    assert result.left == 0 and result.endings["pruned by val_loss"] >= 2
    with Ledger(result.out / "ledger.sqlite") as ledger:
        outcomes = ledger.outcomes()
        own = [name for name, trial in ledger.trials().items() if (trial["format"], trial["arm"]) != ("BF16", "adamw")]
        whole = {name for name in own if outcomes[name].kind is OutcomeKind.DONE}
        first = {name: dict(ledger.signal(name, "val_loss"))[10] for name in own}
    assert len(whole) == 1 and next(iter(whole)) in sorted(first, key=first.__getitem__)[:2]


@pytest.mark.slow
def test_a_population_runs_and_longer_is_the_same_as_at_once(tmp_path: Path, running_ray: str) -> None:
    spec = tiny(lrs="1e-5,1e-3,2e-3,4e-3", scheduler="pbt", pbt={"interval": 10}, guards="off", seeds=1)
    parts = run_sweep(spec, RunOptions(out=tmp_path / "parts", address=running_ray))
    assert parts.left == 0 and set(parts.endings) == {"done"}
    parts = run_sweep(spec.changed(steps=30), RunOptions(out=tmp_path / "parts", address=running_ray))
    options = RunOptions(out=tmp_path / "whole", max_concurrent=1, address=running_ray)
    whole = run_sweep(spec.changed(steps=30), options)
    found = []
    for result in (parts, whole):
        with Ledger(result.out / "ledger.sqlite") as ledger:
            found.append(ledger.mutations(list(ledger.trials())))
    assert found[0] == found[1] and {item[1] for item in found[0][0]} == {10, 20} and not found[0][1]
    assert losses(parts.out) == losses(whole.out)
    taker, _, _, before, after, _ = found[0][0][0]
    rows = (whole.out / "trials" / taker / "metrics.jsonl").read_text().splitlines()
    rates = {row["step"]: row["lr"] for row in map(json.loads, rows)}
    assert len(rates) == 30 and rates[10] == pytest.approx(before) and rates[11] == pytest.approx(after)


@pytest.mark.slow
def test_the_best_configuration_runs_again_to_the_same_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running_ray: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = tiny(lrs="1e-3,4e-3", axes={"grid.momentum": [0.5, 0.9]}, seeds=1)
    result = run_sweep(spec, RunOptions(out=tmp_path / "s", address=running_ray))
    assert main(["best", str(result.out), "--export", "winner.yaml"]) == 0
    assert main(["run", "winner.yaml", "--address", running_ray]) == 0
    before, again = losses(result.out), losses(tmp_path / "runs" / "winner")
    assert len(again) == 2 and again == {name: before[name] for name in again}


def short(path: Path, folder: Path) -> Path:
    """The sweep file with everything cut but what it is about."""
    cut = {"steps": 20, "log_interval": 2, "eval_interval": 10, "model": TINY, "checkpoint_interval": 10}
    found = folder / path.name
    found.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | cut | {"data": {"batch": 2}}))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_of_the_originals_experiments_runs(path: Path, tmp_path: Path, running_ray: str) -> None:
    if path.stem == "e5m2_fp8":
        out = tmp_path / "out"
        assert main(["run", str(short(path, tmp_path)), "--address", running_ray, "--out", str(out)]) == 0
    else:
        out = train(tmp_path / "out", resolve(SweepSpec(), {}, short(path, tmp_path)))
    with Ledger(out / "ledger.sqlite") as ledger:
        trials, outcomes = ledger.trials(), ledger.outcomes()
        shadow = [ledger.signal(name, "gradient_cosine") for name in trials] if path.stem == "e5m2_fp8" else [True]
    assert set(outcomes) == set(trials) and all(shadow)
