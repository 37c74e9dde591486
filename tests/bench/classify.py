"""The document classifier beside TF-IDF with logistic regression and the commonest labels, on a folder of splits.

    python tests/bench/classify.py ../shared/data/eurlex_sample --label-field labels_l1

Two protocols. `train`: everything is fitted on training documents and the threshold tuned on validation documents, as
sweeps do. `train+dev`: the threshold of the first protocol is kept and everything is fitted once more, on training and
validation documents together; that is how a final model is made where documents are few. Test documents only score.
CPU seconds are those of fitting and scoring, in BF16 emulation on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier

from altgrad.sweep.presets import CLASSIFY
from altgrad.training import TrainConfig, Trainer
from altgrad.training.config import DataConfig
from altgrad.training.data import load_documents
from altgrad.training.data.documents import Documents, LabelledSplit
from altgrad.training.metrics import best_threshold

FITTED = ("train", "train+dev")


Scores = tuple[float, float]
"""F1 micro and macro."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--label-field", default="labels")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'method':34} {'fitted on':10} {'F1 micro':>9} {'F1 macro':>9} {'threshold':>10} {'CPU s':>6}")
    with tempfile.TemporaryDirectory() as scratch:
        both = joined(asked.folder, Path(scratch))
        bench_baseline(asked.folder, asked.label_field)
        bench_tfidf(asked.folder, both, asked.label_field)
        found = [bench_encoder(asked.folder, both, asked.label_field, seed, asked.weight_decay)
                 for seed in range(asked.seeds)]
    for fitted in FITTED:
        micro, macro = np.mean([scores[fitted] for scores in found], axis=0)
        print(f"{f'encoder, BF16, mean of {asked.seeds} seeds':34} {fitted:10} {micro:9.3f} {macro:9.3f}")


def joined(folder: Path, scratch: Path) -> Path:
    """A folder whose training documents are the training and validation documents of another."""
    train, dev, test = ((folder / f"{name}.jsonl").read_text() for name in ("train", "dev", "test"))
    for name, text in {"train": train + dev, "dev": dev, "test": test}.items():
        (scratch / f"{name}.jsonl").write_text(text)
    return scratch


def line(
    method: str, fitted: str, truth: np.ndarray, chances: np.ndarray, threshold: float, seconds: float
) -> Scores:
    """Prints a line of the table and returns its scores."""
    given = chances >= threshold
    micro, macro = (float(f1_score(truth, given, average=kind, zero_division=0)) for kind in ("micro", "macro"))
    print(f"{method:34} {fitted:10} {micro:9.3f} {macro:9.3f} {threshold:10.3f} {seconds:6.0f}", flush=True)
    return micro, macro


def documents_of(folder: Path, field: str) -> Documents:
    return load_documents(DataConfig(source=str(folder), label_field=field))


def texts(split: LabelledSplit) -> list[str]:
    tokens, lengths = split.inputs(np.arange(len(split)), 1 << 30)
    return [bytes(row[:n].tolist()).decode() for row, n in zip(tokens, lengths, strict=True)]


def truth_of(documents: Documents, split: LabelledSplit) -> np.ndarray:
    return split.targets(np.arange(len(split)), len(documents.labels) + len(documents.unseen)).numpy()


def bench_baseline(folder: Path, field: str) -> Scores:
    documents = documents_of(folder, field)
    val, test = truth_of(documents, documents.val), truth_of(documents, documents.test)
    shares = documents.frequencies().numpy()
    # As chances, every document alike: the threshold then chooses k, and test is scored as by any other method.
    chances = np.pad(shares, (0, len(documents.unseen)))
    threshold = best_threshold(val, np.tile(chances, (len(val), 1)))[0]
    return line("k commonest labels", "train", test, np.tile(chances, (len(test), 1)), threshold, 0)


def bench_tfidf(folder: Path, both: Path, field: str) -> dict[str, Scores]:
    """Scores by what it was fitted on."""
    threshold, found = None, {}
    for fitted, source in zip(FITTED, (folder, both), strict=True):
        documents = documents_of(source, field)
        started = time.process_time()
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        features = words.fit_transform(texts(documents.train))
        known = len(documents.labels)
        model = OneVsRestClassifier(LogisticRegression(C=10, class_weight="balanced", max_iter=1000))
        model.fit(features, truth_of(documents, documents.train)[:, :known])
        val, test = (chances_of(model.predict_proba(words.transform(texts(split))), documents)
                     for split in (documents.val, documents.test))
        threshold = threshold or best_threshold(truth_of(documents, documents.val), val)[0]
        found[fitted] = line("TF-IDF + logistic regression", fitted, truth_of(documents, documents.test), test,
                             threshold, time.process_time() - started)
    return found


def chances_of(known: np.ndarray, documents: Documents) -> np.ndarray:
    return np.pad(known, ((0, 0), (0, len(documents.unseen))))


def bench_encoder(folder: Path, both: Path, field: str, seed: int, weight_decay: float = 1.0) -> dict[str, Scores]:
    """Scores by what the quick preset's encoder was fitted on."""
    threshold, found = None, {}
    for fitted, source in zip(FITTED, (folder, both), strict=True):
        shape: dict[str, Any] = json.loads(json.dumps(CLASSIFY["quick"], default=lambda value: value.model_dump()))
        shape["data"] |= {"source": str(source), "label_field": field}
        # As many epochs on twice the documents.
        steps = shape["steps"] * (1 if fitted == FITTED[0] else 2)
        shape |= {"steps": steps, "eval_interval": steps, "checkpoint_interval": steps}
        started = time.process_time()
        trainer = Trainer(TrainConfig(task="classify", format="BF16", seed=seed, guards=(), **shape,
                                      optimizer={"kind": "adamw", "weight_decay": weight_decay}))
        trainer.run()
        task: Any = trainer.task
        threshold = threshold or trainer.rows[-1]["threshold"]
        trainer.model.eval()
        with torch.no_grad():
            logits, truth = task.predict(trainer.model, task.data.test)
        found[fitted] = line(f"encoder, BF16, seed {seed}", fitted, truth.numpy(), logits.sigmoid().numpy(),
                             threshold, time.process_time() - started)
    return found


if __name__ == "__main__":
    main()
