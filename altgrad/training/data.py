"""Text in, batches out; equal seeds mean equal batches in equal order, whatever the format under test.

Tokens are bytes (a vocabulary of 256 needs no training and no download), documents are separated by a zero byte, and
the split is by document, so that no validation text was trained on in another piece. The default corpus is Python's
own documentation (`pydoc_data.topics`, about 465 KB of English), which is on every machine that runs Python.

A batch is a pure function of (seed, step): there is no position to save, and a resumed run reads on exactly.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from altgrad.training.config import DataConfig

VOCABULARY = 256
SEPARATOR = b"\x00"
RECORDS = (".jsonl", ".ndjson", ".parquet")
TEXTS = (".txt", ".md", ".rst", ".html", ".py", "")
SPLITS = {"train": "train", "dev": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Corpus:
    """Tokenized text: `train` and `val` are uint8 tensors; `sha256` identifies content and split."""

    source: str
    documents: int
    train: Tensor
    val: Tensor
    sha256: str
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        return (
            f"{self.source}: {self.documents} documents, {len(self.train):,} training and "
            f"{len(self.val):,} validation bytes, sha256 {self.sha256[:12]}"
        )


def load_corpus(data: DataConfig) -> Corpus:
    """Reads and tokenizes the source; cached per process.

    Raises ValueError that names the source and what is wrong with it: missing, no text in it, field missing, or too
    small to split.
    """
    return _load(data.source, data.text_field, data.val_fraction)


@lru_cache(maxsize=4)
def _load(source: str, text_field: str, val_fraction: float) -> Corpus:
    notes: list[str] = []
    if source == "pydoc":
        from pydoc_data.topics import topics

        train, val = _split([topics[name] for name in sorted(topics)], val_fraction)
    else:
        files = _files(source)
        splits = _split_files(files)
        if splits:
            ignored = [path.name for path in files if all(path not in group for group in splits.values())]
            if ignored:
                notes.append(f"ignored beside the split files: {', '.join(ignored)}")
            train = [text for path in splits["train"] for text in _documents(path, text_field)]
            val = [text for path in splits["val"] for text in _documents(path, text_field)]
        else:
            train, val = _split(
                [text for path in files for text in _documents(path, text_field)], val_fraction
            )
    train_bytes, val_bytes = _tokenize(train), _tokenize(val)
    for name, content in (("training", train_bytes), ("validation", val_bytes)):
        if len(content) < 2:
            raise ValueError(f"data {source!r}: the {name} split holds no text")
    digest = hashlib.sha256(b"%d:" % len(train_bytes) + train_bytes + val_bytes).hexdigest()
    return Corpus(
        source, len(train) + len(val), _tensor(train_bytes), _tensor(val_bytes), digest, tuple(notes)
    )


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(
            item for item in path.rglob("*") if item.is_file() and item.suffix.lower() in RECORDS + TEXTS[:-1]
        )
        if not found:
            raise ValueError(f"data {source!r}: no text, JSONL or parquet file in this folder")
        return found
    found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    if not found:
        raise ValueError(
            f"data {source!r}: no such file, folder or glob; allowed: 'pydoc', or a text, JSONL or "
            "parquet file, a folder or a glob"
        )
    return found


def _split_files(files: list[Path]) -> dict[str, list[Path]]:
    """Files named train, dev or validation (and test) are the splits where train and one of the others are there."""
    if len(files) < 2:
        return {}
    groups: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for path in files:
        if path.stem.lower() in SPLITS:
            groups[SPLITS[path.stem.lower()]].append(path)
    return groups if groups["train"] and groups["val"] else {}


def _documents(path: Path, text_field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _jsonl(path, text_field)
    elif suffix == ".parquet":
        yield from _parquet(path, text_field)
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data {path}:{number}: not a JSON record ({error.msg})") from None
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"data {path}:{number}: no text in field {text_field!r}; it has: {fields}")
            yield record[text_field]


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if text_field not in file.schema_arrow.names:
        raise ValueError(
            f"data {path}: no column {text_field!r}; it has: {', '.join(file.schema_arrow.names)}"
        )
    for batch in file.iter_batches(columns=[text_field]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _split(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Holds out evenly spaced documents; a single document is cut near its end."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - val_fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    every = max(2, round(1 / val_fraction))
    held = [index % every == every - 1 for index in range(len(documents))]
    if not any(held):
        held[-1] = True
    return (
        [text for text, out in zip(documents, held, strict=True) if not out],
        [text for text, out in zip(documents, held, strict=True) if out],
    )


def _tokenize(documents: list[str]) -> bytes:
    return b"".join(text.encode("utf-8", "replace") + SEPARATOR for text in documents if text)


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _windows(tokens: Tensor, starts: np.ndarray, block: int) -> tuple[Tensor, Tensor]:
    index = torch.from_numpy(starts)[:, None] + torch.arange(block + 1)
    window = tokens[index].long()
    return window[:, :-1], window[:, 1:]


def _positions(tokens: Tensor, block: int) -> int:
    positions = len(tokens) - block
    if positions < 1:
        raise ValueError(f"data: {len(tokens)} tokens in a split are too few for a block of {block}")
    return positions


def train_batch(corpus: Corpus, *, block: int, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, block] (int64) of one step, drawn with replacement by (seed, step)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(_positions(corpus.train, block), size=batch)
    return _windows(corpus.train, starts, block)


def val_batches(corpus: Corpus, *, block: int, batch: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches of evenly spaced validation windows, the same for every trial and seed."""
    starts = np.linspace(0, _positions(corpus.val, block) - 1, batch * count).astype(np.int64)
    for chunk in np.split(starts, count):
        yield _windows(corpus.val, chunk, block)
