"""One file, its documents: JSONL, parquet, Arrow, CSV, or plain text, with labels where they are asked for.

JSONL, CSV and text may be packed by gzip; Arrow files are those that `Dataset.save_to_disk` leaves. Any other kind is
refused: a picture, a tokenizer's JSON or UTF-16 text would be trained on as noise.

A document comes in pieces, since a plain text file is one document of any size and must not be held whole. Records
are small and come in one piece. What can't be read is an error that names the file and, where there is one, the line:
a truncated parquet file, a last line cut short, bytes that are no UTF-8. Only in plain text files are such bytes
replaced, for those have no structure that could be damaged.

Labels are strings or whole numbers, in a list; in CSV a list as JSON or Python write it, or names between ; or |.
Where parquet was written by `datasets`, the names that a ClassLabel declares are in the file's metadata.
"""

from __future__ import annotations

import ast
import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

JSONL = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
RECORDS = (*JSONL, *TABLES, ".csv")
TEXTS = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".py", "")
PACKED = ".gz"
KINDS = "text (.txt, .md, .rst, .tex, .html, .py), JSONL (.jsonl, .ndjson), CSV, each also as .gz, parquet or Arrow"
OTHER_LABEL_FIELDS = ("eurovoc_concepts",)
"""What stands for `labels` in data that has no field of that name: EURLEX57K's own."""

CHUNK = 1 << 22
ROWS_AT_A_TIME = 256
Label = str | int


class Piece(NamedTuple):
    """Text of a document, and whether the document ends with it; `labels` is None where it has none recorded."""

    text: str
    ends: bool = True
    labels: tuple[Label, ...] | None = None
    where: str = ""


class Fields(NamedTuple):
    """Which fields of a record are read; `label` is None where labels are not asked for."""

    text: str = "text"
    label: str | None = None


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, '.gz' included; None for a kind that is not read."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if suffix == PACKED else suffix
    allowed = (*JSONL, ".csv", *TEXTS[:-1]) if suffix == PACKED else (*RECORDS, *TEXTS)
    return (inner + PACKED if suffix == PACKED else inner) if inner in allowed else None


def pieces(path: Path, fields: Fields) -> Iterator[Piece]:
    """The documents of one file; ValueError names the file, the line and what is wrong with it."""
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"data {path}: files of this kind are not read; allowed: {KINDS}")
    suffix = kind.removesuffix(PACKED)
    try:
        if suffix in JSONL:
            yield from _checked(_jsonl(path), path, fields)
        elif suffix == ".csv":
            yield from _checked(_csv(path), path, fields)
        elif suffix in TABLES:
            yield from _table(path, fields)
        elif fields.label is not None:
            raise ValueError(f"data {path}: plain text has no labels; JSONL, parquet or CSV records are expected")
        else:
            yield from _plain(path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data {path}: can't be read ({getattr(error, 'strerror', None) or error})") from None


def _opened(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked."""
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == PACKED else path.open("rb")


def declared_labels(path: Path, field: str) -> tuple[str, ...] | None:
    """The names that a ClassLabel declares in tables written by `datasets`; None where nothing is declared."""
    if kind_of(path) not in TABLES:
        return None
    with _batches(path) as (schema, _):
        metadata = schema.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    feature = features.get(present_label_field(field, features) or "", {})
    inner = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
    names = inner.get("names") if isinstance(inner, dict) else None
    return None if names is None else tuple(names)


def present_label_field(field: str, names: Any) -> str | None:
    """The field that holds the labels: as asked, or what stands for `labels` elsewhere; None where neither is."""
    allowed = (field, *(OTHER_LABEL_FIELDS if field == "labels" else ()))
    return next((name for name in allowed if name in names), None)


def _plain(path: Path) -> Iterator[Piece]:
    with _opened(path) as file:
        begin = file.read(CHUNK)
        if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in begin:
            raise ValueError(f"data {path}: no UTF-8 text (UTF-16, or no text at all); UTF-8 is expected")
        decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
        while begin:
            yield Piece(newlines.decode(begin), ends=False)
            begin = file.read(CHUNK)
        yield Piece(newlines.decode(b"", final=True), ends=False)
    yield Piece("")


def _checked(records: Iterator[tuple[Any, str]], path: Path, fields: Fields) -> Iterator[Piece]:
    """Records as pieces; ValueError where no record of the file has the field of the labels."""
    seen: dict[str, None] = {}
    is_labelled = False
    for record, where in records:
        text = _text_of(record, fields.text, where)
        labels = None
        if fields.label is not None:
            name = present_label_field(fields.label, record)
            is_labelled |= name is not None
            seen |= dict.fromkeys(record)
            labels = None if name is None else labels_of(record[name], name, where)
        yield Piece(text, True, labels, where)
    if fields.label is not None and seen and not is_labelled:
        raise ValueError(
            f"data {path}: no field {fields.label!r} for labels; it has: {', '.join(seen)}"
            f"{_nearest(fields.label, seen)}"
        )


def _jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"data {path}:{number}"
            try:
                yield json.loads(line), where
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: no UTF-8 text ({error.reason})") from None
            except ValueError as error:
                raise ValueError(f"{where}: not a JSON record ({error})") from None


def _csv(path: Path) -> Iterator[tuple[Any, str]]:
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            try:
                record = next(reader, None)
            except UnicodeDecodeError as error:
                raise ValueError(f"data {path}: no UTF-8 text behind line {reader.line_num} ({error.reason})") from None
            except csv.Error as error:
                raise ValueError(f"data {path}:{reader.line_num}: not a CSV record ({error})") from None
            if record is None:
                return
            where = f"data {path}:{reader.line_num}"
            if None in record or None in record.values():
                raise ValueError(f"{where}: not a CSV record (its columns are not those of the first line)")
            yield record, where


def _text_of(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record with field {field!r} is expected, found {_short(record)}")
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}; it has: {', '.join(record)}{_nearest(field, record)}")
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} holds {_short(text)}, which is no text")
    return text or ""


def labels_of(value: Any, field: str, where: str) -> tuple[Label, ...] | None:
    """Labels of a record's field; None where it holds nothing. ValueError for anything but text or whole numbers."""
    if value is None:
        return None
    found = _listed(value) if isinstance(value, str) else value
    if isinstance(found, int) and not isinstance(found, bool):
        found = [found]
    if not isinstance(found, list | tuple) or not all(type(item) in (str, int) for item in found):
        raise ValueError(f"{where}: field {field!r} holds {_short(value)}; names or whole numbers are expected")
    return tuple(dict.fromkeys(found))


def _listed(text: str) -> Any:
    """The labels that a text stands for, as CSV has to write them; empty text stands for no labels."""
    plain = text.strip()
    if plain.startswith("["):
        try:
            return ast.literal_eval(plain)
        except (SyntaxError, ValueError):
            return None
    return [item.strip() for item in plain.replace("|", ";").split(";") if item.strip()]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _nearest(name: str, allowed: Any) -> str:
    close = get_close_matches(name, [str(item) for item in allowed], n=1, cutoff=0.4)
    return f"; nearest: {close[0]}" if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _table(path: Path, fields: Fields) -> Iterator[Piece]:
    with _batches(path) as (schema, batches):
        names = schema.names
        _check_text_column(schema, path, fields.text)
        label = None if fields.label is None else present_label_field(fields.label, names)
        if fields.label is not None and label is None:
            raise ValueError(
                f"data {path}: no column {fields.label!r} for labels; it has: {', '.join(names)}"
                f"{_nearest(fields.label, names)}"
            )
        columns = [fields.text] if label is None else [fields.text, label]
        row = 0
        for batch in batches(columns):
            for record in batch.to_pylist():
                where = f"data {path}: row {row}"
                labels = None if label is None else labels_of(record[label], label, where)
                yield Piece(record[fields.text] or "", True, labels, where)
                row += 1


@contextmanager
def _batches(path: Path) -> Iterator[tuple[Any, Callable[[list[str]], Iterator[Any]]]]:
    """The schema of a table and what reads the named columns of it, some rows at a time."""
    import pyarrow
    import pyarrow.parquet

    kind = "parquet" if path.suffix.lower() == ".parquet" else "Arrow"
    try:
        if kind == "parquet":
            with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
                yield file.schema_arrow, lambda columns: file.iter_batches(ROWS_AT_A_TIME, columns=columns)
        else:
            with pyarrow.memory_map(str(path)) as source:
                reader = pyarrow.ipc.open_stream(source)
                yield reader.schema, lambda columns: (batch.select(columns) for batch in reader)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"data {path}: not readable as {kind} ({_one_line(error)})") from None


def _check_text_column(schema: Any, path: Path, field: str) -> None:
    from pyarrow import types

    if field not in schema.names:
        raise ValueError(
            f"data {path}: no column {field!r}; it has: {', '.join(schema.names)}{_nearest(field, schema.names)}"
        )
    kind = schema.field(field).type
    held = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(held) or types.is_large_string(held)):
        raise ValueError(f"data {path}: column {field!r} holds {kind}, which is no text")
