"""Text is tokenized once: a cache of plain files, keyed by content, mapped into memory by every trial of a node.

An entry is a folder named by the hash of what it was made from and how, so that changed data or another tokenizer is
another entry and nothing is ever stale. It is built beside its place and moved there by one rename, whole and flushed,
so a reader never sees a part. Of processes that want the same entry at once one builds, and the others wait for its
lock, which the operating system drops if the builder dies; what a dead builder left is cleared by the next.

The place is $ALTGRAD_CACHE, else $XDG_CACHE_HOME/altgrad, else ~/.cache/altgrad. Entries may be deleted at any time
that no trial runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

logger = logging.getLogger(__name__)

LAYOUT = 1
META = "meta.json"
BUFFER = 1 << 20
SAID_AFTER_SECONDS = 5.0
PAUSE_SECONDS = 0.1


class CacheError(ValueError):
    """The cache can't be written; the message begins with the variable that says where it is."""


class Entry(NamedTuple):
    """A finished entry: where its files are, and what its builder said of them."""

    folder: Path
    meta: dict[str, Any]


def cache_folder() -> Path:
    """Where entries are kept; see the module."""
    return _named_folder()[1]


def _named_folder() -> tuple[str, Path]:
    """The variable that says where entries are kept, and where."""
    if own := os.environ.get("ALTGRAD_CACHE"):
        return "ALTGRAD_CACHE", Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return "XDG_CACHE_HOME", Path(base, "altgrad")
    try:
        return "HOME", Path.home() / ".cache" / "altgrad"
    except RuntimeError as error:
        raise CacheError(f"HOME: {error}; the environment variable ALTGRAD_CACHE names a place for the cache") from None


def cached(parts: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> Entry:
    """The entry for `parts` (JSON values that determine the content), built by `build(folder)` where it is missing.

    `build` writes its files into the folder and returns what is to be remembered, as JSON values. CacheError where it
    can't be written.
    """
    canonical = json.dumps({"layout": LAYOUT, **parts}, sort_keys=True)
    folder = cache_folder() / hashlib.sha256(canonical.encode()).hexdigest()[:24]
    found = _read(folder)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w", encoding="utf-8") as lock:
            _wait_for(lock)
            return _read(folder) or _build(folder, build)
    except OSError as error:
        name = _named_folder()[0]
        raise CacheError(
            f"{name}: {os.environ.get(name, '')!r}: the cache of tokenized text in {folder.parent} can't be written "
            f"({error.strerror}); ALTGRAD_CACHE names another place"
        ) from None


def file_sha256(paths: Iterable[Path], start: bytes = b"") -> str:
    """Hex digest of `start` and the files' bytes, one after another, read in pieces."""
    digest = hashlib.sha256(start)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BUFFER):
                digest.update(block)
    return digest.hexdigest()


def _read(folder: Path) -> Entry | None:
    """The entry, or None where there is none, or its files are not as long as they were written."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in meta["files"].items())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Entry(folder, meta["content"]) if whole else None


def _wait_for(lock: IO[str]) -> None:
    """Takes the lock, and says so once where another process keeps it for long."""
    begun, is_said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not is_said and time.monotonic() - begun > SAID_AFTER_SECONDS:
                is_said = True
                logger.warning("%s: another process holds this file, to tokenize the same text; waiting", lock.name)
            time.sleep(PAUSE_SECONDS)


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> Entry:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        content = build(partial)
        sizes = {}
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        with (partial / META).open("w", encoding="utf-8") as meta:
            json.dump({"files": sizes, "content": content}, meta)
            meta.flush()
            os.fsync(meta.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    found = _read(folder)
    assert found is not None
    return found
