"""Numba functions compiled once and kept on disk, so that worker processes load what another has compiled.

The folder carries a hash of the sources of all kernel packages, for numba notices an edit in a kernel's own file only;
where neither the package nor the user's cache folder can be written, kernels are compiled anew in each
process.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import config


def _cache_folder() -> str | None:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[2].glob("*/kernels/*.py")):
        digest.update(source.read_bytes())
    own = f"numba-{digest.hexdigest()[:16]}"
    asked = os.environ.get("NUMBA_CACHE_DIR")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    parents = [Path(asked)] if asked else [Path(__file__).parent / "__pycache__", user / "altgrad"]
    for folder in (parent / own for parent in parents):
        if _is_writable(folder):
            return str(folder)
    return None


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


FOLDER = _cache_folder()
"""Where compiled kernels are kept, None where nothing can be written."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled on its first call, cached in our folder without moving anyone else's cache.

    It releases the interpreter lock; a division by zero gives IEEE's answer, as the check for it is a branch.
    """
    before = config.CACHE_DIR
    config.CACHE_DIR = FOLDER or ""
    try:
        keep = FOLDER is not None
        kernel: Callable[..., Any] = numba.njit(nogil=True, cache=keep, error_model="numpy")(function)
        return kernel
    finally:
        config.CACHE_DIR = before


inlined: Callable[[Callable[..., Any]], Callable[..., Any]] = numba.njit(error_model="numpy")
"""For the small parts of a kernel; LLVM inlines them."""
