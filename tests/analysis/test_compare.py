"""Two sweeps beside each other: what changed, and what only looks so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import Plan, stall, write_ledger

from altgrad.analysis.compare import compare
from altgrad.cli import main

FORMATS, ARMS = ["BF16", "E4M3", "E5M2"], ["adamw", "manifold"]


def offset_of(effects: dict[tuple[str, str], float], key: int):
    def offset(name: str, arm: str, seed: int):
        noise = np.random.default_rng([key, seed, *map(ord, name + arm)]).normal(0, 0.003)
        return effects.get((name, arm), 0.0) + noise

    return offset


def test_cells_that_changed_are_told_from_those_that_did_not(tmp_path: Path) -> None:
    write_ledger(tmp_path / "a", Plan(FORMATS, ARMS, 6, offset=offset_of({}, 1)))
    write_ledger(tmp_path / "b", Plan(FORMATS, ARMS, 6, offset=offset_of({("E4M3", "manifold"): 0.05}, 2)))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.lines[-1] == "6 cells in both: 0 identical in every seed, 1 decided to differ (E4M3 manifold)"
    changed = next(line for line in found.table.lines if line[0] == "E4M3" and line[1] == "manifold")
    assert changed[-1] == "differs" and changed[-2].startswith("+0.05")


def test_the_same_sweep_again_is_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(FORMATS, ARMS, 3, offset=offset_of({}, 1))
    for name in ("a", "b"):
        write_ledger(tmp_path / name, plan)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "6 cells in both: 6 identical in every seed, 0 decided to differ" in said and "differs:" not in said


def test_settings_cells_and_verdicts_that_differ_are_named(tmp_path: Path) -> None:
    write_ledger(tmp_path / "a", Plan(FORMATS, ARMS, 3, steps=40, offset=offset_of({}, 1)))
    plan = Plan(["BF16", "E4M3"], ["adamw"], 3, steps=20, offset=lambda name, *_: stall(10) if name == "E4M3" else 0.0)
    write_ledger(tmp_path / "b", plan)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert "differs: steps: 40 and 20" in found.lines
    assert "E4M3: trains, then fails" in found.lines
    assert any(line.startswith(f"only in {tmp_path / 'a'}: E4M3 manifold uniform, E5M2 adamw") for line in found.lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "{a}", "--margin", "-1"], "--margin: '-1' is not allowed"),
        (["report", "{a}", "--margin", "ten"], "--margin: 'ten' is not allowed"),
        (["report", "{a}", "--equal-within", "nan"], "--equal-within: 'nan' is not allowed"),
        (["compare", "{a}", "{none}"], "none"),
        (["best", "{a}", "--per", "formats"], "nearest: format"),
        (["best", "{a}", "--per", "format", "--export", "x.yaml"], "--export"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    write_ledger(tmp_path / "a", Plan(["BF16"], ["adamw"]))
    places = {"a": tmp_path / "a", "none": tmp_path / "none"}
    assert main([word.format(**places) for word in words]) == 2
    assert said in capsys.readouterr().err


def test_the_margin_of_a_report_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], 4, offset=offset_of({("E5M2", "adamw"): 0.15}, 1)))
    said = []
    for words in ([], ["--margin", "0.03"]):
        assert main(["report", str(tmp_path), *words]) == 0
        said.append(capsys.readouterr().out)
    assert "Within 10 % of BF16" in said[0] and "E5M2 trains (decided)" in said[0]
    assert "Within 3 % of BF16" in said[1] and "E5M2 fails in every arm (decided)" in said[1]
