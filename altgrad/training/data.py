"""Text in, batches out; equal seeds mean equal batches in equal order, whatever the format under test.

Tokens are bytes (a vocabulary of 256 needs no training and no download), documents are separated by a zero byte, and
the split is by document, so that no validation text was trained on in another piece. Where a folder or a glob holds
splits of its own, by the names of files or sub-folders, they are kept: test text is never read, and only where no
validation text came along are documents of the training text held out. What was left aside is said in `notes`. The
default corpus is Python's own documentation (`pydoc_data.topics`, about 465 KB of English), which is on every machine
that runs Python.

A batch is a pure function of (seed, step): there is no position to save, and a resumed run reads on exactly.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad.training.config import DataConfig

VOCABULARY = 256
SEPARATOR = b"\x00"
ALLOWED = "'pydoc', or a text, JSONL or parquet file, a folder or a glob"
RECORDS = (".jsonl", ".ndjson", ".parquet")
TEXTS = (".txt", ".md", ".rst", ".html", ".py", "")
SPLITS = {"train": "train", "dev": "val", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})([-_]\d+(-of-\d+)?)?", re.IGNORECASE)
"""A split's name, or a shard of it: train, train_3, train-00000-of-00002."""


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
    notes: tuple[str, ...] = ()
    if source == "pydoc":
        from pydoc_data.topics import topics

        train, val = _split([topics[name] for name in sorted(topics)], val_fraction)
    else:
        train, val, notes = _read(source, text_field, val_fraction)
    train_bytes, val_bytes = _tokenize(train), _tokenize(val)
    for name, content in (("training", train_bytes), ("validation", val_bytes)):
        if len(content) < 2:
            raise ValueError(f"data {source!r}: the {name} split holds no text")
    digest = hashlib.sha256(b"%d:" % len(train_bytes) + train_bytes + val_bytes).hexdigest()
    return Corpus(source, len(train) + len(val), _tensor(train_bytes), _tensor(val_bytes), digest, notes)


def _read(source: str, text_field: str, val_fraction: float) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Training documents, validation documents, and what a person should know about the choice."""
    files = _files(source)
    root = _root(source)
    groups = _split_files(files, root)
    train = [text for path in groups["train"] for text in _documents(path, text_field)]
    if groups["val"]:
        val = [text for path in groups["val"] for text in _documents(path, text_field)]
    else:
        train, val = _split(train, val_fraction)
    return train, val, _notes(groups, root, val_fraction)


def _files(source: str) -> list[Path]:
    if not source.strip():
        raise ValueError(f"data {source!r}: an empty name; allowed: {ALLOWED}")
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
            f"data {source!r}: no such file, folder or glob; allowed: {ALLOWED}"
        )
    return found


def _root(source: str) -> Path:
    """The folder below which names of folders count: the source itself, or what stands before a glob's marks."""
    parts = Path(source).parts
    fixed = next((index for index, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    return Path(*parts[:fixed])


def _split_files(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by split: 'train', 'val', 'test', 'unread', 'unsplit'; names count where train stands beside another.

    A file belongs to the outermost folder below `root` that is named like a split, else to its own name. Without
    splits everything is 'train'; 'unsplit' then lists the files whose names were not followed.
    """
    groups: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "unread": [], "unsplit": []}
    for path in files:
        groups[_split_name(path, root) or "unread"].append(path)
    if groups["train"] and (groups["val"] or groups["test"]):
        return groups
    named = [*groups["val"], *groups["test"]] if len(files) > 1 else []
    return {"train": files, "val": [], "test": [], "unread": [], "unsplit": named}


def _split_name(path: Path, root: Path) -> str | None:
    matches = (SPLIT_NAME.fullmatch(part) for part in (*_below(path, root).parts[:-1], path.stem))
    return next((SPLITS[found[1].lower()] for found in matches if found), None)


def _below(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else Path(path.name)


def _notes(groups: dict[str, list[Path]], root: Path, val_fraction: float) -> tuple[str, ...]:
    names = {group: _names([_below(path, root) for path in paths]) for group, paths in groups.items()}
    notes = []
    if groups["unsplit"]:
        notes.append(f"nothing beside {names['unsplit']} is named train: read as any other text")
    if groups["test"]:
        notes.append(f"test text is not read: {names['test']}")
        if not groups["val"]:
            notes.append(f"no file is named dev or validation: {val_fraction:.0%} of the training documents are "
                         "held out")
    if groups["unread"]:
        notes.append(f"ignored beside the split files: {names['unread']}")
    return tuple(notes)


def _names(paths: list[Path], shown: int = 5) -> str:
    more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
    return ", ".join(map(str, paths[:shown])) + more


def _documents(path: Path, text_field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            yield from _jsonl(path, text_field)
        elif suffix == ".parquet":
            yield from _parquet(path, text_field)
        else:
            yield path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"data {path}: can't be read ({error.strerror or error})") from None


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"data {path}:{number}: no UTF-8 text ({error.reason})") from None
            except ValueError as error:
                raise ValueError(f"data {path}:{number}: not a JSON record ({error})") from None
            yield _text_of(record, text_field, f"data {path}:{number}")


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record with field {text_field!r} is expected, found {_short(record)}")
    if text_field not in record:
        raise ValueError(f"{where}: no field {text_field!r}; it has: {', '.join(record)}")
    if not isinstance(record[text_field], str):
        raise ValueError(f"{where}: field {text_field!r} holds {_short(record[text_field])}, which is no text")
    text: str = record[text_field]
    return text


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(file.schema_arrow, path, text_field)
            for batch in file.iter_batches(columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"data {path}: not readable as parquet ({' '.join(str(error).split())})") from None


def _check_column(schema: Any, path: Path, text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        raise ValueError(f"data {path}: no column {text_field!r}; it has: {', '.join(schema.names)}")
    kind = schema.field(text_field).type
    held = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(held) or types.is_large_string(held)):
        raise ValueError(f"data {path}: column {text_field!r} holds {kind}, which is no text")


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


def _positions(tokens: Tensor, block: int, source: str) -> int:
    positions = len(tokens) - block
    if positions < 1:
        raise ValueError(f"data {source!r}: {len(tokens)} tokens in a split are too few for a block of {block}")
    return positions


def train_batch(corpus: Corpus, *, block: int, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, block] (int64) of one step, drawn with replacement by (seed, step)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(_positions(corpus.train, block, corpus.source), size=batch)
    return _windows(corpus.train, starts, block)


def val_batches(corpus: Corpus, *, block: int, batch: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches of evenly spaced validation windows, the same for every trial and seed."""
    starts = np.linspace(0, _positions(corpus.val, block, corpus.source) - 1, batch * count).astype(np.int64)
    for chunk in np.split(starts, count):
        yield _windows(corpus.val, chunk, block)
