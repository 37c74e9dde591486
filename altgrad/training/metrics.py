"""Loss and what follows from it: perplexity and bits per byte; and the scores of a classification, by scikit-learn.

Bits per byte make runs with different tokenizers comparable: nats per token over ln 2, over bytes per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altgrad.training.catalogue import CLASSIFICATION_SCORES


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; inputs and targets are [batch, time]."""
    logits = model(inputs).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean validation loss in nats per token over batches of equal size.

    In evaluation mode, so that no scale history and no draw of stochastic rounding moves on.
    """
    was_training = model.training
    model.eval()
    losses = [token_loss(model, inputs, targets) for inputs, targets in batches]
    model.train(was_training)
    return float(torch.stack(losses).mean())


def bits_per_byte(loss: float, *, bytes_per_token: float = 1.0) -> float:
    """Nats per token as bits per byte."""
    return loss / math.log(2) / bytes_per_token


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.inf if loss >= 700 else math.exp(loss)


def best_threshold(targets: np.ndarray, chances: np.ndarray) -> tuple[float, float]:
    """The chance from which on a label is given that maximises micro F1, and that F1; arrays [documents, labels].

    (0.5, nan) where a chance is no number, (0.5, 0) where no document has a label.
    """
    from sklearn.metrics import precision_recall_curve

    if not np.isfinite(chances).all():
        return 0.5, math.nan
    if not targets.any():
        return 0.5, 0.0
    precision, recall, thresholds = precision_recall_curve(targets.ravel(), chances.ravel())
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(thresholds[best]), float(f1[best])


def classification_scores(targets: np.ndarray, chances: np.ndarray, threshold: float) -> dict[str, float]:
    """CLASSIFICATION_SCORES by scikit-learn; arrays [documents, labels], precision and recall are micro averages.

    Everything is NaN where a chance is no number; the areas are where the targets are all alike, and f1_macro where
    there are none.
    """
    from sklearn import metrics

    if not np.isfinite(chances).all():
        return dict.fromkeys(CLASSIFICATION_SCORES, math.nan)
    truth = targets.astype(np.int8)
    given = (chances >= threshold).astype(np.int8)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        _multilabel(truth), _multilabel(given), average="micro", zero_division=0
    )
    mixed = 0 < truth.sum() < truth.size
    return {
        "f1_micro": float(f1),
        "f1_macro": f1_macro(truth, given),
        "precision": float(precision),
        "recall": float(recall),
        "subset_accuracy": float(metrics.accuracy_score(truth, given)),
        "hamming_loss": float(metrics.hamming_loss(truth, given)),
        "roc_auc_micro": float(metrics.roc_auc_score(truth.ravel(), chances.ravel())) if mixed else math.nan,
        "pr_auc_micro": float(metrics.average_precision_score(truth.ravel(), chances.ravel())) if mixed else math.nan,
    }


def f1_macro(truth: np.ndarray, given: np.ndarray) -> float:
    """Mean F1 of the labels that some document has, 0 for one that is never right; arrays [documents, labels].

    Other labels have no F1: no model can be right about them here, so they would cap every method alike. Leaving out
    by `truth` alone averages all models over the same labels. NaN where no document has a label.
    """
    from sklearn import metrics

    is_present = truth.any(axis=0)
    if not is_present.any():
        return math.nan
    of_label = metrics.f1_score(_multilabel(truth), _multilabel(given), average=None, zero_division=0)
    return float(of_label[:-1][is_present].mean())


def _multilabel(columns: np.ndarray) -> np.ndarray:
    """With a last column of zeros: a single one scikit-learn takes for a binary problem and scores "no" as well."""
    return np.pad(columns, ((0, 0), (0, 1)))


def baseline_f1(frequencies: np.ndarray, val_targets: np.ndarray, targets: np.ndarray) -> float:
    """Micro F1 of giving every document the k commonest labels, k the best for `val_targets`; [documents, labels].

    `frequencies` [known labels] are shares of the training documents; targets may have further columns.
    """
    order = np.argsort(-frequencies, kind="stable")
    best = int(np.argmax(_commonest_f1(order, val_targets)))
    return float(_commonest_f1(order, targets)[best])


def _commonest_f1(order: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Micro F1 for every k from 1 on: 2 · hits / (given + wanted)."""
    hits = np.cumsum(targets.sum(axis=0)[order])
    given = len(targets) * np.arange(1, len(order) + 1)
    f1: np.ndarray = 2 * hits / (given + targets.sum())
    return f1
