"""Labelled documents for classification: tokens and labels of three splits, mapped into memory.

The label vocabulary is the declared one (a configuration's `label_names`, a ClassLabel's names), and then a label
outside it is an error; else it is the labels of the training documents, in order of their names. Labels that only
validation or test documents have can't be predicted, but they are not forgotten either: they are `unseen`, and the
scores count them as missed.

Splits that the source lacks are held out of the training documents, every n-th. Empty texts, and records without
labels (null or absent; an empty list is a document that has none), are left out and counted in `notes`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad.training.config import DataConfig
from altgrad.training.data import tokenizers
from altgrad.training.data.cache import Entry, cached, file_sha256
from altgrad.training.data.records import Label, Piece
from altgrad.training.data.sources import Source, open_source
from altgrad.training.data.tokenizers import Tokenizer, batched

SPLITS = ("train", "val", "test")
TITLES = {"train": "training", "val": "validation", "test": "test"}
ENCODED_AT_A_TIME = 256
KINDS = ("text", "text_ends.npy", "labels.npy", "label_ends.npy")


@dataclass(frozen=True)
class LabelledSplit:
    """Documents i as tokens[ends[i - 1]:ends[i]] and label ids, likewise."""

    tokens: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    label_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def inputs(self, rows: np.ndarray, block: int) -> tuple[Tensor, Tensor]:
        """Token ids [rows, longest] (int64, 0 behind the end) of the documents' first `block` tokens, and lengths."""
        found = [self.tokens[_start(self.ends, row) : self.ends[row]][:block] for row in rows]
        lengths = np.array([max(1, len(ids)) for ids in found])
        padded = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
        for line, ids in zip(padded, found, strict=True):
            line[: len(ids)] = ids
        return torch.from_numpy(padded), torch.from_numpy(lengths)

    def targets(self, rows: np.ndarray, labels: int) -> Tensor:
        """1 where a document has a label, else 0: float32 [rows, labels]; ids from `labels` on are left out."""
        found = torch.zeros(len(rows), labels, dtype=torch.float32)
        for line, row in zip(found, rows, strict=True):
            ids = np.asarray(self.labels[_start(self.label_ends, row) : self.label_ends[row]])
            line[torch.from_numpy(ids[ids < labels].astype(np.int64))] = 1
        return found


def _start(ends: np.ndarray, row: int) -> int:
    return int(ends[row - 1]) if row else 0


@dataclass(frozen=True)
class Documents:
    """Three labelled splits; `labels` is the vocabulary, `unseen` are labels outside it, with ids behind it.

    `sha256` identifies content, splits and tokens, `text_sha256` all but the tokens.
    """

    source: str
    train: LabelledSplit
    val: LabelledSplit
    test: LabelledSplit
    labels: tuple[str, ...]
    unseen: tuple[str, ...]
    tokenizer: Tokenizer
    sha256: str
    text_sha256: str
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        return (
            f"{self.source}: {len(self.train)} training, {len(self.val)} validation and {len(self.test)} test "
            f"documents, {len(self.labels)} labels, {self.tokenizer.name} tokens, sha256 {self.sha256[:12]}"
        )

    def frequencies(self) -> Tensor:
        """The share of the training documents that have each label, [labels]."""
        counts = np.bincount(np.asarray(self.train.labels), minlength=len(self.labels))
        return torch.from_numpy(counts[: len(self.labels)]).float() / len(self.train)


def load_documents(data: DataConfig, *, encoder: str | None = None, block: int = 0) -> Documents:
    """The labelled documents of a source, tokenized once for all processes; with an encoder's own tokens, if named.

    Raises ValueError that names what is wrong: no labels, wrong field, a label outside the vocabulary, a split
    without documents.
    """
    return _load(data.model_copy(update={"batch": 1, "eval_batches": 1}), encoder, block if encoder else 0)


@lru_cache(maxsize=4)
def _load(data: DataConfig, encoder: str | None, block: int) -> Documents:
    opened = open_source(data, labelled=True)
    declared = data.label_names or opened.label_names
    every = max(3, round(1 / data.val_fraction))
    parts = {"documents": dict(opened.key), "every": every, "declared": declared}
    texts = cached(parts, lambda folder: _write_texts(folder, opened, every, declared))
    name = encoder or data.tokenizer
    parts = {"texts": texts.meta["sha256"], "labels": texts.meta["labels"], "tokenizer": name, "block": block}
    entry = cached(parts, lambda folder: _write_tokens(folder, texts, name, encoder, block))
    own: Tokenizer = tokenizers.stored(name, entry.meta["json"])
    if encoder:
        own = tokenizers.EncoderTokenizer(encoder, block)
    train, val, test = (_mapped(texts, entry, split) for split in SPLITS)
    return Documents(
        data.source,
        train,
        val,
        test,
        tuple(texts.meta["labels"]),
        tuple(texts.meta["unseen"]),
        own,
        entry.meta["sha256"],
        texts.meta["sha256"],
        (*opened.notes, *texts.meta["notes"]),
        opened.provenance,
    )


def _mapped(texts: Entry, tokens: Entry, split: str) -> LabelledSplit:
    return LabelledSplit(
        np.memmap(tokens.folder / f"{split}.bin", dtype=tokens.meta["dtype"], mode="r"),
        np.load(tokens.folder / f"{split}.ends.npy", mmap_mode="r"),
        _loaded(texts.folder / f"{split}.labels.npy"),
        np.load(texts.folder / f"{split}.label_ends.npy", mmap_mode="r"),
    )


def _loaded(path: Path) -> np.ndarray:
    """An array that may be empty, which can't be mapped."""
    found: np.ndarray = np.load(path)
    return found


class _Writer:
    """Documents of one split: text to a file, labels in memory until the vocabulary is known."""

    def __init__(self, folder: Path, split: str) -> None:
        self.split = split
        self.ends, self.label_ends = array("q"), array("q")
        self.labels: list[Label] = []
        self._file = (folder / f"{split}.text").open("wb")

    def write(self, piece: Piece) -> None:
        self._file.write(piece.text.encode("utf-8", "replace"))
        self.labels += piece.labels or ()
        self.ends.append(self._file.tell())
        self.label_ends.append(len(self.labels))

    def close(self, folder: Path, ids: Mapping[Label, int]) -> None:
        self._file.close()
        np.save(folder / f"{self.split}.text_ends.npy", np.array(self.ends, dtype=np.int64))
        np.save(folder / f"{self.split}.label_ends.npy", np.array(self.label_ends, dtype=np.int64))
        np.save(folder / f"{self.split}.labels.npy", np.array([ids[name] for name in self.labels], dtype=np.int32))


def _write_texts(folder: Path, source: Source, every: int, declared: tuple[str, ...] | None) -> dict[str, Any]:
    writers = {split: _Writer(folder, split) for split in SPLITS}
    left_out = {"text": 0, "labels": 0}
    known = None if declared is None else frozenset(declared)
    held = {every - 1 - place: split for place, split in enumerate(SPLITS[1:]) if split not in source.splits}
    for split, read in source.splits.items():
        kept = 0
        for piece in read():
            lacks = "labels" if piece.labels is None else "text" if not piece.text.strip() else None
            if lacks:
                left_out[lacks] += 1
                continue
            if declared is not None and known is not None:
                _check_labels(piece, declared, known)
            writers[held.get(kept % every, split) if split == "train" else split].write(piece)
            kept += 1
    for split, writer in writers.items():
        if not writer.ends:
            raise ValueError(f"data {source.name!r}: the {TITLES[split]} split holds no document with text and labels")
    labels, unseen, ids = _vocabulary(writers, declared)
    if not labels:
        raise ValueError(f"data {source.name!r}: no training document has a label")
    for writer in writers.values():
        writer.close(folder, ids)
    names = [f"{split}.{kind}" for split in SPLITS for kind in KINDS]
    start = json.dumps([labels, unseen]).encode()
    return {
        "labels": labels,
        "unseen": unseen,
        "notes": _notes(held, left_out, unseen, every),
        "sha256": file_sha256([folder / name for name in names], start),
    }


def _check_labels(piece: Piece, declared: tuple[str, ...], known: frozenset[str]) -> None:
    for label in piece.labels or ():
        if isinstance(label, int) and not 0 <= label < len(declared):
            raise ValueError(f"{piece.where}: label {label} is outside the vocabulary of {len(declared)} labels")
        if isinstance(label, str) and label not in known:
            close = get_close_matches(label, declared, n=1, cutoff=0.4)
            shown = ", ".join(declared[:5]) + (f" and {len(declared) - 5} more" if len(declared) > 5 else "")
            raise ValueError(
                f"{piece.where}: label {label!r} is outside the vocabulary ({shown})"
                f"{f'; nearest: {close[0]}' if close else ''}"
            )


def _vocabulary(
    writers: Mapping[str, _Writer], declared: tuple[str, ...] | None
) -> tuple[list[str], list[str], dict[Label, int]]:
    """The labels in order, the unseen ones, and the id of every label as it is written in the data."""
    if declared is not None:
        by_name = {name: index for index, name in enumerate(declared)}
        return list(declared), [], by_name | {index: index for index in range(len(declared))}
    train = _ordered(set(writers["train"].labels))
    others = _ordered({name for split in SPLITS[1:] for name in writers[split].labels} - set(train))
    ids = {name: index for index, name in enumerate([*train, *others])}
    return [str(name) for name in train], [str(name) for name in others], ids


def _ordered(labels: set[Label]) -> list[Label]:
    return sorted(labels, key=lambda name: (isinstance(name, str), name))


def _notes(held: Mapping[int, str], left_out: Mapping[str, int], unseen: list[str], every: int) -> list[str]:
    notes = [
        f"there is no {TITLES[split]} split: every {every}th training document is held out for it"
        for split in held.values()
    ]
    notes += [f"left out for want of {what}: {count} documents" for what, count in left_out.items() if count]
    if unseen:
        shown = ", ".join(unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
        notes.append(f"labels that no training document has count as missed: {shown}")
    return notes


def _write_tokens(folder: Path, texts: Entry, name: str, encoder: str | None, block: int) -> dict[str, Any]:
    tokenizer: Tokenizer
    if encoder:
        tokenizer = tokenizers.EncoderTokenizer(encoder, block)
    else:
        tokenizer = tokenizers.learn(name, partial(_read, texts.folder, "train"))
    dtype = tokenizers.fits(tokenizer.vocabulary)
    for split in SPLITS:
        _encode(texts.folder, folder, split, tokenizer, dtype)
    files = [folder / f"{split}.{kind}" for split in SPLITS for kind in ("bin", "ends.npy")]
    start = json.dumps([texts.meta["sha256"], dtype.name]).encode()
    return {"sha256": file_sha256(files, start), "dtype": dtype.name, "json": tokenizer.json}


def _encode(texts: Path, folder: Path, split: str, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
    ends = array("q")
    count = 0
    with (folder / f"{split}.bin").open("wb") as file:
        for batch in batched(_read(texts, split), ENCODED_AT_A_TIME):
            for ids in tokenizer.encode(batch):
                # A text of which nothing is in the vocabulary is one token long: 0.
                kept = ids if len(ids) else np.zeros(1)
                file.write(kept.astype(dtype).tobytes())
                count += len(kept)
                ends.append(count)
    np.save(folder / f"{split}.ends.npy", np.array(ends, dtype=np.int64))


def _read(folder: Path, split: str) -> Iterator[bytes]:
    start = 0
    with (folder / f"{split}.text").open("rb") as file:
        for end in np.load(folder / f"{split}.text_ends.npy").tolist():
            yield file.read(end - start)
            start = end
