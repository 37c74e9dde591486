"""Which part of the data a step sees: a pure function of (seed, step), so there is no position to save.

Language modelling draws windows with replacement. Classification goes through the documents in epochs, each in an
order of its own, and a batch may span two of them. The batch is that of the whole step: with `world` workers, worker
`rank` takes its contiguous share, so that together they see exactly what one worker would.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from altgrad.training.data.corpus import Corpus
from altgrad.training.data.documents import Documents, LabelledSplit

EPOCH_STREAM = 1 << 40
"""Keeps the keys of epochs apart from those of steps."""


def train_batch(
    corpus: Corpus, *, block: int, batch: int, seed: int, step: int, rank: int = 0, world: int = 1
) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch / world, block] (int64) of one step, drawn with replacement by (seed, step)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(_positions(corpus.train, block, corpus.source), size=batch)
    return _windows(corpus.train, _shard(starts, rank, world), block)


def val_batches(corpus: Corpus, *, block: int, batch: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches of evenly spaced validation windows, the same for every trial and seed."""
    starts = np.linspace(0, _positions(corpus.val, block, corpus.source) - 1, batch * count).astype(np.int64)
    for chunk in np.split(starts, count):
        yield _windows(corpus.val, chunk, block)


def document_batch(
    documents: Documents, *, block: int, batch: int, seed: int, step: int, rank: int = 0, world: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [batch / world, longest], lengths, and targets [batch / world, labels] of one step (1-based)."""
    rows = _shard(document_rows(len(documents.train), batch, seed, step), rank, world)
    return *documents.train.inputs(rows, block), documents.train.targets(rows, len(documents.labels))


def document_rows(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The documents of one step: places (step - 1) · batch on in the epochs' orders, one behind the other."""
    places = np.arange((step - 1) * batch, step * batch)
    return np.array([_order(count, seed, int(place // count))[place % count] for place in places])


def split_batches(
    split: LabelledSplit, *, block: int, batch: int, labels: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every document of a split once, in order: tokens, lengths, targets [_, labels]."""
    for start in range(0, len(split), batch):
        rows = np.arange(start, min(start + batch, len(split)))
        yield *split.inputs(rows, block), split.targets(rows, labels)


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed, EPOCH_STREAM + epoch]))
    return generator.permutation(count)


def _shard(items: np.ndarray, rank: int, world: int) -> np.ndarray:
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank={rank} is not allowed with world={world}: 0 to world - 1 is expected")
    if len(items) % world:
        raise ValueError(f"a batch of {len(items)} can't be shared evenly by {world} workers")
    share = len(items) // world
    return items[rank * share : (rank + 1) * share]


def _windows(tokens: np.ndarray, starts: np.ndarray, block: int) -> tuple[Tensor, Tensor]:
    window = torch.from_numpy(tokens[starts[:, None] + np.arange(block + 1)].astype(np.int64))
    return window[:, :-1], window[:, 1:]


def _positions(tokens: np.ndarray, block: int, source: str) -> int:
    positions = len(tokens) - block
    if positions < 1:
        raise ValueError(f"data {source!r}: {len(tokens)} tokens in a split are too few for a block of {block}")
    return positions
