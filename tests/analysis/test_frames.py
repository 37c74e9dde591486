"""Frames for whoever goes on with pandas: one row a trial, a column per axis, the same of a sweep and of its export."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from altgrad.analysis import load
from altgrad.analysis.frames import results_table
from altgrad.analysis.records import load as load_records
from altgrad.analysis.report import write_report
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.transfer import export_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import write_json
from tests.sweep.trained import SPEC, train

SHA = "0" * 64


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("frames") / "sweep", first=8, interrupted=[7])


@pytest.fixture(scope="module")
def export(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames") / "export"
    export_sweep(sweep, folder)
    return folder


def recorded(out: Path, spec: SweepSpec) -> Path:
    trials = spec.trials(SHA)
    with Ledger(out / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, SHA)
        for name in list(trials)[:-1]:
            ledger.record_rows(name, [{"step": spec.base.steps, "train_loss": 2.0, "val_loss": 2.0, "flip_rate": 0.25}])
            ledger.record_outcome(
                name, Outcome(OutcomeKind.DONE, spec.base.steps, val_loss=2.0, driver="570.1", hostname="a")
            )
    write_json(out / "sweep.json", {"spec": spec.model_dump(mode="json"), "trials": list(trials)})
    return out


AXES = (
    ({"optimizer.beta2": [0.9, 0.99], "data.batch": [4, 8]}, {"optimizer.beta2": {0.9, 0.99}, "data.batch": {4, 8}}),
    ({"adamw.beta2": [0.95]}, {"optimizer.beta2": {0.95}}),
    ({"schedule.kind": ["cosine", "constant"]}, {"schedule.kind": {"cosine", "constant"}}),
    ({"model": ["quick", "gpt-10m"]}, {"model": {"quick", "gpt-10m"}, "model.width": {64, 384}}),
    ({}, {}),
)


@pytest.mark.parametrize(("axes", "columns"), AXES, ids=[",".join(axes) or "none" for axes, _ in AXES])
def test_results_have_a_column_per_axis_and_a_row_per_trial(
    axes: dict[str, list[object]], columns: dict[str, set[object]], tmp_path: Path
) -> None:
    spec = SweepSpec(formats=("BF16", "E5M2"), optimizers=("adamw",), seeds=2, steps=40, axes=axes)
    out = recorded(tmp_path / "sweep", spec)
    write_report(out)
    results = pd.read_csv(out / "report" / "results.csv")
    assert len(results) == len(spec.expand()), "also of the trial that has not run"
    assert {name: set(results[name]) for name in columns} == columns
    fixed = set(results_table(load_records(out).trials).columns) - set(columns)
    if not columns:
        assert not [name for name in fixed if "." in name]
    assert list(results["perplexity"].dropna()) == pytest.approx([math.exp(2.0)] * (len(results) - 1))
    assert set(results["hostname"].dropna()) == {"a"} and set(results["driver"].dropna()) == {570.1}
    assert set(results["flip_rate"].dropna()) == {0.25} and set(results["steps"]) == {40}


def test_frames_of_a_sweep_and_of_its_export(sweep: Path, export: Path) -> None:
    one, other = load(sweep), load(export)
    has_ended = one.trials["outcome"] != "pending"
    pd.testing.assert_frame_equal(one.trials[has_ended], other.trials[has_ended])
    assert list(one.trials["trial_id"]) == list(other.trials["trial_id"])
    pd.testing.assert_frame_equal(one.outcomes, other.outcomes)
    pd.testing.assert_frame_equal(one.spend, other.spend)
    assert len(one.trials) == 10 and (one.trials["outcome"] == "done").sum() == 7
    # Of the trial that was interrupted only its name was exported.
    ours = one.rows[one.rows["trial_id"].isin(one.outcomes["trial_id"])].set_index(["trial_id", "step"])
    pd.testing.assert_series_equal(ours["train_loss"], other.rows.set_index(["trial_id", "step"])["train_loss"])
    assert len(one.rows) == len(ours) + SPEC.base.steps // 2
    both = one.layers.merge(other.layers, on=["trial_id", "step", "layer", "signal"])
    assert len(both) == len(other.layers) > 0
    assert list(both["value_x"]) == pytest.approx(list(both["value_y"]), rel=1e-6, nan_ok=True)


def test_what_a_trained_trial_says_of_itself(sweep: Path) -> None:
    found = load(sweep)
    trial = found.trials.query("format == 'E5M2' and state == 'finished'").iloc[0]
    assert trial["perplexity"] == pytest.approx(math.exp(trial["val_loss"]))
    assert trial["tokens_per_s"] > 0 and trial["hostname"] and trial["device"]
    last = found.rows.query("trial_id == @trial.trial_id").iloc[-1]
    weights = last["flips"] / last["flip_rate"] / SPEC.base.log_interval
    assert weights == pytest.approx(4 * 16 * 16 * 3 + 16 * 256, rel=1e-9), "attention, MLP and head of the tiny model"
    assert last["flip_rate_per_epoch"] / last["flip_rate"] > 1000, (
        "a pass over the text takes that many steps of 32 bytes"
    )
    layers = found.layer_signals("flip_rate", "flips")
    assert set(layers.columns) == {"trial_id", "step", "layer", "flip_rate", "flips"}


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds neither a sweep"):
        load(tmp_path)
