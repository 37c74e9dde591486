"""The command of a cell trains its trials again, with the same losses; where it can't, it says why."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from synthetic import DATA, Plan, write_ledger

from altgrad.analysis.report import write_report
from altgrad.cli import main
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.resolve import resolve
from altgrad.sweep.space.spec import SweepSpec

TINY = {
    "formats": ["BF16", "E5M2"],
    "optimizers": ["adamw", "grid"],
    "seeds": 2,
    "steps": 20,
    "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
    "data": {"batch": 2, "eval_batches": 1, "source": "synthetic"},
}


def commands(report: Path) -> dict[str, list[str]]:
    """The words of each command in the Markdown, by the name of its file."""
    lines = re.findall(r"^    (altgrad run .*)$", (report / "report.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {Path(shlex.split(line)[2]).stem: shlex.split(line) for line in lines}


def test_each_command_has_the_ids_of_its_cell(tmp_path: Path) -> None:
    """References, arms with units of their own, arms with parameters, and two learning rates of which one is chosen."""
    axes = {"grid.rung_clip": [1, 3], "manifold.rounding": [None, "stochastic"], "optimizer.weight_decay": [0.0, 0.1]}
    asked = {"formats": "FP32,BF16,E5M2", "optimizers": "adamw,muon,grid,manifold", "lrs": "1e-3,2e-3", "axes": axes}
    spec = SweepSpec.model_validate(asked | {"first_seed": 3})
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials(spec.trials(DATA), DATA)
    write_report(tmp_path)
    found = commands(tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    cells = text.split("## Every cell and its trials")[1].split("\n## ")[0].split("#### ")[1:]
    assert len(found) == len(cells) > 10
    for cell, words in zip(cells, found.values(), strict=True):
        again = set(resolve(SweepSpec(), {}, Path(words[2])).trials(DATA))
        ids = set(re.findall(r"^\| (\w{12}) \|", cell, re.MULTILINE))
        assert len(ids & again) >= 2, cell


def test_what_no_command_repeats_says_why(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], steps=20))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        name, other = [name for name, trial in ledger.trials().items() if trial["format"] == "E5M2"]
        ledger.add_mutations([(name, 10, "lr", 2e-3, 1e-3, other)])
    write_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert f"No command trains this again: {name} took over weights and values from others" in text
    assert list(commands(tmp_path / "report")) == ["BF16-adamw-uniform"]
    assert [path.name for path in (tmp_path / "report" / "cells").iterdir()] == ["BF16-adamw-uniform.yaml"]


@pytest.mark.slow
def test_a_printed_command_gives_the_same_losses(
    tmp_path: Path, running_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = tmp_path / "tiny.json"
    spec.write_text(SweepSpec.model_validate(TINY).model_dump_json(), encoding="utf-8")
    assert main(["run", str(spec), "--out", "first", "--address", running_ray]) == 0
    words = commands(tmp_path / "first" / "report")["E5M2-grid-uniform"]
    assert words[0] == "altgrad" and main([*words[1:], "--address", running_ray]) == 0
    first, again = (pd.read_csv(tmp_path / name / "report" / "results.csv") for name in ("first", words[-1]))
    both = first.merge(again, on="trial_id")
    assert set(both["format_x"]) == {"BF16", "E5M2"} and len(both) == 4
    assert (both["val_loss_x"] == both["val_loss_y"]).all() and (both["train_loss_x"] == both["train_loss_y"]).all()
    page = (tmp_path / "first" / "report" / "report.html").read_text(encoding="utf-8")
    assert all(f'href="../trials/{name}/"' in page for name in both["trial_id"])
