"""The folder of a sweep: who owns it, what was asked, and what it was asked on.

One driver at a time owns a folder, by a lock that the operating system drops when the driver dies, however it
dies. A folder that holds other things than a sweep is refused, and starting afresh moves the old sweep aside,
never away. `sweep.json` is the provenance: the resolved spec, the code (git revision and whether it was
modified), the versions, the machine, and the data by content.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import altgrad
from altgrad.quantization import NUMERICS_VERSION

LOCK = ".lock"
PACKAGES = ("altgrad", "torch", "ray", "numba", "numpy", "pydantic", "pandas")


class FolderError(RuntimeError):
    """The sweep's folder can't be used; the message says which and why."""


def check_folder(out: Path) -> None:
    """Raises FolderError where `out` is no place for a sweep; touches nothing."""
    if out.exists() and not out.is_dir():
        raise FolderError(f"{out} is a file; a folder is expected")
    if out.is_dir():
        content = [item.name for item in out.iterdir() if not item.name.startswith(".")]
        if content and not {"sweep.json", "ledger.sqlite"} & set(content):
            raise FolderError(f"{out} holds other things ({', '.join(sorted(content)[:3])}) and no sweep; "
                              "an empty or new folder is expected")
    standing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(standing, os.W_OK):
        raise FolderError(f"{out} can't be written: no permission on {standing}")


@contextlib.contextmanager
def owned(out: Path, *, fresh: bool = False) -> Iterator[Path]:
    """Owns `out` while the context lasts; with `fresh`, what stood there is moved to `out.<time>` first.

    Raises FolderError where another live driver owns it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = _lock(out)
    if fresh and any(item.name != LOCK for item in out.iterdir()):
        out.rename(out.with_name(f"{out.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        out.mkdir()
        lock.close()
        lock = _lock(out)
    try:
        yield out
    finally:
        lock.close()


def has_driver(out: Path) -> bool:
    """Whether a live driver owns the folder."""
    if not (out / LOCK).exists():
        return False
    try:
        _lock(out).close()
    except FolderError:
        return True
    return False


def _lock(out: Path) -> IO[str]:
    file = (out / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FolderError(
            f"{out} is in use by another running sweep; wait for it, or take another --out"
        ) from None
    return file


def manifest() -> dict[str, Any]:
    """The code, the versions and the machine that a sweep runs on."""
    return {"git": _git(), "numerics": NUMERICS_VERSION, "python": platform.python_version(),
            "versions": {name: version for name in PACKAGES if (version := installed(name)) is not None},
            "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": cores()},
            "argv": sys.argv[1:], "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


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
            answer = subprocess.run(["git", *words], cwd=Path(altgrad.__file__).parent, capture_output=True,
                                    text=True, timeout=10, check=True)
        except (FileNotFoundError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()
    if ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    sha = ask("rev-parse", "HEAD")
    return None if sha is None else {"sha": sha, "dirty": bool(ask("status", "--porcelain"))}
