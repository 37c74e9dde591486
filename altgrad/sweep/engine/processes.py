"""Processes of this program's own, beside those that Ray starts."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def nobodys_main() -> Iterator[None]:
    """Keeps processes that start in it from running the main program's file again: a worker of Ray does not either, and
    a sweep file without a guard would start its sweep in each."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
