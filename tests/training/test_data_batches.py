"""The batch is a function of (seed, step): equal in every format, exact after a resume, shared without loss."""

import itertools

import numpy as np
import pytest
import torch

from altgrad.training import TrainConfig, Trainer
from altgrad.training.config import DataConfig
from altgrad.training.data import document_batch, document_rows, load_corpus, load_documents, train_batch

CLASSIFY = {
    "task": "classify",
    "model": {"layers": 1, "heads": 2, "width": 16, "block": 32},
    "data": {"source": "synthetic", "tokenizer": "words", "batch": 8},
    "log_interval": 5,
    "eval_interval": 20,
    "checkpoint_interval": 10,
    "steps": 20,
}


def seen(task: str):
    """A function (batch, step, rank, world) to the tensors that a worker sees."""
    if task == "lm":
        corpus = load_corpus(DataConfig(source="synthetic"))
        return lambda batch, step, rank=0, world=1: train_batch(
            corpus, block=16, batch=batch, seed=3, step=step, rank=rank, world=world
        )
    documents = load_documents(DataConfig(source="synthetic"))
    return lambda batch, step, rank=0, world=1: document_batch(
        documents, block=16, batch=batch, seed=3, step=step, rank=rank, world=world
    )


@pytest.mark.parametrize("task", ["lm", "classify"])
@pytest.mark.parametrize("world", [2, 4])
def test_workers_together_see_what_one_with_the_whole_batch_sees(task: str, world: int):
    batches = seen(task)
    for step in (1, 7, 31):
        whole = batches(8, step)
        parts = [batches(8, step, rank, world) for rank in range(world)]
        for together, own in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(together, torch.cat(own))
    assert not torch.equal(batches(8, 1, 0, 2)[0], batches(8, 1, 1, 2)[0])


@pytest.mark.parametrize(("batch", "rank", "world", "message"), [(8, 0, 3, "shared evenly by 3"), (8, 2, 2, "rank=2")])
def test_shares_that_do_not_work_out_are_refused(batch, rank, world, message):
    with pytest.raises(ValueError, match=message):
        seen("lm")(batch, 1, rank, world)


def test_an_epoch_holds_every_document_once_in_an_order_of_its_own():
    rows = np.concatenate([document_rows(10, 4, seed=1, step=step) for step in range(1, 11)])
    epochs = rows.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    other = np.concatenate([document_rows(10, 4, seed=2, step=step) for step in range(1, 11)])
    assert rows.tolist() != other.tolist()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch):
    """The rows of every training batch that any trainer draws."""
    from altgrad.training import tasks

    drawn: list[list[int]] = []

    def watch(documents, **kwargs):
        drawn.append(document_rows(len(documents.train), kwargs["batch"], kwargs["seed"], kwargs["step"]).tolist())
        return document_batch(documents, **kwargs)

    monkeypatch.setattr(tasks, "document_batch", watch)
    return drawn


def test_every_format_sees_the_same_batches_and_a_resumed_run_the_ones_it_would_have_seen(watched, tmp_path):
    orders = {}
    for name in ("FP32", "BF16", "E5M2", "E3M4", "E7M0"):
        watched.clear()
        Trainer(TrainConfig(**CLASSIFY, format=name, guards=())).run()
        orders[name] = list(watched)
    assert len({str(order) for order in orders.values()}) == 1 and len(orders["BF16"]) == 20
    watched.clear()
    first = Trainer(TrainConfig(**CLASSIFY, format="BF16"), folder=tmp_path / "t").intervals()
    list(itertools.islice(first, 3))
    first.close()
    watched.clear()
    resumed = Trainer(TrainConfig(**CLASSIFY, format="BF16"), folder=tmp_path / "t")
    resumed.run()
    assert resumed.resumed_from == 10 and watched == orders["BF16"][10:]
