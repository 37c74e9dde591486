"""The report of synthetic ledgers: complete, self-contained, and readable in a browser."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from synthetic import DATA, Plan, explode, stall, write_ledger

from altgrad.analysis import report
from altgrad.analysis.curves import spread
from altgrad.analysis.report import write_report
from altgrad.sweep.record.ledger import Ledger
from altgrad.training.arm_configs import ARMS
from altgrad.training.outcome import Outcome, OutcomeKind

EIGHT_BIT = ["E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"]


def mixed(name: str, arm: str, seed: int):
    if name == "E7M0":
        return explode() if arm == "grid" else stall()
    return 0.02 * EIGHT_BIT.index(name) + 0.001 * seed if name in EIGHT_BIT else 0.0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("sweep")
    manifest = {"spec": {"name": "four <formats>", "formats": ["BF16", "E5M2"]}, "manifest": {"git": {"sha": "f00d"}}}
    plan = Plan(["FP32", "BF16", "E0M7", "E5M2", "E7M0"], ["adamw", "manifold", "grid"], offset=mixed)
    write_report(write_ledger(out_dir, plan, manifest))
    return out_dir / "report"


def test_files(written: Path) -> None:
    figures = {path.name for path in (written / "figures").glob("*.png")}
    assert {path.with_suffix(".png").name for path in (written / "figures").glob("*.svg")} == figures
    names = "heat_map loss_curves excess_curves stop_reasons flip_yield interactions first_signs survival costs"
    assert figures == {f"{name}.png" for name in names.split()}
    linked = re.findall(r"\]\((figures/[^)]+)\)", (written / "report.md").read_text())
    assert {Path(link).name for link in linked} == figures


def test_html_needs_nothing_else(written: Path) -> None:
    html = (written / "report.html").read_text()
    assert html.count('role="img"') == 9
    assert not re.search(r"<script|<link|<img|@import|(src|href)=\"(?!#)|url\((?!#)", html)
    assert "four &lt;formats&gt;" in html and "f00d" in html


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    source = "<img src=x onerror=alert(1)>/![a](http://x.invalid/y)|b`c`\n# d"
    manifest = {"spec": {"name": source}, "data": {"source": source}}
    write_report(write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"]), manifest))
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)" in text, name
    assert not re.search(r"(?<!\\)\]\(http", text) and "\n# d" not in text and r"![a\](http\://" in text


def test_finding_leads_both_reports(tmp_path: Path) -> None:
    finding = write_report(write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"])))
    assert finding.path == tmp_path / "report" / "report.html" and finding.path.is_file()
    for name in ("report.html", "report.md"):
        text = (finding.path.parent / name).read_text().replace("&#39;", "'")
        said = [answer.question for answer in finding.answers] + [answer.text for answer in finding.answers]
        assert all(part in text.split("Distance from BF16")[0] for part in said)
        places = [text.index(part) for part in (*(answer.text for answer in finding.answers), "Distance from BF16")]
        assert places == sorted(places)


def test_results_have_one_row_per_trial(written: Path) -> None:
    results = pd.read_csv(written / "results.csv")
    assert len(results) == 30 and results["trial_id"].is_unique
    failed = results[results["format"] == "E7M0"]
    assert set(failed["outcome"]) == {"stalled", "nonfinite"} and failed["val_loss"].isna().all()
    assert (failed["value"] == float("inf")).sum() == 2


def test_every_stop_is_listed_with_its_evidence(written: Path) -> None:
    stops = (written / "report.md").read_text().split("## Why runs stopped")[1].split("## ")[0]
    assert stops.count("| E7M0 |") == 6
    assert stops.count("| stalled | flip_yield | lm_head | 30 | 0.05 | 0.2 |") == 4
    assert stops.count("| nonfinite | train_loss | – | 12 | ∞ | – |") == 2


def test_a_stopped_cell_shows_no_number(written: Path) -> None:
    cells = (written / "report.md").read_text().split("## Every cell")[1].split("## ")[0]
    rows = [line for line in cells.splitlines() if line.startswith("| E7M0 |")]
    assert len(rows) == 3 and all("failed 2 of 2 | stopped | +" in row for row in rows)


def test_without_stops_it_says_so_and_keeps_no_old_picture(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"]))
    stale = tmp_path / "report" / "figures" / "stop_reasons.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    html = write_report(tmp_path).path.read_text()  # type: ignore[union-attr]
    assert not stale.exists() and "No run was stopped by a guard." in html


@pytest.mark.parametrize(
    ("formats", "arms", "seeds"),
    [
        (["E5M2"], ["adamw"], 1),
        (["BF16"], ["adamw"], 1),
        (["BF16", "E5M2"], ["adamw"], 20),
        (["FP32", "BF16", *EIGHT_BIT], list(ARMS)[::2], 1),
    ],
)
def test_sizes_from_one_to_many(tmp_path: Path, formats: list[str], arms: list[str], seeds: int) -> None:
    write_report(write_ledger(tmp_path, Plan(formats, arms, seeds, steps=20, offset=mixed)))
    for path in (tmp_path / "report" / "figures").glob("*.png"):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == 1170 and 150 < height < 3200, path.name


def test_nothing_run_yet_still_gives_a_report(tmp_path: Path) -> None:
    finding = write_report(write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], offset=lambda *_: None)))
    assert "0 of 4" in str(finding) and not list((tmp_path / "report" / "figures").iterdir())


def test_policies_have_their_own_pictures(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw", "grid"], steps=20))
    write_ledger(tmp_path, Plan(["E5M2"], ["adamw", "grid"], steps=20, policy="classic"))
    write_report(tmp_path)
    names = {path.name for path in (tmp_path / "report" / "figures").iterdir()}
    assert {"loss_curves_uniform.png", "loss_curves_classic.png", "excess_curves_classic.png"} <= names
    cells = (tmp_path / "report" / "report.md").read_text().split("## Every cell")[1].split("## ")[0]
    assert "| policy |" in cells and "classic" in cells


def test_learning_rates_are_listed_where_there_are_several(tmp_path: Path) -> None:
    write_report(write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], lrs=(1e-3, 1e-2), steps=20)))
    text = (tmp_path / "report" / "report.md").read_text()
    rates = text.split("## Sensitivity to the learning rate")[1].split("## ")[0]
    assert rates.count("| E5M2 |") == 2 and rates.count("| chosen |") == 2


@pytest.mark.parametrize(("shift", "said"), [(0.0, "as they must"), (1e-4, "Fault in the numerics")])
def test_one_grid_under_two_names_is_a_control(tmp_path: Path, shift: float, said: str) -> None:
    plan = Plan(["E0M7", "E1M6"], ["adamw"], steps=20, offset=lambda name, *_: shift if name == "E1M6" else 0.0)
    write_report(write_ledger(tmp_path, plan))
    for name in ("report.md", "report.html"):
        assert said in (tmp_path / "report" / name).read_text()


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ledger\.sqlite"):
        write_report(tmp_path)
    write_ledger(tmp_path, Plan([], []))
    with pytest.raises(ValueError, match="holds no trials"):
        write_report(tmp_path)


@pytest.mark.parametrize("values", [[0.5], [0.1, 0.1, 0.1], [0.9, 0.95, 1.0, 1.0], [0.0, 0.5, 1.0]])
def test_names_beside_lines_never_overlap(values: list[float]) -> None:
    places = spread(values, 0.08, 1.0)
    assert all(after - before >= 0.08 - 1e-12 for before, after in pairwise(places))
    moved = max(abs(place - value) for place, value in zip(places, values, strict=True))
    assert max(places) <= 1.0 and moved <= 0.08 * len(values)


def test_a_pruned_trial_is_a_result_and_not_a_number(tmp_path: Path) -> None:
    pruned = Outcome(kind=OutcomeKind.PRUNED, step=50, signal="val_loss", value=4.0, limit=3.0, val_loss=4.0)
    plan = Plan(
        ["BF16", "E5M2"],
        ["adamw", "manifold"],
        offset=lambda name, arm, seed: pruned if (name, arm) == ("E5M2", "manifold") else 0.0,
    )
    finding = write_report(write_ledger(tmp_path, plan))
    assert (finding.results, finding.trials) == (8, 8) and "Incomplete" not in str(finding)
    assert "E5M2 with manifold" not in str(finding)


def sweep_of(out_dir: Path, plan: Plan) -> list[str]:
    """The plan run in the folder as a sweep of its own; returns its trials."""
    ids = [config.trial_id(DATA) for config in plan.configs()]
    write_ledger(out_dir, plan, {"spec": {"name": "s"}, "trials": ids})
    return ids


def test_the_report_is_of_the_sweep_that_ran_last(tmp_path: Path) -> None:
    last = Plan(["BF16", "E5M2"], ["adamw"], steps=20)
    sweep_of(tmp_path, last)
    wide = sweep_of(
        tmp_path,
        Plan(
            ["BF16", "E5M2", "E4M3"],
            ["adamw"],
            seeds=3,
            steps=20,
            offset=lambda name, *_: None if name == "E4M3" else 0.0,
        ),
    )
    ids = sweep_of(tmp_path, last)
    finding = write_report(tmp_path)
    assert (finding.results, finding.trials) == (4, 4) and "Incomplete" not in str(finding)
    assert "E4M3" not in str(finding)
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "5 other trials of earlier sweeps in this folder are left out; results.csv lists every" in text
        assert ids[0] not in text.split("Provenance")[-1], "the ids are no provenance that anyone reads"
    assert len(pd.read_csv(tmp_path / "report" / "results.csv")) == 9
    assert write_report(tmp_path, wide).trials == 9, "trials given win over those of sweep.json"


def test_trials_of_other_lengths_are_not_mixed_in(tmp_path: Path) -> None:
    """Trained to 20, a part of it on to 40, then more seeds at 20: all compare at 20."""
    sweep_of(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], steps=20))
    sweep_of(tmp_path, Plan(["BF16"], ["adamw"], steps=40, offset=lambda *_: -0.9))
    short = Plan(
        ["BF16", "E5M2"], ["adamw"], seeds=3, steps=20, offset=lambda name, _, seed: 0.0 if seed == 2 else None
    )
    sweep_of(tmp_path, short)
    finding = write_report(tmp_path)
    assert (finding.results, finding.trials) == (4, 6), "the rows at step 20 were written over without a loss"
    assert "(decided" not in str(finding)
    assert "2 trials were trained past the steps asked for" in str(finding)


def test_a_sweep_that_the_ledger_does_not_know_is_named(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16"], ["adamw"], steps=20), {"trials": ["feedfeedfeed"]})
    with pytest.raises(ValueError, match="holds none of the sweep's 1 trials"):
        write_report(tmp_path)


def test_a_blown_up_reference_still_gives_a_report(tmp_path: Path) -> None:
    finding = write_report(
        write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw", "grid"], steps=20, offset=lambda *_: 1.2e11))
    )
    assert "did not learn" in finding.answers[0].text
    assert "reference (did not learn)" in (tmp_path / "report" / "report.md").read_text()


def test_seeds_that_ran_on_more_than_one_kind_of_device_are_named(tmp_path: Path) -> None:
    write_ledger(tmp_path, Plan(["BF16", "E5M2"], ["adamw"], seeds=3))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for trial_id, outcome in ledger.outcomes().items():
            trial = ledger.trials()[trial_id]
            kind = "H100" if trial["seed"] == 0 or (trial["seed"], trial["format"]) == (1, "BF16") else "A100"
            ledger.record_outcome(trial_id, replace(outcome, device=kind))
    write_report(tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Trials of seed 1 ran on different devices" in text
    table = pd.read_csv(tmp_path / "report" / "results.csv")
    assert sorted(table[table["seed"] == 1]["device"]) == ["A100", "H100"]


def test_a_second_process_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large sweep it draws half of the pictures meanwhile."""
    out_dir = write_ledger(tmp_path / "out", Plan(["BF16", "E5M2"], ["adamw", "grid"], lrs=(1e-3, 2e-3), steps=20))
    written = {}
    for name, least in (("alone", 1 << 40), ("together", 0)):
        monkeypatch.setattr(report, "LARGE", least)
        monkeypatch.setattr(report, "cores", lambda: 2)
        write_report(out_dir, to=tmp_path / "report")
        files = [path for path in (tmp_path / "report").rglob("*") if path.is_file()]
        written[name] = {path.name: path.read_bytes() for path in files}
    assert written["alone"] == written["together"] and "heat_map.png" in written["alone"]
