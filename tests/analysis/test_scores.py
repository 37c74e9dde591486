"""Classifiers are judged by their error; what does not beat the commonest labels has learned nothing."""

from pathlib import Path

import pytest
from synthetic import DATA

from altgrad.analysis.grids import build_cells
from altgrad.analysis.records import load
from altgrad.analysis.report import write_report
from altgrad.analysis.scores import judged
from altgrad.sweep.record.ledger import Ledger
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome, OutcomeKind

BASELINE = 0.5


def write(
    folder: Path,
    f1: dict[tuple[str, str], float],
    val_loss: float = 2.0,
    on_validation: dict[tuple[str, str], float] | None = None,
) -> Path:
    """A ledger of classifiers whose loss has risen, with these F1 (plus .01 per seed) by format and arm."""
    with Ledger(folder / "ledger.sqlite") as ledger:
        for (name, arm), score in f1.items():
            for seed in range(3):
                config = TrainConfig(
                    task="classify",
                    data={"source": "synthetic"},
                    format=name,
                    seed=seed,
                    optimizer=ARMS[arm].model_dump(),
                    steps=100,
                )
                trial_id = config.trial_id(DATA)
                ledger.add_trials({trial_id: config}, DATA)
                ledger.record_rows(
                    trial_id,
                    [
                        {"step": 1, "train_loss": 1.0},
                        {
                            "step": 100,
                            "train_loss": 0.1,
                            "val_loss": val_loss,
                            "f1_micro": score + 0.01 * seed,
                            "f1_macro": score / 2,
                            "baseline_f1_micro": BASELINE,
                            "threshold": 0.4,
                            "samples_per_s": 300.0,
                        }
                        | ({"val_f1_micro": on_validation[name, arm]} if on_validation else {}),
                    ],
                )
                ledger.record_outcome(trial_id, Outcome(OutcomeKind.DONE, 100, train_loss=0.1, val_loss=val_loss))
    return folder


def test_a_risen_loss_does_not_hide_what_was_learned(tmp_path: Path):
    finding = write_report(
        write(
            tmp_path,
            {("BF16", "adamw"): 0.7, ("E4M3", "adamw"): 0.695, ("E7M0", "adamw"): 0.55, ("E4M3", "manifold"): 0.705},
        )
    )
    text = finding.answers[0].text
    assert text.startswith(
        "Within 10 % of BF16 AdamW's error (0.290 in 1 − F1 micro; classify on synthetic, encoder 2 × 64"
    )
    assert "E4M3 trains (decided)" in text and "E7M0 fails in every arm (decided)" in text
    assert "loss" not in f"{finding}" and "nats" not in f"{finding}"


def test_a_reference_no_better_than_the_commonest_labels_decides_nothing(tmp_path: Path):
    finding = write_report(write(tmp_path, {("BF16", "adamw"): 0.5, ("E4M3", "adamw"): 0.5}, val_loss=0.01))
    assert "did not learn" in finding.answers[0].text and "commonest labels 0.500" in finding.answers[0].text


def test_scores_stand_in_the_report_and_the_table_of_results(tmp_path: Path):
    write_report(write(tmp_path, {("BF16", "adamw"): 0.7, ("E4M3", "adamw"): 0.6, ("E4M3", "manifold"): 0.65}))
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "Classification scores" in text and "+0.050 [+0.050, +0.050]" in text
        assert "0.710 ± 0.025" in text and "0.350" in text
        guide = text.split("How to read this")[1].replace("&#39;", "'")
        assert "BF16 AdamW's error" in guide and "below the error of giving every document" in guide
        assert "greatest mean F1 micro on validation documents" in guide and "loss" not in guide
    assert ",f1_micro,f1_macro," in (tmp_path / "report" / "results.csv").read_text().splitlines()[0]


def test_judging_leaves_the_recorded_losses_alone(tmp_path: Path):
    trials = load(write(tmp_path, {("BF16", "adamw"): 0.7})).trials
    assert judged(trials)["val_loss"].tolist() == pytest.approx([0.3, 0.29, 0.28])
    assert trials["val_loss"].tolist() == [2.0] * 3


def test_a_ledger_without_the_columns_can_be_read(tmp_path: Path):
    import sqlite3

    write(tmp_path, {("BF16", "adamw"): 0.7})
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("ALTER TABLE rows DROP COLUMN f1_macro")
    assert load(tmp_path).trials["f1_macro"].isna().all()


def test_learning_rates_are_chosen_by_validation_and_not_by_test(tmp_path: Path):
    # The rate that is better on test is the worse one on validation: it must not be taken.
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for lr, on_test, on_validation in ((1e-3, 0.60, 0.70), (4e-3, 0.68, 0.50)):
            for seed in range(2):
                arm = ARMS["adamw"].model_copy(update={"lr": lr})
                config = TrainConfig(
                    task="classify",
                    data={"source": "synthetic"},
                    format="BF16",
                    seed=seed,
                    optimizer=arm.model_dump(),
                    steps=100,
                )
                trial_id = config.trial_id(DATA)
                ledger.add_trials({trial_id: config}, DATA)
                ledger.record_rows(
                    trial_id,
                    [
                        {
                            "step": 100,
                            "train_loss": 0.1,
                            "val_loss": 1.0,
                            "f1_micro": on_test,
                            "f1_macro": 0.3,
                            "val_f1_micro": on_validation,
                            "baseline_f1_micro": BASELINE,
                        }
                    ],
                )
                ledger.record_outcome(trial_id, Outcome(OutcomeKind.DONE, 100, train_loss=0.1, val_loss=1.0))
    (cell,) = build_cells(judged(load(tmp_path).trials))
    assert cell.lr == 1e-3 and cell.settings == 2
    assert cell.losses == pytest.approx({0: 0.4, 1: 0.4})
