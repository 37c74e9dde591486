"""RESULTS.md from exported sweeps: the same bytes each time, whole or half run, and what is missing is said."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from altgrad.results.__main__ import main
from altgrad.results.evidence import load
from altgrad.results.forecasts import race
from altgrad.sweep import SweepSpec
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.shards import Export
from altgrad.sweep.record.transfer import LEAN, export_sweep
from altgrad.training.outcome import Outcome, OutcomeKind
from tests.sweep.trained import SPEC, train

MAIN = SweepSpec.model_validate(
    SPEC.model_dump()
    | {"name": "study_main", "formats": ["E5M2", "E7M0", "BF16"], "optimizers": ["adamw", "manifold"], "lrs": [1e-2]}
)
RATES = SweepSpec.model_validate(MAIN.model_dump() | {"name": "study_rates", "lrs": [1e-3, 4e-3], "first_seed": 100})


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    for name, spec in (("main", MAIN), ("rates", RATES)):
        train(folder / name, spec)
    return folder


@pytest.fixture(scope="module")
def study(sweeps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for name in ("main", "rates"):
        export_sweep(sweeps / name, folder / name, LEAN)
    return folder


def test_the_page_and_its_figures_are_the_same_each_time(study: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("one", "other"):
        assert main(["--study", str(study), "--to", str(tmp_path / name)]) == 0
        files = {path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*") if path.is_file()}
        pages.append({str(path): file.read_bytes() for path, file in files.items()})
    assert pages[0] == pages[1] and any(name.endswith(".png") for name in pages[0])
    text = pages[0]["RESULTS.md"].decode()
    for chapter in ("The answer", "Which formats train", "Why the others fail", "Where the numbers come from"):
        assert f"## {chapter}\n" in text
    assert not re.search(r"\b(nan|None|inf)\b", text)
    shown = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert shown == {name for name in pages[0] if name.endswith(".png")}


def test_what_has_no_result_is_said(sweeps: Path, study: Path, tmp_path: Path) -> None:
    shutil.copytree(sweeps / "main", tmp_path / "half")
    for path in sorted((tmp_path / "half" / "trials").iterdir())[:3]:
        shutil.rmtree(path)
    with Ledger(tmp_path / "half" / "ledger.sqlite") as ledger:
        names = list(ledger.trials())
        ledger.record_outcome(names[-1], Outcome(OutcomeKind.BUDGET, 10, message="the budget was spent"))
    export_sweep(tmp_path / "half", tmp_path / "study" / "main", LEAN)
    assert main(["--study", str(tmp_path / "study"), "--to", str(tmp_path)]) == 0
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "**Not finished: main: 1 of 12 trials.**" in text and "**not run**" in text


def test_without_the_main_sweep_there_is_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--study", str(tmp_path), "--to", str(tmp_path)]) == 2
    assert "no export of the main sweep" in capsys.readouterr().err and not (tmp_path / "RESULTS.md").exists()


def test_records_are_whole_or_it_is_seen(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = load(study)["main"]
    assert (part.results, part.repeated_steps, part.is_whole) == (12, 0, True)
    rows = Export.rows

    def without_a_step(self: Export, table: str, columns: object = None) -> list:
        found = rows(self, table, columns)  # type: ignore[arg-type]
        return found[1:] if table == "steps" else found

    monkeypatch.setattr(Export, "rows", without_a_step)
    assert load(study)["main"].repeated_steps == 1


def test_a_race_on_recorded_evaluations_cuts_half_of_the_rates(study: Path) -> None:
    found = race(load(study)["rates"])
    assert found.cells == 5 and found.kept <= found.cells and 0.5 < found.steps < 1
