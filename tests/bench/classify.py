"""The document classifier beside TF-IDF with logistic regression and the commonest labels, on a folder of splits.

    python tests/bench/classify.py ../shared/data/eurlex_sample --label-field labels_l1

Two protocols. `train`: everything is fitted on training documents and the threshold tuned for micro F1 on validation
documents, as sweeps do. `train+dev`: everything is fitted on training and validation documents together, which is how a
final model is made where documents are few, under the threshold that is best for macro F1 over the same documents, each
scored by a model that did not see it (FOLDS folds); models on fewer documents have other chances, so that the first
protocol's threshold would not suit. Test documents only score. Macro F1 is over the labels that some test document has,
as everywhere; beside it stands the mean over all labels, where one without a test document counts 0. CPU seconds are
those of all of a line's fitting and scoring, in BF16 emulation on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier

from altgrad.sweep.space.presets import CLASSIFY
from altgrad.training import TrainConfig, Trainer
from altgrad.training.config import DataConfig
from altgrad.training.data import load_documents
from altgrad.training.data.documents import Documents, LabelledSplit
from altgrad.training.metrics import best_threshold, f1_macro

FITTED = ("train", "train+dev")
FOLDS = 4
DOCUMENTS = 110
"""Training documents that the quick preset's steps are meant for."""

Scores = tuple[float, float, float]
"""F1 micro, macro, and macro over all labels."""


class Fitted(NamedTuple):
    """What a method says of a folder's validation and test documents, [documents, labels], and what is true."""

    labels: list[str]
    val: np.ndarray
    val_truth: np.ndarray
    test: np.ndarray
    test_truth: np.ndarray


Method = Callable[[Path], Fitted]
"""Fits on a folder's training documents."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label-field", default="labels")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'method':34} {'fitted on':10} {'F1 micro':>9} {'F1 macro':>9} {'all':>9} {'threshold':>10} {'CPU s':>6}")
    bench_baseline(asked.folder, asked.label_field)
    bench_tfidf(asked.folder, asked.label_field)
    found = [bench_encoder(asked.folder, asked.label_field, seed, asked.weight_decay) for seed in range(asked.seeds)]
    for fitted in FITTED:
        micro, macro, over_all = np.mean([scores[fitted] for scores in found], axis=0)
        name = f"encoder, BF16, mean of {asked.seeds} seeds"
        print(f"{name:34} {fitted:10} {micro:9.3f} {macro:9.3f} {over_all:9.3f}")


def bench_baseline(folder: Path, field: str) -> Scores:
    documents = documents_of(folder, field)
    val, test = truth_of(documents, documents.val), truth_of(documents, documents.test)
    shares = documents.frequencies().numpy()
    # As chances, every document alike: the threshold then chooses k, and test is scored as by any other method.
    chances = np.pad(shares, (0, len(documents.unseen)))
    threshold = best_threshold(val, np.tile(chances, (len(val), 1)))[0]
    return line("k commonest labels", "train", test, np.tile(chances, (len(test), 1)), threshold, 0)


def bench_tfidf(folder: Path, field: str, protocols: Sequence[str] = FITTED) -> dict[str, Scores]:
    """Scores by what it was fitted on."""
    return bench("TF-IDF + logistic regression", lambda part: fit_tfidf(part, field), folder, protocols)


def bench_encoder(
    folder: Path, field: str, seed: int, weight_decay: float = 1.0, protocols: Sequence[str] = FITTED
) -> dict[str, Scores]:
    """Scores of the quick preset's encoder by what it was fitted on."""
    name = f"encoder, BF16, seed {seed}"
    return bench(name, lambda part: fit_encoder(part, field, seed, weight_decay), folder, protocols)


def bench(name: str, method: Method, folder: Path, protocols: Sequence[str]) -> dict[str, Scores]:
    """The scores under each protocol of a method."""
    found = {}
    for protocol in protocols:
        started = time.process_time()
        if protocol == FITTED[0]:
            fitted = method(folder)
            threshold = best_threshold(fitted.val_truth, fitted.val)[0]
        else:
            train, dev, test = (read(folder, split) for split in ("train", "dev", "test"))
            threshold = threshold_by_folds(method, train + dev)
            with tempfile.TemporaryDirectory() as scratch:
                fitted = method(write(Path(scratch), train=train + dev, dev=dev, test=test))
        seconds = time.process_time() - started
        found[protocol] = line(name, protocol, fitted.test_truth, fitted.test, threshold, seconds)
    return found


def threshold_by_folds(method: Method, documents: list[str]) -> float:
    """The threshold with the best macro F1 over all documents, each scored by a model that did not see it."""
    parts = np.array_split(np.random.RandomState(0).permutation(len(documents)), FOLDS)
    found = []
    for held in parts:
        with tempfile.TemporaryDirectory() as scratch:
            rest, own = (
                [documents[i] for i in np.concatenate([p for p in parts if (p is held) == is_held])]
                for is_held in (False, True)
            )
            found.append(method(write(Path(scratch), train=rest, dev=own, test=own)))
    labels = sorted({label for fitted in found for label in fitted.labels})
    chances, truth = (
        np.concatenate([columns_of(fitted, values, labels) for fitted, values in each])
        for each in ([(f, f.test) for f in found], [(f, f.test_truth) for f in found])
    )
    candidates = np.arange(0.01, 1.0, 0.01)
    return float(max(candidates, key=lambda threshold: scores_of(truth, chances, threshold)[1]))


def columns_of(fitted: Fitted, values: np.ndarray, labels: list[str]) -> np.ndarray:
    """[documents, labels] in the order of `labels`, 0 for those the part does not have."""
    columns = np.zeros((len(values), len(labels)))
    columns[:, [labels.index(label) for label in fitted.labels]] = values
    return columns


def read(folder: Path, split: str) -> list[str]:
    """The lines of a split; texts may hold other characters that Python would break lines at."""
    return (folder / f"{split}.jsonl").read_text().rstrip("\n").split("\n")


def write(folder: Path, **splits: list[str]) -> Path:
    """The folder, with a file of lines for each split."""
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{text}\n" for text in lines))
    return folder


def scores_of(truth: np.ndarray, chances: np.ndarray, threshold: float) -> Scores:
    given = chances >= threshold
    micro, over_all = (float(f1_score(truth, given, average=kind, zero_division=0)) for kind in ("micro", "macro"))
    return micro, f1_macro(truth, given), over_all


def line(method: str, fitted: str, truth: np.ndarray, chances: np.ndarray, threshold: float, seconds: float) -> Scores:
    """Prints a line of the table and returns its scores."""
    micro, macro, over_all = found = scores_of(truth, chances, threshold)
    print(
        f"{method:34} {fitted:10} {micro:9.3f} {macro:9.3f} {over_all:9.3f} {threshold:10.3f} {seconds:6.0f}",
        flush=True,
    )
    return found


def documents_of(folder: Path, field: str) -> Documents:
    return load_documents(DataConfig(source=str(folder), label_field=field))


def texts(split: LabelledSplit) -> list[str]:
    tokens, lengths = split.inputs(np.arange(len(split)), 1 << 30)
    return [bytes(row[:n].tolist()).decode() for row, n in zip(tokens, lengths, strict=True)]


def truth_of(documents: Documents, split: LabelledSplit) -> np.ndarray:
    return split.targets(np.arange(len(split)), len(documents.labels) + len(documents.unseen)).numpy()


def fit_tfidf(folder: Path, field: str) -> Fitted:
    documents = documents_of(folder, field)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features = words.fit_transform(texts(documents.train))
    known = len(documents.labels)
    model = OneVsRestClassifier(LogisticRegression(C=10, class_weight="balanced", max_iter=1000))
    model.fit(features, truth_of(documents, documents.train)[:, :known])
    val, test = (
        np.pad(model.predict_proba(words.transform(texts(split))), ((0, 0), (0, len(documents.unseen))))
        for split in (documents.val, documents.test)
    )
    return Fitted(
        [*documents.labels, *documents.unseen],
        val,
        truth_of(documents, documents.val),
        test,
        truth_of(documents, documents.test),
    )


def fit_encoder(folder: Path, field: str, seed: int, weight_decay: float) -> Fitted:
    """The quick preset's encoder, for as many epochs however many documents there are."""
    shape: dict[str, Any] = json.loads(json.dumps(CLASSIFY["quick"], default=lambda value: value.model_dump()))
    shape["data"] |= {"source": str(folder), "label_field": field}
    intervals = shape["steps"] / shape["log_interval"] * len(documents_of(folder, field).train) / DOCUMENTS
    steps = round(intervals) * shape["log_interval"]
    shape |= {"steps": steps, "eval_interval": steps, "checkpoint_interval": steps}
    trainer = Trainer(
        TrainConfig(
            task="classify",
            format="BF16",
            seed=seed,
            guards=(),
            **shape,
            optimizer={"kind": "adamw", "weight_decay": weight_decay},
        )
    )
    trainer.run()
    task: Any = trainer.task
    trainer.model.eval()
    with torch.no_grad():
        val, test = (task.predict(trainer.model, split) for split in (task.data.val, task.data.test))
    return Fitted(
        [*task.data.labels, *task.data.unseen],
        val[0].sigmoid().numpy(),
        val[1].numpy(),
        test[0].sigmoid().numpy(),
        test[1].numpy(),
    )


if __name__ == "__main__":
    main()
