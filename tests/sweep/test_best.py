"""The best configuration is exported as what trains it again; results of older numerics are never mixed in."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from altgrad.analysis.records import load
from altgrad.analysis.report import write_report
from altgrad.cli import main
from altgrad.sweep.record import ledger as ledger_module
from altgrad.sweep.record.best import find_best, sweep_of_one
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.resolve import SpecError, resolve
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training import config as config_module
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome, OutcomeKind

SHA = "a" * 64
SPACE = SweepSpec.model_validate(
    {
        "formats": "E5M2,E7M0",
        "optimizers": "adamw,grid,muon,manifold",
        "seeds": 2,
        "lrs": "1e-3,2e-3",
        "axes": {
            "grid.rung_clip": [1, 3],
            "manifold.rounding": [None, "nearest"],
            "muon.lr": [0.01, 0.02],
            "optimizer.weight_decay": [0.0, 0.1],
            "data.batch": [4, 8],
            "schedule.kind": ["cosine"],
        },
        "policies": "uniform,head_bf16",
    }
)


def enter(ledger: Ledger, trials: dict[str, TrainConfig], losses: dict[str, float]) -> None:
    ledger.add_trials(trials, SHA)
    for name, loss in losses.items():
        step = trials[name].steps
        ledger.record_rows(name, [{"step": 1, "train_loss": 5.5}, {"step": step, "train_loss": loss, "val_loss": loss}])
        ledger.record_outcome(name, Outcome(OutcomeKind.DONE, step, val_loss=loss, train_loss=loss))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "mine" / "ledger.sqlite") as opened:
        yield opened


def grouped(trials: dict[str, TrainConfig]) -> list[tuple[str, ...]]:
    names = list(trials)
    return list(zip(names[::2], names[1::2], strict=True))


def test_every_configuration_of_a_space_is_exported_to_its_own_ids(ledger: Ledger, tmp_path: Path) -> None:
    trials = SPACE.trials(SHA)
    ledger.add_trials(trials, SHA)
    seen = set()
    for pair in grouped(trials)[::3]:
        for name in pair:
            ledger.record_rows(name, [{"step": 100, "val_loss": 2.0}])
            ledger.record_outcome(name, Outcome(OutcomeKind.DONE, 100, val_loss=2.0))
        winner = find_best(ledger, list(pair))
        found = sweep_of_one(winner.config, winner.scores).trials(SHA)
        assert set(pair) <= set(found) and len(found) <= 4
        seen.add(trials[pair[0]].arm)
    assert seen == {"adamw", "grid", "muon", "manifold", "manifold_nearest"}


def test_the_best_is_by_mean_over_seeds_of_those_that_ran_through(
    ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = SweepSpec.model_validate({"formats": "E5M2", "optimizers": "grid", "lrs": "1e-3,2e-3,3e-3,4e-3", "seeds": 2})
    trials = spec.trials(SHA)
    own = [name for name, config in trials.items() if config.format == "E5M2"]
    references = [name for name in trials if name not in own]
    enter(
        ledger,
        trials,
        dict.fromkeys(references, 0.5) | dict(zip(own, (2.0, 2.2, 1.0, 3.0, math.nan, 0.1, 0.2), strict=False)),
    )
    winner = find_best(ledger)
    assert winner.trial_ids == tuple(own[2:4]) or winner.trial_ids == tuple(own[:2])
    assert (winner.mean, winner.rivals) == (2.0, 2), "one has a NaN, one lacks a seed, references do not compete"
    with pytest.raises(SpecError, match="no configuration has run to its end"):
        find_best(ledger, own[4:])
    assert find_best(ledger, references).mean == 0.5

    path = tmp_path / "again.yaml"
    assert main(["best", str(tmp_path / "mine"), "--export", str(path)]) == 0
    text = capsys.readouterr().out
    assert "val_loss 2.0000 over 2 seeds, the best of 2 configurations" in text and f"altgrad run {path}" in text
    read = resolve(SweepSpec(), {}, path)
    assert read.name == "again" and set(winner.trial_ids) <= set(read.trials(SHA)) and len(read.expand()) == 4
    for wrong, said in ((path, "exists"), (tmp_path / "x.txt", "allowed are .yaml")):
        assert main(["best", str(tmp_path / "mine"), "--export", str(wrong)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_what_took_over_from_others_is_no_configuration_to_export(
    ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = SweepSpec.model_validate(
        {"formats": "E5M2", "optimizers": "grid", "lrs": "1e-3,2e-3", "seeds": 1, "scheduler": "pbt"}
    )
    trials = spec.trials(SHA)
    first, second = [name for name in trials if name.startswith("pbt-")]
    enter(ledger, trials, dict.fromkeys(trials, 3.0) | {second: 1.0})
    ledger.add_mutations([(second, 20, "lr", 2e-3, 1.25e-3, first)])
    assert main(["best", str(tmp_path / "mine"), "--export", str(tmp_path / "x.yaml")]) == 2
    assert f"{second} took over weights and values from others (pbt) at step 20" in capsys.readouterr().err
    assert main(["why", str(tmp_path / "mine"), second[:8]]) == 0
    assert f"{second} at step 20: lr 0.002 -> 0.00125, weights of {first}" in capsys.readouterr().out
    write_report(tmp_path / "mine")
    text = (tmp_path / "mine" / "report" / "report.md").read_text()
    assert "Exchanges in populations" in text and f"| {second} | 20 | lr | 0.002 | 0.00125 | {first} |" in text


@pytest.mark.parametrize("recorded", [True, False])
def test_results_of_older_numerics_are_named_and_not_used(
    recorded: bool, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = SweepSpec.model_validate({"formats": "E5M2", "optimizers": "grid", "seeds": 2})
    with monkeypatch.context() as older:
        older.setattr(config_module, "NUMERICS_VERSION", 1)
        older.setattr(ledger_module, "NUMERICS_VERSION", 1 if recorded else None)
        old = spec.trials(SHA)
        enter(ledger, old, dict.fromkeys(old, 1.0))
    assert set(ledger.outdated()) == set(old)
    trials = spec.trials(SHA)
    assert not set(trials) & set(old) and len(ledger.remaining(trials)) == 4
    enter(ledger, trials, dict.fromkeys(trials, 2.0))
    assert set(ledger.outdated()) == set(old) and find_best(ledger).mean == 2.0

    out = tmp_path / "mine"
    assert main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert "4 of 4 trials ended" in text and "4 trials of an older numerics version are in the ledger, not used" in text
    numerics = load(out).trials.set_index("trial_id")["numerics"]
    assert set(numerics[list(old)]) == ({1} if recorded else {0}) and numerics[list(trials)].nunique() == 1
    if not recorded:
        return
    (out / "sweep.json").write_text(json.dumps({"trials": list(trials)}))
    write_report(out)
    report = (out / "report" / "report.md").read_text()
    assert "4 trials of an older numerics version are in the ledger, not used." in report and "1.000" not in report


def test_a_sweep_of_several_settings_has_a_report_for_each(ledger: Ledger, tmp_path: Path) -> None:
    spec = SweepSpec.model_validate({"formats": "E5M2", "optimizers": "grid", "axes": {"data.batch": [4, 8]}})
    trials = spec.trials(SHA)
    enter(ledger, trials, {name: 1.0 + config.data.batch + config.seed / 10 for name, config in trials.items()})
    out = tmp_path / "mine"
    (out / "sweep.json").write_text(json.dumps({"trials": list(trials)}))
    finding = write_report(out)
    assert finding.path == out / "report" / "report.html" and finding.trials == 4
    first = (out / "report" / "report.md").read_text()
    second = (out / "report" / "settings" / "1" / "report.md").read_text()
    assert "report of data.batch=4" in first and "[data.batch=8](settings/1/report.html)" in first
    assert "report of data.batch=8" in second and "[data.batch=4](../../report.html)" in second
    assert "5.050" in first and "9.050" in second and "9.050" not in first and "left out" not in first
    assert len((out / "report" / "results.csv").read_text().splitlines()) == 1 + 8


def test_the_best_of_each_group(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    spec = SweepSpec(formats=("E5M2", "E4M3"), optimizers=("adamw", "manifold"), lrs=(1e-3, 2e-3), seeds=2)
    trials = spec.trials(SHA)
    losses = {
        name: 2.0 + (config.format == "E5M2") * 0.1 + (config.arm == "manifold") * 0.01 + config.optimizer.lr
        for name, config in trials.items()
    }
    enter(ledger, trials, losses)
    ledger.close()
    assert main(["best", str(ledger.path.parent), "--per", "format,arm"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["format", "arm", "val_loss", "seeds", "lr", "policy", "best", "of"]
    found = {(line[0], line[1]): (line[2], line[4], line[-1]) for line in lines[1:]}
    assert found["E5M2", "manifold"] == ("2.1110", "0.001", "2") and found["E4M3", "adamw"] == ("2.0010", "0.001", "2")
    assert ("BF16", "adamw") in found
