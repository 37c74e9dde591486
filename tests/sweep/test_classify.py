"""Classification from the command line: the task brings its own shape, flags are checked, a sweep ends in F1."""

import sqlite3
from pathlib import Path

import pandas as pd
import pytest

from altgrad.cli import main, sweep_main
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.ledger_schema import ROW_SIGNALS
from altgrad.sweep.space.presets import CLASSIFY, PRESETS, for_task
from altgrad.sweep.space.resolve import resolve
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import MODELS

SMALL = [
    "--task",
    "classify",
    "--data",
    "synthetic",
    "--formats",
    "E5M2",
    "--optimizers",
    "adamw,manifold",
    "--seeds",
    "2",
    "--steps",
    "40",
]
FILE = """
log_interval: 10
eval_interval: 20
checkpoint_interval: 20
model: {layers: 1, heads: 2, width: 32, block: 32}
"""
EFFECTS = "Geometry-aware minus plain steps, by score and signal"


def _section(report: str, title: str) -> str:
    return report.split(f"## {title}\n")[1].split("\n##")[0]


@pytest.mark.parametrize("size", PRESETS)
def test_every_size_has_a_shape_for_both_tasks(size: str):
    found = resolve(PRESETS[size], {"task": "classify", "data.source": "synthetic"})
    assert found.task == "classify" and found.steps == CLASSIFY[size]["steps"]
    assert found.model == CLASSIFY[size]["model"] and found.data.tokenizer == CLASSIFY[size]["data"]["tokenizer"]
    assert (found.formats, found.optimizers, found.seeds) == (
        PRESETS[size].formats,
        PRESETS[size].optimizers,
        PRESETS[size].seeds,
    )
    back = for_task(found, "lm")
    assert back.task == "lm" and back.data.tokenizer == "bytes" and back.schedule == PRESETS[size].schedule


def test_the_same_task_changes_nothing_and_what_is_said_wins(tmp_path: Path):
    assert resolve(SweepSpec(), {"task": "lm"}) == SweepSpec()
    file = tmp_path / "s.yaml"
    file.write_text(
        "task: classify\nsteps: 60\ndata: {source: synthetic, tokenizer: bytes}\n"
        "eval_interval: 20\ncheckpoint_interval: 20\n"
    )
    found = resolve(SweepSpec(), {"data.label_field": "topics"}, file)
    assert (found.steps, found.data.tokenizer, found.data.label_field) == (60, "bytes", "topics")
    assert found.model == CLASSIFY["quick"]["model"]


def test_a_model_goes_by_its_name():
    assert resolve(SweepSpec(), {"model": "gpt-50m"}).model == MODELS["gpt-50m"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "clasify"], ["--task", "'clasify'", "nearest: classify"]),
        (["--task", "classify"], ["--data", "'pydoc' has no labels", "'synthetic'"]),
        ([*SMALL, "--tokenizer", "word"], ["--tokenizer", "'word'", "nearest: words"]),
        (["--tokenizer", "words"], ["tokenizer='words-8000'", "bytes or bpe"]),
        (["--model", "gpt-50"], ["--model", "'gpt-50'", "nearest: gpt-50m"]),
        (["--task", "classify", "--data", "syntetic"], ["--data", "'syntetic'", "nearest: synthetic"]),
        (
            ["--task", "classify", "--data", "a.jsonl", "--label-field", "label"],
            ["a.jsonl", "'label'", "nearest: labels"],
        ),
    ],
)
def test_bad_flags_end_with_2_and_one_line(tmp_path: Path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "labels": ["x"]}\n' * 20)
    assert sweep_main(SweepSpec(), arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and not list(tmp_path.glob("runs"))
    for part in expected:
        assert part in message, message


@pytest.mark.slow
def test_a_sweep_ends_in_f1_per_format_and_optimizer_with_intervals(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(FILE)
    assert main(["run", "s.yaml", *SMALL, "--out", "out"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "in 1 − F1 micro" in printed
    results = pd.read_csv(tmp_path / "out" / "report" / "results.csv")
    assert len(results) == 6 and (results["task"] == "classify").all()
    assert results[["f1_micro", "f1_macro", "roc_auc_micro", "samples_per_s"]].notna().all().all()
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    scores, effects = (_section(report, title) for title in ("Classification scores", EFFECTS))
    assert all(f"| {name} " in scores for name in ("E5M2 | adamw", "E5M2 | manifold", "BF16 | adamw"))
    (geometry,) = [line for line in effects.splitlines() if line.startswith("| E5M2 | manifold | adamw")]
    by = results[results["format"] == "E5M2"].pivot(index="seed", columns="optimizer", values="f1_micro")
    mean = (by["manifold"] - by["adamw"]).mean()
    assert f"{mean:+.3f} [".replace("-", "−") in geometry
    assert (tmp_path / "out" / "trials" / results["trial_id"][0] / "labels.json").exists()


def test_a_ledger_of_an_earlier_version_gains_the_columns(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE rows (trial_id TEXT, step INTEGER, train_loss REAL, layers TEXT, "
            "PRIMARY KEY (trial_id, step)) WITHOUT ROWID"
        )
    with Ledger(path) as ledger:
        ledger.record_rows("t", [{"step": 1, **dict.fromkeys(ROW_SIGNALS, 0.5)}])
        assert ledger.signal("t", "f1_macro") == [(1, 0.5)]
