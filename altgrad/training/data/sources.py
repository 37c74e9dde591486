"""From the name of a source to its documents by split: local files, the hub, Python's own documentation, made-up text.

A `Source` reads nothing until one of its splits is asked for, and carries a key that says what it would read, by
content: equal keys mean equal documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from altgrad.training.config import DataConfig
from altgrad.training.data import hub, synthetic
from altgrad.training.data.cache import file_sha256
from altgrad.training.data.records import Fields, Piece, declared_labels, kind_of, pieces
from altgrad.training.data.splits import find_files

NAMED = ("pydoc", "synthetic", *hub.REPOSITORIES)
ALLOWED = f"{', '.join(map(repr, NAMED))}, or a text, JSONL, parquet or CSV file, a folder or a glob"
Reader = Callable[[], Iterator[Piece]]


@dataclass(frozen=True)
class Source:
    """Documents by split ('train', and 'val' and 'test' where the source has them).

    `key` determines the documents (JSON values), `label_names` is a declared vocabulary or None, `notes` are for a
    person, `provenance` goes into the record.
    """

    name: str
    key: Mapping[str, Any]
    splits: Mapping[str, Reader]
    label_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)


def open_source(data: DataConfig, *, labelled: bool = False) -> Source:
    """The source that a configuration names, with its labels where `labelled`; ValueError where it has none."""
    fields = Fields(data.text_field, data.label_field if labelled else None)
    if data.source in hub.REPOSITORIES:
        return _hub(data.source, data.revision, fields)
    if data.source == "synthetic":
        splits = {split: partial(synthetic.documents, split) for split in synthetic.SIZES}
        return Source("synthetic", {"synthetic": synthetic.VERSION}, splits, synthetic.LABELS if labelled else None)
    if data.source == "pydoc":
        if labelled:
            raise ValueError(f"data 'pydoc' has no labels; for classification name {_with_labels()}")
        return _pydoc()
    return _local(data.source, fields)


def _with_labels() -> str:
    names = ", ".join(repr(name) for name in NAMED if name != "pydoc")
    return f"{names}, or a JSONL, parquet or CSV file or folder whose records have labels"


def _pydoc() -> Source:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Source("pydoc", {"pydoc": digest}, {"train": lambda: (Piece(text) for text in texts)})


def _hub(name: str, revision: str | None, fields: Fields) -> Source:
    found = hub.load_hub(name, revision)
    names = None if fields.label is None else found.declared_labels(fields.label)
    repository = hub.REPOSITORIES[name]
    provenance = {
        "repository": repository.path,
        "config": repository.config or repository.data_dir or "default",
        "revision": found.revision,
    }
    readers = {split: hub.reader(found, split, fields) for split in found.splits}
    key = {"hub": {**provenance, **found.fingerprint}, "fields": list(fields)}
    return Source(name, key, readers, names, provenance=provenance)


def _local(source: str, fields: Fields) -> Source:
    is_labelled = fields.label is not None
    files = find_files(source, ALLOWED)
    groups = {"train": files.train, "val": files.val, "test": files.test if is_labelled else ()}
    groups = {split: paths for split, paths in groups.items() if paths}
    try:
        content = {split: [[kind_of(path), file_sha256([path])] for path in paths] for split, paths in groups.items()}
    except OSError as error:
        raise ValueError(f"data {error.filename}: can't be read ({error.strerror})") from None
    readers = {split: partial(_read_all, paths, fields) for split, paths in groups.items()}
    names = None
    if fields.label is not None:
        names = next((found for path in files.train if (found := declared_labels(path, fields.label))), None)
    return Source(
        source, {"files": content, "fields": list(fields)}, readers, names, files.notes(reads_test=is_labelled)
    )


def _read_all(paths: tuple[Path, ...], fields: Fields) -> Iterator[Piece]:
    for path in paths:
        yield from pieces(path, fields)
