"""Which files a source names, and which split each belongs to.

Where a folder or a glob holds splits of its own, by the names of files or sub-folders, they are kept, and other files
are left aside; where it holds none, everything is training text. What was left aside is said in notes.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from altgrad.training.data.records import RECORDS, TEXTS

NAMES = {"train": "train", "dev": "val", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_NAME = re.compile(rf"({'|'.join(NAMES)})([-_]\d+(-of-\d+)?)?", re.IGNORECASE)
"""A split's name, or a shard of it: train, train_3, train-00000-of-00002."""


@dataclass(frozen=True)
class Files:
    """Files by split; `unread` stand beside split files, `unsplit` have a split's name that was not followed."""

    root: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    unread: tuple[Path, ...] = ()
    unsplit: tuple[Path, ...] = ()

    def notes(self, *, reads_test: bool) -> tuple[str, ...]:
        """What a person should know about the choice of files."""
        found = []
        if self.unsplit:
            found.append(f"nothing beside {self._names(self.unsplit)} is named train: read as any other text")
        if self.test and not reads_test:
            found.append(f"test text is not read: {self._names(self.test)}")
        if self.unread:
            found.append(f"ignored beside the split files: {self._names(self.unread)}")
        return tuple(found)

    def _names(self, paths: tuple[Path, ...], shown: int = 5) -> str:
        more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
        return ", ".join(str(_below(path, self.root)) for path in paths[:shown]) + more


def find_files(source: str, allowed: str) -> Files:
    """The files of a path, folder or glob by split; ValueError where there are none."""
    files = _files(source, allowed)
    root = _root(source)
    groups: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "unread": []}
    for path in files:
        groups[_split_name(path, root) or "unread"].append(path)
    if groups["train"] and (groups["val"] or groups["test"]):
        return Files(root, **{name: tuple(paths) for name, paths in groups.items()})
    named = [*groups["val"], *groups["test"]] if len(files) > 1 else []
    return Files(root, tuple(files), unsplit=tuple(named))


def _files(source: str, allowed: str) -> list[Path]:
    if not source.strip():
        raise ValueError(f"data {source!r}: an empty name; allowed: {allowed}")
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(
            item for item in path.rglob("*") if item.is_file() and item.suffix.lower() in RECORDS + TEXTS[:-1]
        )
        if not found:
            raise ValueError(f"data {source!r}: no text, JSONL, parquet or CSV file in this folder")
        return found
    found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    if not found:
        raise ValueError(f"data {source!r}: no such file, folder or glob; allowed: {allowed}")
    return found


def _root(source: str) -> Path:
    """The folder below which names of folders count: the source itself, or what stands before a glob's marks."""
    parts = Path(source).parts
    fixed = next((index for index, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    return Path(*parts[:fixed])


def _split_name(path: Path, root: Path) -> str | None:
    """A file belongs to the outermost folder below `root` that is named like a split, else to its own name."""
    matches = (SPLIT_NAME.fullmatch(part) for part in (*_below(path, root).parts[:-1], path.stem))
    return next((NAMES[found[1].lower()] for found in matches if found), None)


def _below(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
