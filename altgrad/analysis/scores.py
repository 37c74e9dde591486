"""Classification: what its cells are judged by, and its scores per format and optimizer.

A classifier is judged by its error, 1 - F1 micro on test documents, and not by its loss: the weighted cross-entropy of
a classifier that goes on learning may rise on new documents while its decisions still improve. In place of the loss at
the first step stands the error of answering every document with the k commonest labels, k tuned on validation
documents: what does not beat that has learned nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from altgrad.analysis.contrasts import Contrast
from altgrad.analysis.inference import t_interval
from altgrad.analysis.records import FINISHED
from altgrad.analysis.study import Study
from altgrad.analysis.tables import DASH, Table, links, number, slim
from altgrad.analysis.wording import signed

SHOWN = {
    "f1_micro": "F1 micro",
    "f1_macro": "F1 macro",
    "precision": "precision",
    "recall": "recall",
    "subset_accuracy": "subset accuracy",
    "hamming_loss": "hamming loss",
    "roc_auc_micro": "ROC-AUC micro",
    "pr_auc_micro": "PR-AUC micro",
    "samples_per_s": "samples/s",
}
COMPARED = ("f1_micro", "f1_macro")
SIGNALS_COMPARED = {"stall_ratio": "stall ratio", "flip_yield": "flip yield", "stable_rank": "stable rank"}
EFFECTS = {
    "lm": {"val_loss": "loss, nats", "bits_per_byte": "bits per byte", "perplexity": "perplexity"} | SIGNALS_COMPARED,
    "classify": {"val_loss": "loss, nats", "f1_micro": "F1 micro", "f1_macro": "F1 macro"} | SIGNALS_COMPARED,
}
"""By task, what a geometry-aware arm is held against its plain arm in."""


def judged(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials with, for classification, the error in place of the validation loss; others as they are."""
    is_classified = trials["task"] == "classify"
    if not is_classified.any():
        return trials
    found = trials.copy()
    found.loc[is_classified, "val_loss"] = 1 - trials.loc[is_classified, "f1_micro"]
    found.loc[is_classified, "first_loss"] = 1 - trials.loc[is_classified, "baseline_f1_micro"]
    return found


def scores_table(trials: pd.DataFrame, study: Study) -> Table | None:
    """Every cell's mean scores over its finished seeds, F1 with half its 95 % interval; None without classifiers."""
    if not (trials["task"] == "classify").any():
        return None
    by_id = trials.set_index("trial_id")
    lines = []
    for cell in study.cells:
        own = by_id.loc[list(cell.trial_ids)]
        own = own[own["state"] == FINISHED]
        texts = [_mean_text(own[name], with_interval=name in COMPARED) for name in SHOWN]
        lines.append((cell.format, cell.arm, cell.policy, str(len(own)), *texts))
    columns = ("format", "arm", "policy", "finished", *SHOWN.values())
    return slim(Table(columns, lines, frozenset(range(3, len(columns))), "format", links(study.cells)), ("policy",))


def effects_table(trials: pd.DataFrame, study: Study) -> Table:
    """What a geometry-aware arm changes in every score and signal, against the plain arm of its residence: differences
    paired by seed, 95 % intervals, a line per format, policy and arm."""
    task = "lm" if trials.empty else str(trials["task"].iloc[0])
    finished = {trial["trial_id"]: trial for trial in trials[trials["state"] == FINISHED].to_dict("records")}
    lines, shown = [], []
    for item in study.gains:
        texts = [_difference_text(finished, item, name) for name in EFFECTS[task]]
        if set(texts) != {DASH}:
            lines.append((item.cell.format, item.cell.policy, item.cell.arm, item.other.arm, *texts))
            shown.append(item.cell)
    columns = ("format", "policy", "arm", "against", *EFFECTS[task].values())
    numeric = frozenset(range(4, len(columns)))
    return slim(Table(columns, lines, numeric, "format", links(shown)), ("policy",))


def _mean_text(values: pd.Series, *, with_interval: bool) -> str:
    found = values.dropna().astype(float)
    if found.empty:
        return DASH
    mean = number(float(found.mean()), ".3f" if found.mean() < 10 else ".0f")
    low, high = t_interval(list(found)) if with_interval else (math.nan, math.nan)
    return mean + ("" if math.isnan(low) else f" ± {(high - low) / 2:.3f}")


def _difference_text(finished: Mapping[str, Mapping[Hashable, Any]], item: Contrast, name: str) -> str:
    own, other = (_by_seed(finished, cell.trial_ids, name) for cell in (item.cell, item.other))
    common = own.keys() & other.keys()
    if not common:
        return DASH
    differences = [own[seed] - other[seed] for seed in sorted(common)]
    low, high = t_interval(differences)
    spread = " (1 seed)" if math.isnan(low) else f" [{signed(low)}, {signed(high)}]"
    return signed(math.fsum(differences) / len(differences)) + spread


def _by_seed(finished: Mapping[str, Mapping[Hashable, Any]], trial_ids: Sequence[str], name: str) -> dict[int, float]:
    own = [finished[trial_id] for trial_id in trial_ids if trial_id in finished]
    return {int(trial["seed"]): float(trial[name]) for trial in own if math.isfinite(trial[name])}
