"""The folder of a sweep: who owns it, what was asked, and what it was asked on.

One driver at a time owns a folder, by a lock that the operating system drops when the driver dies, however it
dies. A folder that holds other things than a sweep is refused, and starting afresh moves the old sweep aside,
never away. `sweep.json` is the provenance: the resolved spec, the code (git revision and whether it was
modified), the versions, the machine, and the data by content.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import altgrad
from altgrad import NUMERICS_VERSION
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record import file_systems, layout, read_only
from altgrad.sweep.record.held import HeldError

LOCK = ".lock"
PACKAGES = ("altgrad", "torch", "ray", "numba", "numpy", "pydantic", "pandas")


class FolderError(RuntimeError):
    """The sweep's folder can't be used; the message says which and why."""


def check_folder(out: Path, *, fresh: bool = False, patience: float = math.inf) -> None:
    """Raises FolderError where `out` is no place for a sweep, or can't be moved aside for a `fresh` one.

    Touches nothing. A ledger that another program holds is waited for, for `patience` seconds.
    """
    try:
        _check_folder(out, fresh, patience)
    except OSError as error:
        raise FolderError(f"{out} can't be used: {error.strerror}") from None


def _check_folder(out: Path, fresh: bool, patience: float) -> None:
    if out.exists() and not out.is_dir():
        raise FolderError(f"{out} is a file; a folder is expected")
    if out.is_dir():
        content = [item.name for item in out.iterdir() if not item.name.startswith(".")]
        if layout.shards(out):
            raise FolderError(f"{out} is an export, which stays as it is; altgrad import {out} OUT makes a sweep of it")
        if content and not {"sweep.json", "ledger.sqlite"} & set(content):
            raise FolderError(
                f"{out} holds other things ({', '.join(sorted(content)[:3])}) and no sweep; "
                "an empty or new folder is expected"
            )
        if fresh and content and Path.cwd().is_relative_to(out.resolve()):
            raise FolderError(f"{out} with --fresh: the folder you stand in can't be moved aside; call from outside it")
        if not fresh:
            check_ledger(out / "ledger.sqlite", patience)
    standing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not standing.is_dir():
        raise FolderError(f"{out}: {standing} is a file; a folder is expected")
    if not os.access(standing, os.W_OK):
        raise FolderError(f"{out} can't be written: no permission on {standing}")


def read_manifest(out: Path) -> dict[str, Any] | None:
    """What sweep.json says of the sweep or export in `out`; None where there is none. SpecError for a torn one."""
    held = [shard / layout.MANIFEST for shard in layout.shards(out)]
    path = next((file for file in reversed(held) if file.exists()), out / layout.MANIFEST)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a mapping is expected, found {type(found).__name__}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SpecError(
            f"{path} is torn ({error}): the sweep's own command writes it again; without the file, all trials of the "
            "ledger that share the newest setting are taken"
        ) from None
    return found


def damaged_text(path: Path, error: Exception) -> str:
    """What is wrong with a ledger, and the mend."""
    if isinstance(error, HeldError):
        return str(error)
    return (
        f"{path} is no readable ledger ({error}); move it aside, and the sweep's own command makes it again from the "
        "records under trials/"
    )


def check_ledger(path: Path, patience: float) -> bool:
    """Whether a sweep is recorded at `path`; FolderError where the file is something else, or another program holds it
    for longer than `patience`. Touches nothing."""
    if not path.exists() or not path.stat().st_size:
        return False
    try:
        with read_only.reading(path, patience) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.DatabaseError as error:
        raise FolderError(damaged_text(path, error)) from None
    if tables and not {"trials", "rows", "outcomes"} <= tables:
        raise FolderError(f"{path} is a database, but no ledger")
    return bool(tables)


@contextlib.contextmanager
def owned(out: Path, *, fresh: bool = False) -> Iterator[Path]:
    """Owns `out` while the context lasts; with `fresh`, what stood there is moved to `out.<time>` first.

    Raises FolderError where another live driver owns it, or the file system refuses.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_locks(out)
        lock = _lock(out)
        if fresh and any(item.name != LOCK for item in out.iterdir()):
            _move_aside(out.resolve())
            lock.close()
            lock = _lock(out)
    except OSError as error:
        raise FolderError(f"{out} can't be used: {error.strerror}") from None
    try:
        yield out
    finally:
        lock.close()


def _move_aside(out: Path) -> None:
    out.rename(out.with_name(f"{out.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    out.mkdir()


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it came of, says that a file system has no room left."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in text or "No space left" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_locks(out: Path) -> None:
    try:
        file_systems.check_locks(out)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise FolderError(
            f"{out}: its file system ({file_systems.kind(out) or 'of unknown type'}) has no file locks "
            f"({error.strerror}), without which two drivers, or a lost trial and its successor, would write over each "
            "other; mount it with locks, or take an --out on another"
        ) from None


def has_driver(out: Path) -> bool:
    """Whether a live driver owns the folder."""
    return is_locked(out / LOCK)


def is_locked(file: Path) -> bool:
    """Whether a live process holds the lock; one of another machine is seen where the file system tells."""
    try:
        with file.open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(out: Path) -> IO[str]:
    file = (out / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "process unknown"
        file.close()
        raise FolderError(
            f"{out} is in use by another running sweep ({owner}); wait for it, or take another --out"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def manifest() -> dict[str, Any]:
    """The code, the versions and the machine that a sweep runs on."""
    return {
        "git": _git(),
        "numerics": NUMERICS_VERSION,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name)) is not None},
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": cores()},
        "argv": sys.argv[1:],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def installed(package: str) -> str | None:
    """The installed version of a package, without importing it; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _git() -> dict[str, Any] | None:
    """Revision and whether the tree was modified; None where no repository tracks this package."""

    def ask(*words: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", *words],
                cwd=Path(altgrad.__file__).parent,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=10,
                check=True,
            )
        except (FileNotFoundError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    if ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    sha = ask("rev-parse", "HEAD")
    return None if sha is None else {"sha": sha, "dirty": bool(ask("status", "--porcelain"))}
