"""Text for language modelling: two streams of tokens, training and validation, mapped into memory.

Documents are separated by a zero byte (by their own token in a byte-pair encoding), and the split is by document, so
that no validation text was trained on in another piece. Where the source has a validation split, it is kept; else
every n-th document is held out; a single document is cut near its end.

The bytes are written first, whatever the tokenizer: they are what `sha256` identifies for byte runs, what a
vocabulary is learned from, and the measure that makes runs with different tokenizers comparable.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from altgrad.training.config import DataConfig
from altgrad.training.data import tokenizers
from altgrad.training.data.cache import BUFFER, Entry, cached, file_sha256
from altgrad.training.data.records import Piece
from altgrad.training.data.sources import Source, open_source
from altgrad.training.data.tokenizers import Tokenizer, batched

SEPARATOR = b"\x00"
SPLITS = ("train", "val")
PIECES_AT_A_TIME = 64
PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Corpus:
    """Tokenized text: `train` and `val` are read-only arrays of ids; `sha256` identifies content, split and tokens.

    `text_sha256` identifies content and split, whatever the tokens. `bytes_per_token` is that of the validation text;
    `provenance` says where hub data came from.
    """

    source: str
    documents: int
    train: np.ndarray
    val: np.ndarray
    sha256: str
    text_sha256: str
    notes: tuple[str, ...] = ()
    tokenizer: Tokenizer = field(default_factory=tokenizers.ByteTokenizer)
    bytes_per_token: float = 1.0
    provenance: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        unit = "bytes" if self.tokenizer.name == "bytes" else f"{self.tokenizer.name} tokens"
        return (
            f"{self.source}: {self.documents} documents, {len(self.train):,} training and "
            f"{len(self.val):,} validation {unit}, sha256 {self.sha256[:12]}"
        )


def load_corpus(data: DataConfig) -> Corpus:
    """Reads the source, tokenized once for all processes.

    Raises ValueError that names the source and what is wrong with it: missing, no text in it, field missing, or too
    small to split.
    """
    return _load(data.source, data.revision, data.text_field, data.val_fraction, data.tokenizer)


@lru_cache(maxsize=4)
def _load(source: str, revision: str | None, text_field: str, val_fraction: float, tokenizer: str) -> Corpus:
    opened = open_source(DataConfig(source=source, revision=revision, text_field=text_field))
    every = max(2, round(1 / val_fraction))
    share = val_fraction if "val" not in opened.splits else None
    parts = {"corpus": dict(opened.key), "every": every, "share": share}
    plain = cached(parts, lambda folder: _write_bytes(folder, opened, every, val_fraction))
    notes = opened.notes
    if share is not None and any(note.startswith("test text is not read") for note in notes):
        notes += (f"no file is named dev or validation: {val_fraction:.0%} of the training documents are held out",)
    if tokenizer == "bytes":
        train, val = (_mapped(plain, split, np.dtype(np.uint8)) for split in SPLITS)
        digest = plain.meta["sha256"]
        return Corpus(source, plain.meta["documents"], train, val, digest, digest, notes, provenance=opened.provenance)
    parts = {"text": plain.meta["sha256"], "tokenizer": tokenizer}
    entry = cached(parts, lambda folder: _write_tokens(folder, plain, tokenizer))
    train, val = (_mapped(entry, split, np.dtype(entry.meta["dtype"])) for split in SPLITS)
    learned = tokenizers.stored(tokenizer, entry.meta["json"])
    bytes_in_val = plain.folder.joinpath("val.bin").stat().st_size
    return Corpus(
        source,
        plain.meta["documents"],
        train,
        val,
        entry.meta["sha256"],
        plain.meta["sha256"],
        notes,
        learned,
        bytes_in_val / len(val),
        opened.provenance,
    )


def _mapped(entry: Entry, split: str, dtype: np.dtype[Any]) -> np.ndarray:
    return np.memmap(entry.folder / f"{split}.bin", dtype=dtype, mode="r")


class _Writer:
    """Appends documents to a file, a separator behind each; remembers where the last one began."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = 0
        self.last = 0
        self._file: IO[bytes] = path.open("wb")
        self._begun = 0

    def write(self, piece: Piece) -> None:
        self._file.write(piece.text.encode("utf-8", "replace"))
        if not piece.ends:
            return
        self.documents += 1
        if self._file.tell() > self._begun:
            self.last = self._begun
            self._file.write(SEPARATOR)
        self._begun = self._file.tell()

    def close(self) -> int:
        """The length in bytes."""
        size = self._file.tell()
        self._file.close()
        return size


def _write_bytes(folder: Path, source: Source, every: int, val_fraction: float) -> dict[str, Any]:
    train, val = _Writer(folder / "train.bin"), _Writer(folder / "val.bin")
    has_val = "val" in source.splits
    index = 0
    for piece in source.splits["train"]():
        (val if not has_val and index % every == every - 1 else train).write(piece)
        index += piece.ends
    for piece in source.splits["val"]() if has_val else ():
        val.write(piece)
    train.close()
    val.close()
    if not has_val and not val.documents and train.documents:
        _cut(train, val.path, val_fraction)
    sizes = {}
    for writer, name in ((train, "training"), (val, "validation")):
        sizes[name] = writer.path.stat().st_size
        if sizes[name] < 2:
            raise ValueError(f"data {source.name!r}: the {name} split holds no text")
    digest = file_sha256([train.path, val.path], b"%d:" % sizes["training"])
    return {"documents": train.documents + val.documents, "sha256": digest}


def _cut(train: _Writer, val: Path, val_fraction: float) -> None:
    """Moves the last document to the validation text; where it is the only one, its end."""
    start = train.last
    with train.path.open("r+b") as file:
        if train.documents == 1:
            length = max(0, train.path.stat().st_size - len(SEPARATOR))
            start = int(length * (1 - val_fraction))
            file.seek(start)
            # Not inside a character: bytes of the form 10xxxxxx continue one.
            while start < length and file.read(1)[0] & 0xC0 == 0x80:
                start += 1
        file.seek(start)
        with val.open("wb") as held:
            shutil.copyfileobj(file, held, BUFFER)
        file.truncate(start)
        if train.documents == 1:
            file.seek(start)
            file.write(SEPARATOR)


def _write_tokens(folder: Path, plain: Entry, name: str) -> dict[str, Any]:
    tokenizer = tokenizers.learn(name, partial(_documents, plain.folder / "train.bin"))
    dtype = tokenizers.fits(tokenizer.vocabulary)
    lengths = [_encode(plain.folder / f"{split}.bin", folder / f"{split}.bin", tokenizer, dtype) for split in SPLITS]
    digest = file_sha256([folder / f"{split}.bin" for split in SPLITS], b"%s %d:" % (dtype.name.encode(), lengths[0]))
    return {"sha256": digest, "dtype": dtype.name, "json": tokenizer.json}


def _encode(text: Path, tokens: Path, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> int:
    """Writes the ids of a file's documents, 0 behind each; returns how many."""
    count = 0
    with tokens.open("wb") as file:
        for batch in batched(_pieces(text), PIECES_AT_A_TIME):
            for ids, ends in zip(tokenizer.encode([piece for piece, _ in batch]), [e for _, e in batch], strict=True):
                file.write(ids.astype(dtype).tobytes() + (np.zeros(1, dtype).tobytes() if ends else b""))
                count += len(ids) + ends
    return count


def _documents(text: Path) -> Iterator[bytes]:
    return (piece for piece, _ in _pieces(text))


def _pieces(text: Path) -> Iterator[tuple[bytes, bool]]:
    """Documents and whether they end there; long ones in pieces that begin at a space."""
    left = b""
    with text.open("rb") as file:
        while block := file.read(BUFFER):
            *whole, left = (left + block).split(SEPARATOR)
            for document in whole:
                yield from _short(document, ends=True)
            if len(left) > BUFFER:
                cut = left.rfind(b" ", 1)
                if cut > 0:
                    yield from _short(left[:cut], ends=False)
                    left = left[cut:]
    if left:
        yield from _short(left, ends=True)


def _short(document: bytes, *, ends: bool) -> Iterator[tuple[bytes, bool]]:
    start = 0
    while len(document) - start > PIECE_BYTES:
        cut = document.rfind(b" ", start + 1, start + PIECE_BYTES)
        if cut < 0:
            break
        yield document[start:cut], False
        start = cut
    yield document[start:], ends
