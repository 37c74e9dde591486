"""Exports: small, whole, only added to; a sweep goes on elsewhere from one, and is read from one alone."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from altgrad.analysis import load
from altgrad.analysis.report import write_report
from altgrad.cli import main
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record import shards
from altgrad.sweep.record.layer_table import FILE, read_layers
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.record.signs import from_text
from altgrad.sweep.record.transfer import LEAN, export_sweep, import_sweep, points, to_bits
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import read_rows
from altgrad.training.reference import ReferenceCurve
from altgrad.training.trainer import Trainer
from tests.sweep.trained import SPEC, train


def losses(out: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, training loss) of each trial as its file has it."""
    return {
        path.parent.name: [(row["step"], row["train_loss"]) for row in read_rows(path)[0]]
        for path in sorted((out / "trials").glob("*/metrics.jsonl"))
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing interrupted."""
    return train(tmp_path_factory.mktemp("whole") / "sweep")


@pytest.fixture(scope="module")
def exported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "export"
    export_sweep(whole, folder)
    return folder


def test_a_sweep_goes_on_elsewhere_where_it_was(whole: Path, tmp_path: Path) -> None:
    here, there, folder = tmp_path / "here", tmp_path / "another user" / "there", tmp_path / "export"
    train(here, first=5, interrupted=[3])
    first = export_sweep(here, folder)
    assert (first.trials, first.ended) == (10, 4), "of the interrupted one only its name goes along"
    before = contents(folder)
    assert export_sweep(here, folder).shard is None, "nothing is new"
    found = import_sweep(folder, there)
    assert (found.trials, found.entered, found.known) == (10, 4, 0)
    assert export_sweep(there, folder).shard is None, "an import holds what its export held"
    train(there)
    assert losses(there) == losses(whole), "bit for bit, each step once"
    assert export_sweep(there, folder).ended == 6
    assert before.items() <= contents(folder).items(), "shards are never rewritten"
    back = import_sweep(folder, here)
    assert (back.entered, back.known, back.differing) == (6, 4, 0)
    ours, theirs = load(here).trials, load(whole).trials
    pd.testing.assert_series_equal(ours.set_index("trial_id")["val_loss"], theirs.set_index("trial_id")["val_loss"])


def test_a_report_of_an_export_is_the_sweeps(whole: Path, exported: Path, tmp_path: Path) -> None:
    for out, name in ((whole, "one"), (exported, "other")):
        write_report(out, to=tmp_path / name)
    own, theirs = (tmp_path / side for side in ("one", "other"))
    assert (own / "results.csv").read_text() == (theirs / "results.csv").read_text()
    # A sweep's report leads to its trials' folders, which an export has not.
    texts = [(side / "report.md").read_text().replace(str(side), "") for side in (own, theirs)]
    assert re.sub(r"\[(\w+)\]\([^)]*/trials/[^)]*\)", r"\1", texts[0]) == texts[1]


@pytest.mark.parametrize("words", [["status"], ["why"], ["best"], ["report"]], ids=lambda words: words[0])
def test_commands_read_an_export(words: list[str], exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "export")
    assert main([*words, str(tmp_path / "export")]) == 0


def test_references_are_exported_exactly(whole: Path, exported: Path, tmp_path: Path) -> None:
    import_sweep(exported, tmp_path / "there")
    frames = load(whole)
    name = frames.trials.query("format == 'BF16'")["trial_id"].iloc[0]
    own, taken = (ReferenceCurve.read(out / "trials" / name) for out in (whole, tmp_path / "there"))
    assert own.version == taken.version
    layers = load(exported).layer_signals("flip_yield", "stable_rank")
    ours = frames.layer_signals("flip_yield", "stable_rank")
    both = ours.merge(layers, on=["trial_id", "step", "layer"], suffixes=("", "_exported"))
    assert len(both) == len(layers)
    assert both["stable_rank"].isna().sum() == 0, "measured at every check of a reference"
    both = both.dropna()
    pd.testing.assert_series_equal(both["flip_yield"], both["flip_yield_exported"], check_names=False, rtol=1e-7)


def test_signs_of_failure_are_exported_as_they_were_seen(whole: Path, exported: Path, tmp_path: Path) -> None:
    """An import has layers at few steps only, from which they would come out later, or not at all."""
    import_sweep(exported, tmp_path / "there")
    ledgers = (whole, tmp_path / "there", shutil.copytree(whole, tmp_path / "old"))
    with sqlite3.connect(tmp_path / "old" / "ledger.sqlite") as connection:
        connection.execute("ALTER TABLE outcomes DROP COLUMN signs")
    with Ledger(tmp_path / "old" / "ledger.sqlite") as ledger:
        assert set(ledger.signs().values()) == {None}
        Recorder(ledger, tmp_path / "old" / "trials").ingest(ledger.trials())
    found = []
    for out in ledgers:
        with Ledger.reading(out / "ledger.sqlite") as ledger:
            found.append(ledger.signs())
    assert found[0] == found[1] == found[2]
    assert any(from_text(text or "[]") for text in found[0].values()), "E7M0 to nearest shows some"


def test_a_lean_export_rounds_signals_and_no_result(whole: Path, exported: Path, tmp_path: Path) -> None:
    lean = tmp_path / "lean"
    assert export_sweep(whole, lean, LEAN).bytes < 0.7 * sum(path.stat().st_size for path in exported.rglob("*"))
    assert export_sweep(whole, lean, LEAN).shard is None
    few, all_ = load(lean), load(whole)
    exact = ["trial_id", "outcome", "step", "val_loss", "perplexity", "bits_per_byte", "signal", "value", "message"]
    pd.testing.assert_frame_equal(few.trials[exact], all_.trials[exact])
    ours, theirs = (frame.rows.set_index(["trial_id", "step"]) for frame in (few, all_))
    assert ours.index.equals(theirs.index), "each step once"
    pd.testing.assert_series_equal(ours["val_loss"], theirs["val_loss"])
    for name in ("train_loss", "grad_norm", "flip_yield", "stable_rank"):
        known = ours[name].notna()
        assert known.any()
        pd.testing.assert_series_equal(ours[name][known], theirs[name][known], rtol=2**-12)
        assert (ours[name][known] != theirs[name][known]).any()
    assert few.layers.groupby(["trial_id", "layer", "signal"]).size().median() == 1
    reports = [write_report(folder, to=tmp_path / str(place)) for place, folder in enumerate((whole, lean))]
    assert str(reports[0]) == str(reports[1])


def test_a_signal_is_rounded_to_nearest() -> None:
    given = [1.0, 1 + 2**-12, 1 + 3 * 2**-12, -(1 + 2**-11), 0.0, math.inf, 5e-324]
    assert to_bits(np.array(given), 12).tolist() == [1.0, 1.0, 1 + 2**-10, -(1 + 2**-11), 0.0, math.inf, 5e-324]
    assert np.isnan(to_bits(np.array([math.nan]), 12)).all()


def test_points_are_the_first_the_last_and_checkpoints() -> None:
    assert points(range(10, 301, 10), 50, 4) == [10, 100, 200, 300]
    assert points([10, 110, 210], 50, 4) == [10, 110, 210], "measured at few steps: all of them"
    assert points(range(10, 811, 100), 50, 4) == [10, 310, 510, 810]
    assert points(range(10, 301, 10), 50, 2) == [10, 300] and points(range(10, 301, 10), 50, 1) == [300]
    assert points([7], 50, 4) == [7]
    assert points([], 50, 4) == []


def test_a_table_of_layers_is_made_again_from_the_record(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    name = next(iter(losses(out)))
    folder = out / "trials" / name
    table = read_layers(folder).to_pandas()
    recorded = [
        (row["step"], layer, signal, str(float(value)))
        for row in read_rows(folder / "metrics.jsonl")[0]
        for layer, signals in row.get("layers", {}).items()
        for signal, value in signals.items()
    ]
    columns = table["step"], table["layer"], table["signal"], table["value"].map(str)
    assert sorted(zip(*columns, strict=True)) == sorted(recorded)
    made = (folder / FILE).read_bytes()
    for damage in ("missing", "torn", "of a shorter record"):
        if damage == "torn":
            (folder / FILE).write_bytes(made[:200])
        elif damage == "missing":
            (folder / FILE).unlink()
        else:
            (folder / FILE).write_bytes(made)
            lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
            table = table[table["step"] < SPEC.base.steps].reset_index(drop=True)
        pd.testing.assert_frame_equal(read_layers(folder).to_pandas(), table)
    (folder / FILE).unlink()
    train(out)
    assert (folder / FILE).exists()


def test_every_checkpoint_can_be_kept(tmp_path: Path) -> None:
    config = SPEC.expand()[0]
    Trainer(config, folder=tmp_path / "one", keep_checkpoints=True).run()
    Trainer(config, folder=tmp_path / "other").run()
    assert sorted(path.name for path in (tmp_path / "one" / "checkpoint").iterdir()) == [
        "state.pt",
        "step-000010.pt",
        "step-000020.pt",
    ]
    assert [path.name for path in (tmp_path / "other" / "checkpoint").iterdir()] == ["state.pt"]
    steps = [torch.load(tmp_path / "one" / "checkpoint" / f"step-0000{step}.pt")["step"] for step in (10, 20)]
    assert steps == [10, 20]


def spoil(folder: Path, how: str) -> None:
    shard = next(item for item in folder.iterdir() if item.is_dir())
    path = shard / "steps.parquet"
    data = path.read_bytes()
    if how == "torn":
        path.write_bytes(data[:-20])
    elif how == "flipped":
        path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    elif how == "missing":
        path.unlink()
    elif how == "newer":
        table = pq.read_table(shard / "trials.parquet").replace_schema_metadata({"altgrad.export": "9"})
        pq.write_table(table, shard / "trials.parquet")
        shard.rename(folder / f"0001-{shards._digest(shard)}")
    elif how == "empty":
        shutil.rmtree(shard)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("torn", "is not what was exported"),
        ("flipped", "is not what was exported"),
        ("missing", "is not what was exported"),
        ("newer", "is of version 9 of exports"),
        ("empty", "no export in this folder"),
    ],
)
def test_a_spoilt_export_is_named(how: str, said: str, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    spoil(folder, how)
    with pytest.raises(SpecError, match=said):
        import_sweep(folder, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "{none}", "{new}"], "no sweep in this folder"),
        (["export", "{export}", "{new}"], "is an export; the folder of a sweep is expected"),
        (["export", "{sweep}", "{sweep}"], "holds other things"),
        (["export", "{sweep}", "{file}"], "is a file; a folder is expected"),
        (["import", "{sweep}", "{new}"], "no export in this folder"),
        (["import", "{export}", "{export}"], "is an export, which stays as it is"),
        (["import", "{export}", "{other}"], "holds other things"),
        (["run", "--out", "{export}"], "is an export, which stays as it is"),
    ],
)
def test_a_wrong_folder_is_named(
    words: list[str], said: str, whole: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("none", "new", "file", "other")}
    places["file"].write_text("a text")
    places["other"].mkdir()
    (places["other"] / "letters.txt").write_text("a text")
    before = contents(whole), contents(exported)
    assert main([word.format(sweep=whole, export=exported, **places) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert (contents(whole), contents(exported)) == before


def test_what_a_killed_export_left_is_no_shard(whole: Path, tmp_path: Path) -> None:
    left = tmp_path / "export" / ".partial-0001"
    left.mkdir(parents=True)
    (left / "trials.parquet").write_bytes(b"torn")
    assert export_sweep(whole, tmp_path / "export").ended == 10
    assert not left.exists()


def test_of_a_trial_in_two_shards_the_later_counts_unless_it_has_no_ending(tmp_path: Path) -> None:
    """Two machines add to copies of one export, and the copies are put together."""
    here, there = train(tmp_path / "here", first=4), tmp_path / "there"
    folder, copy = tmp_path / "export", tmp_path / "copy"
    export_sweep(here, folder)
    shutil.copytree(folder, copy)
    import_sweep(copy, there)
    train(here, first=6)
    train(there)
    export_sweep(here, folder)
    export_sweep(there, copy)
    for shard in copy.iterdir():
        if not (folder / shard.name).exists():
            shutil.copytree(shard, folder / shard.name)
    assert len(list(folder.iterdir())) == 3
    assert set(load(folder).trials["outcome"]) == {"done"}


def test_non_finite_numbers_and_words_come_through(tmp_path: Path) -> None:
    out, sha = tmp_path / "sweep", "0" * 64
    trials = SPEC.trials(sha)
    name = next(iter(trials))
    rows = [
        {"step": 1, "train_loss": 5.0, "lr": 1e-3},
        {"step": 2, "train_loss": float("nan"), "grad_norm": float("inf"), "tokens_per_s": 9.0, "shifts": ["a: b->c"]},
    ]
    rows[1]["formats"] = "a: b->c"
    with Ledger(out / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, sha)
        ledger.record_rows(name, rows)
        ledger.record_outcome(name, Outcome(OutcomeKind.NONFINITE, 2, "train_loss", value=float("nan")))
    export_sweep(out, tmp_path / "export")
    import_sweep(tmp_path / "export", tmp_path / "there")
    text = (tmp_path / "there" / "trials" / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in text] == [
        {"step": 1, "train_loss": 5.0},
        {"step": 2, "train_loss": "nan", "grad_norm": "inf", "tokens_per_s": 9.0}
        | {"shifts": ["a: b->c"], "formats": "a: b->c"},
    ]
    for place in ("sweep", "export", "there"):
        with Ledger.reading(tmp_path / place / "ledger.sqlite") as ledger:
            assert str(ledger.outcomes()[name].value) == "nan"
            assert str(dict(ledger.signal(name, "train_loss"))[2]) == "nan"


@pytest.mark.slow
def test_a_killed_sweep_is_finished_on_another_machine(tmp_path: Path) -> None:
    """Under Ray: killed with -9 in the middle, exported, imported under another folder, finished there."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(SPEC.model_dump(mode="json") | {"steps": 60, "seeds": 3}))

    def run(out: Path) -> list[str]:
        return [sys.executable, "-m", "altgrad", "run", str(config), "--out", str(out), "--max-concurrent", "2"]

    here, there, alone = tmp_path / "here", tmp_path / "elsewhere" / "there", tmp_path / "alone"
    subprocess.run(run(alone), check=True, capture_output=True)
    driver = subprocess.Popen(run(here), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(list(here.glob("trials/*/outcome.json"))) < 4 and driver.poll() is None:
        time.sleep(0.05)
    assert driver.poll() is None, "it was to be killed in the middle"
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert main(["export", str(here), str(tmp_path / "export")]) == 0
    assert main(["import", str(tmp_path / "export"), str(there)]) == 0
    done = subprocess.run(run(there), check=True, capture_output=True, text=True)
    assert losses(there) == losses(alone), "bit for bit, each step once"
    assert "nothing was left to run" not in done.stdout
