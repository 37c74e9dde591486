"""What each pod has cost, on this machine's disk, in a form that a full disk or a crash can't turn into $0.

Every process keeps what it knows in memory and merges it with the file; the previous version stays beside the file
(`.bak`), and a copy goes to the network volume every half minute, for a head that replaces this one. A write that fails
is logged once and loses nothing while the process lives. A file that can't be read is never taken for an empty one: the
previous version counts, then the copy, and where none is left, `Damaged` says so until a person has decided.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from altgrad_cluster.errors import ClusterError

logger = logging.getLogger(__name__)
COPY_S = 30.0
"""Between two copies to the volume: several processes write, and the volume is shared."""

Entry = dict[str, float]
"""`usd` so far, `rate` in USD an hour, and `at`, the time up to which it was counted"""
Pods = dict[str, Entry]


class Damaged(ClusterError):
    """The record exists and no version of it can be read."""


class Record:
    """Spending by pod id; safe to use from several threads and processes."""

    def __init__(self, path: Path, copy: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._previous = path.with_suffix(".bak")
        self._copy = copy
        self._clock = clock
        self._lock = threading.RLock()
        self._known: Pods = {}
        self._is_complete = False
        """Whether all that was on disk is in `_known`; then a file that breaks later is written anew."""
        self._copied: float | None = None
        self._said: set[str] = set()

    def read(self) -> Pods:
        """What is known here, in the file, and at first in the copy. Damaged where that is unknown."""
        with self._lock:
            self._known = _merged(self._known, self._stored())
            self._is_complete = True
            return self._known

    def known(self) -> Pods:
        """What this process knows by itself."""
        with self._lock:
            return self._known

    def change(self, edit: Callable[[Pods], None]) -> None:
        """Applies `edit` and keeps the outcome. Never raises for a disk; a damaged file is left as it is."""
        with self._lock, self._locked():
            try:
                self.read()
            except Damaged as error:
                self._say(str(error))
            self._known = {pod_id: dict(entry) for pod_id, entry in self._known.items()}
            edit(self._known)
            if not self._is_complete:
                return
            try:
                self._write()
            except OSError as error:
                self._say(f"{self._path}: spending can't be recorded ({error.strerror or error}); it is kept in memory")
            self._write_copy()

    def _stored(self) -> Pods:
        """The best version on disk, nothing where there never was one. The copy counts until it was first written."""
        found, is_there = _first_readable((self._path, self._previous))
        if self._copy is not None and (self._copied is None or found is None):
            copied, has_copy = _first_readable((self._copy,))
            if copied is None and has_copy:
                self._say(f"{self._copy}: the copy of the record of spending can't be read")
            found, is_there = copied if found is None else _merged(found, copied or {}), is_there or has_copy
        if found is None and is_there and not self._is_complete:
            raise Damaged(
                f"{self._path}: the record of spending can't be read, nor can its other versions "
                f"({', '.join(map(str, filter(None, (self._previous, self._copy))))}): restore one, or delete all to "
                "count from the ages of the pods that are up"
            )
        return found or {}

    def _write(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = _draft(self._path, self._known)
        if _first_readable((self._path,))[0] is not None:
            # A link, so that the file itself is there at every moment.
            self._previous.unlink(missing_ok=True)
            os.link(self._path, self._previous)
        draft.replace(self._path)

    def _write_copy(self) -> None:
        if self._copy is None or (self._copied is not None and self._clock() - self._copied < COPY_S):
            return
        self._copied = self._clock()
        try:
            self._copy.parent.mkdir(mode=0o700, exist_ok=True)
            _draft(self._copy, self._known).replace(self._copy)
        except OSError as error:
            self._say(f"{self._copy}: spending can't be copied there ({error.strerror or error})")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Between processes, where the disk has locks; two that write at once lose what the next look adds again."""
        with contextlib.ExitStack() as stack:
            try:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                fcntl.flock(
                    stack.enter_context(self._path.with_suffix(".lock").open("w", encoding="utf-8")), fcntl.LOCK_EX
                )
            except OSError as error:
                self._say(f"{self._path}: can't be locked ({error.strerror or error})")
            yield

    def _say(self, text: str) -> None:
        """Logs it, the first time."""
        if text not in self._said:
            self._said.add(text)
            logger.error("%s", text)


def _first_readable(places: tuple[Path, ...]) -> tuple[Pods | None, bool]:
    """The first of these that holds a record, and whether any of them is there at all."""
    is_there = False
    for place in places:
        try:
            return _parsed(place.read_text(encoding="utf-8")), True
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError):
            is_there = True
    return None, is_there


def _parsed(text: str) -> Pods:
    """ValueError where it is no record of spending."""
    try:
        pods = json.loads(text)["pods"]
        return {
            str(pod_id): {field: float(entry.get(field, 0.0)) for field in ("at", "rate", "usd")}
            for pod_id, entry in pods.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a record of spending ({type(error).__name__})") from None


def _draft(path: Path, pods: Pods) -> Path:
    """A complete file beside `path`, on the disk and not only in its cache; removed where the disk is full."""
    draft = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(json.dumps({"pods": pods}))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    return draft


def _merged(one: Pods, other: Pods) -> Pods:
    """Of each pod the higher amount, and the later of the two times."""
    merged = dict(one)
    for pod_id, entry in other.items():
        mine = merged.get(pod_id, entry)
        later = max(mine, entry, key=lambda either: either["at"])
        merged[pod_id] = {**later, "usd": max(mine["usd"], entry["usd"])}
    return merged
