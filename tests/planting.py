"""Finds and changes processes that a test can't reach into: Ray's workers, which Ray starts by itself.

They inherit the environment, and Python runs the `sitecustomize` that it finds on PYTHONPATH before anything else. Ours
waits until the process imports `engine.executors` and then hands the module to the test's `plant(module)`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

HOOK = """
import importlib.abc, importlib.util, sys

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "altgrad.sweep.engine.executors":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def load_and_plant(module):
            load(module)
            import planted_change
            planted_change.plant(module)
        spec.loader.exec_module = load_and_plant
        return spec

sys.meta_path.insert(0, Hook())
"""


def planted_path(folder: Path, source: str, *more: Path) -> str:
    """PYTHONPATH for processes that run the source's `plant(module)`; it can import what lies in `more`.

    Writes two modules into a new `plant` below the folder.
    """
    place = folder / "plant"
    place.mkdir()
    (place / "planted_change.py").write_text(source)
    (place / "sitecustomize.py").write_text(HOOK)
    return os.pathsep.join(map(str, filter(None, [place, *more, os.environ.get("PYTHONPATH")])))


def started_here() -> Iterator[tuple[int, str]]:
    """Pid and title of each process below this one; tests that run beside it have their own Ray."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            yield process.pid, process.cmdline()[0]
