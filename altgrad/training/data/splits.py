"""Which files a source names, and which split each belongs to.

Where a folder or a glob holds splits of its own, by the names of files or sub-folders, they are kept, and other files
are left aside; where it holds none, everything is training text. Hidden files are never read, nor texts beside records:
a README.md in a folder of JSONL files is about the data. What is read and what is left aside is said in notes.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from altgrad.training.data.records import KINDS, PACKED, RECORDS, kind_of

NAMES = {"train": "train", "dev": "val", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLIT_NAME = re.compile(rf"({'|'.join(NAMES)})([-_]\d+(-of-\d+)?)?", re.IGNORECASE)
"""A split's name, or a shard of it: train, train_3, train-00000-of-00002."""
ABOUT_ARROW = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What `save_to_disk` leaves beside its tables."""


@dataclass(frozen=True)
class Files:
    """Files by split; `unread` stand beside split files, `unsplit` have a split's name that was not followed.

    `others` are of kinds that are not read, hidden, or texts beside records.
    """

    root: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    unread: tuple[Path, ...] = ()
    unsplit: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()

    def notes(self, *, reads_test: bool) -> tuple[str, ...]:
        """What a person should know about the choice of files."""
        found = []
        if self.unsplit:
            found.append(f"nothing beside {self._names(self.unsplit)} is named train: read as any other text")
        if self.test and not reads_test:
            found.append(f"test text is not read: {self._names(self.test)}")
        if self.unread:
            found.append(f"ignored beside the split files: {self._names(self.unread)}")
        if self.others:
            read = [*self.train, *self.val, *(self.test if reads_test else ())]
            found.append(f"read: {self._names(tuple(read))}; not read: {self._names(self.others)}")
        return tuple(found)

    def _names(self, paths: tuple[Path, ...], shown: int = 5) -> str:
        more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
        return ", ".join(str(_below(path, self.root)) for path in paths[:shown]) + more


def find_files(source: str, allowed: str) -> Files:
    """The files of a path, folder or glob by split; ValueError where there are none."""
    root = _root(source)
    files, others = _files(source, root, allowed)
    groups: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "unread": []}
    for path in files:
        groups[_split_name(path, root) or "unread"].append(path)
    if groups["train"] and (groups["val"] or groups["test"]):
        return Files(root, **{name: tuple(paths) for name, paths in groups.items()}, others=tuple(others))
    named = [*groups["val"], *groups["test"]] if len(files) > 1 else []
    return Files(root, tuple(files), unsplit=tuple(named), others=tuple(others))


def _files(source: str, root: Path, allowed: str) -> tuple[list[Path], list[Path]]:
    """The files that are read, and those beside them that are not."""
    if not source.strip():
        raise ValueError(f"data {source!r}: an empty name; allowed: {allowed}")
    path = Path(source)
    if path.is_file():
        if kind_of(path) is None:
            raise ValueError(f"data {source!r}: files of this kind are not read; allowed: {KINDS}")
        return [path], []
    is_folder = path.is_dir()
    found = path.rglob("*") if is_folder else map(Path, glob.glob(source, recursive=True))
    every = sorted(item for item in found if item.is_file())
    if not every and not is_folder:
        raise ValueError(f"data {source!r}: no such file, folder or glob; allowed: {allowed}")
    # What has no ending is no text for being there; a glob names it.
    read = [item for item in every if not _is_hidden(item, root) and (kind_of(item) or not (is_folder or item.suffix))]
    if any(_is_record(item) for item in read):
        read = [item for item in read if _is_record(item)]
    if not read:
        raise ValueError(f"data {source!r}: no file of a kind that is read; allowed: {KINDS}")
    taken = set(read)
    return read, [item for item in every if item not in taken and item.name not in ABOUT_ARROW]


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in _below(path, root).parts)


def _is_record(path: Path) -> bool:
    return (kind_of(path) or "").removesuffix(PACKED) in RECORDS


def _root(source: str) -> Path:
    """The folder below which names of folders count: the source itself, or what stands before a glob's marks."""
    parts = Path(source).parts
    fixed = next((index for index, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts))
    return Path(*parts[:fixed])


def _split_name(path: Path, root: Path) -> str | None:
    """A file belongs to the outermost folder below `root` that is named like a split, else to its own name."""
    matches = (SPLIT_NAME.fullmatch(part) for part in (*_below(path, root).parts[:-1], _stem(path)))
    return next((NAMES[found[1].lower()] for found in matches if found), None)


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() == PACKED else path.stem


def _below(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
