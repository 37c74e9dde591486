"""What this machine knows of a cluster: tags that change, doubtful creations, spending. One locked file each.

Every `ray` command is a new process, and the head has its own copy, so a file keeps what RunPod can't. A pod that runs
and of which nothing is recorded counts as set up: so another machine, or a head that was restarted, can use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def home() -> Path:
    """Where clusters keep their keys and records, readable by the user alone."""
    folder = Path(os.environ.get("ALTGRAD_CLUSTER_HOME") or "~/.altgrad").expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def cluster_folder(cluster: str) -> Path:
    folder = home() / "clusters" / cluster
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


class LockedFile:
    """A JSON object in a file that processes and threads change one after another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        """What stands there; nothing where there is no file, or none that can be read."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def change(self, edit: Callable[[dict[str, Any]], Any]) -> Any:
        """Applies `edit` to the content under the lock, keeps what it leaves, and returns what it returns."""
        with self._locked():
            content = self.read()
            before = json.dumps(content)
            result = edit(content)
            after = json.dumps(content)
            if after != before:
                draft = self.path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
                draft.touch(mode=0o600)
                draft.write_text(after, encoding="utf-8")
                draft.replace(self.path)
            return result

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock, self.path.with_suffix(".lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
