"""The two tasks, behind one face: what the loop needs to know of the data, the model and the loss.

`lm` predicts the next token; its measure is the validation loss in nats per token, and bits per byte. `classify` gives
a document its labels, each a yes or no. Its loss is the binary cross-entropy, in nats per label, in which a label's
presence weighs (1 - p) / p, p being its share of the training documents, clamped: without it, rare labels are never
predicted. `val_loss` is that loss on validation documents. Scores are those of the test documents, under the threshold
that was best on the validation documents of the same evaluation; no decision of a run depends on test documents.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altgrad.training.classifier import build_classifier
from altgrad.training.config import TrainConfig
from altgrad.training.data import (
    Corpus,
    Documents,
    document_batch,
    load_corpus,
    load_documents,
    save_tokenizer,
    split_batches,
    train_batch,
    val_batches,
)
from altgrad.training.data.documents import LabelledSplit
from altgrad.training.metrics import (
    baseline_f1,
    best_threshold,
    bits_per_byte,
    classification_scores,
    evaluate,
    perplexity,
    token_loss,
)
from altgrad.training.model import build_model
from altgrad.training.workers import Share

EVALUATED_AT_A_TIME = 32
WHOLE = Share()


class Task(Protocol):
    """One task on its data; `throughput` names the signal of what is worked through in a second."""

    throughput: str

    @property
    def data(self) -> Corpus | Documents: ...

    def check(self) -> None:
        """ValueError where the data can't serve this model."""

    def build(self) -> nn.Module:
        """The model with the weights of the configuration's seed."""

    def loss(self, model: nn.Module, step: int, share: Share = WHOLE) -> Tensor:
        """The training loss of a share of a step's batch, 0-d, in nats."""

    def units(self) -> int:
        """What a step works through, in units of `throughput`."""

    def epoch(self) -> float:
        """Steps in which a run works through as much as the training data hold."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The signals of an evaluation, `val_loss` among them."""

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint's weights are tied to, by name."""


class DataChanged(ValueError):
    """The data at hand are not those that the trial's id stands for."""


def build_task(config: TrainConfig, text_sha256: str | None = None) -> Task:
    """The configuration's task with its data loaded; ValueError where the data are unusable.

    `text_sha256`: what the text must be; DataChanged where it is another.
    """
    task: Task = Classification(config) if config.task == "classify" else LanguageModelling(config)
    if text_sha256 not in (None, task.data.text_sha256):
        raise DataChanged(
            f"data {config.data.source}: not those of this trial's id: sha256 {task.data.text_sha256} here, "
            f"{text_sha256} in the sweep. Restore the files, or start the sweep again: it then has other trials"
        )
    return task


def save_vocabulary(task: Task, folder: Path) -> None:
    """Keeps with the run what its ids mean: tokenizer.json and labels.json, where there is such a thing."""
    save_tokenizer(task.data.tokenizer, folder)
    if isinstance(task.data, Documents):
        (folder / "labels.json").write_text(json.dumps(task.data.labels), encoding="utf-8")


def check_fingerprint(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """ValueError where a checkpoint was trained with other ids than the data at hand have."""
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the checkpoint's {name} is {saved.get(name)!r}, that of the data is {value!r}: "
                "continue with the data and tokenizer it was trained on, or start afresh"
            )


class LanguageModelling:
    """Next-token prediction on windows of a stream."""

    throughput: str = "tokens_per_s"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._corpus = load_corpus(config.data)

    @property
    def data(self) -> Corpus:
        return self._corpus

    def check(self) -> None:
        block = self.config.model.block
        train_batch(self.data, block=block, batch=1, seed=0, step=1)
        next(val_batches(self.data, block=block, batch=1, count=1))

    def build(self) -> nn.Module:
        return build_model(self.config.model, vocabulary=self.data.tokenizer.vocabulary, seed=self.config.seed)

    def loss(self, model: nn.Module, step: int, share: Share = WHOLE) -> Tensor:
        config = self.config
        inputs, targets = train_batch(
            self.data,
            block=config.model.block,
            batch=config.data.batch,
            seed=config.seed,
            step=step,
            rank=share.rank,
            world=share.world,
        )
        device = device_of(model)
        return token_loss(model, inputs.to(device), targets.to(device))

    def units(self) -> int:
        return self.config.data.batch * self.config.model.block

    def epoch(self) -> float:
        return len(self.data.train) / self.units()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        shape = self.config.data
        batches = val_batches(self.data, block=self.config.model.block, batch=shape.batch, count=shape.eval_batches)
        device = device_of(model)
        loss = evaluate(model, ((inputs.to(device), targets.to(device)) for inputs, targets in batches))
        bits = bits_per_byte(loss, bytes_per_token=self.data.bytes_per_token)
        return {"val_loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits}

    def fingerprint(self) -> dict[str, Any]:
        return {"vocabulary size": self.data.tokenizer.vocabulary, "tokenizer": self.data.tokenizer.name}


class Classification:
    """Multi-label classification of documents."""

    throughput: str = "samples_per_s"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        model = config.model
        self._documents = load_documents(config.data, encoder=model.encoder, block=model.block)
        share = self._documents.frequencies()
        self._pos_weight = ((1 - share) / share).clamp(max=config.data.max_pos_weight)

    @property
    def data(self) -> Documents:
        return self._documents

    def check(self) -> None:
        """Nothing: documents of any length serve."""

    def build(self) -> nn.Module:
        return build_classifier(
            self.config.model,
            vocabulary=self.data.tokenizer.vocabulary,
            labels=len(self.data.labels),
            seed=self.config.seed,
        )

    def loss(self, model: nn.Module, step: int, share: Share = WHOLE) -> Tensor:
        config, device = self.config, device_of(model)
        batch = document_batch(
            self.data,
            block=config.model.block,
            batch=config.data.batch,
            seed=config.seed,
            step=step,
            rank=share.rank,
            world=share.world,
        )
        tokens, lengths, targets = (part.to(device) for part in batch)
        if config.model.encoder is None:
            return self._loss(model(tokens, lengths), targets)
        # An encoder from elsewhere has dropout: its draws too are a function of (seed, step).
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((config.seed << 32) + step + (share.rank << 24))
            return self._loss(model(tokens, lengths), targets)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self._pos_weight.to(logits.device))

    def units(self) -> int:
        return self.config.data.batch

    def epoch(self) -> float:
        return len(self.data.train) / self.units()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        was_training = model.training
        model.eval()
        started = time.perf_counter()
        val_logits, val_targets = self.predict(model, self.data.val)
        logits, targets = self.predict(model, self.data.test)
        elapsed = time.perf_counter() - started
        model.train(was_training)
        known = len(self.data.labels)
        loss = float(self._loss(val_logits[:, :known], val_targets[:, :known]))
        val_chances, chances = (_chances(logits) for logits in (val_logits, logits))
        threshold, val_f1 = best_threshold(val_targets.numpy(), val_chances)
        scores = classification_scores(targets.numpy(), chances, threshold)
        trivial = baseline_f1(self.data.frequencies().numpy(), val_targets.numpy(), targets.numpy())
        return {
            "val_loss": loss,
            "val_f1_micro": val_f1,
            "threshold": threshold,
            **scores,
            "baseline_f1_micro": trivial,
            "eval_samples_per_s": (len(val_targets) + len(targets)) / elapsed,
        }

    def predict(self, model: nn.Module, split: LabelledSplit) -> tuple[Tensor, Tensor]:
        """Logits and targets of a whole split; labels that the model doesn't know have no chance."""
        known = len(self.data.labels)
        width = known + len(self.data.unseen)
        batches = split_batches(split, block=self.config.model.block, batch=EVALUATED_AT_A_TIME, labels=width)
        device = device_of(model)
        found = [(model(tokens.to(device), lengths.to(device)).cpu(), targets) for tokens, lengths, targets in batches]
        logits = torch.cat([logits for logits, _ in found])
        none = logits.new_full((len(logits), width - known), -torch.inf)
        return torch.cat([logits, none], dim=1), torch.cat([targets for _, targets in found])

    def fingerprint(self) -> dict[str, Any]:
        return {
            "vocabulary size": self.data.tokenizer.vocabulary,
            "tokenizer": self.data.tokenizer.name,
            "label vocabulary": list(self.data.labels),
        }


def _chances(logits: Tensor) -> np.ndarray:
    found: np.ndarray = logits.sigmoid().numpy()
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device
