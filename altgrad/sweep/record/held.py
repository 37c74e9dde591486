"""A database that another program holds: its reader or writer waits, says so once, and goes on when it is free.

SQLite's own busy timeout ends in an error, and while it lasts no signal is answered and nothing is said. Here it is
short, and what was refused is tried again: without end by a driver, whose trials train on meanwhile, and for
READER_SECONDS by a command that only reads.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

READER_SECONDS = 30.0
TRY_SECONDS = 1.0
"""SQLite's own timeout: how long an interrupt may go unanswered."""
PAUSE_SECONDS = 0.05
"""Where SQLite foresees a deadlock it refuses at once."""
SAID_AFTER_SECONDS = 3.0
BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class HeldError(sqlite3.OperationalError):
    """Another program holds the database for longer than was to be waited; the message is one line that names it."""


class PatientConnection(sqlite3.Connection):
    """A connection whose statements wait while the database is held; `connect` makes it."""

    path: Path
    patience: float

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        return self._when_free(super().execute, *arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        return self._when_free(super().executemany, *arguments)

    def executescript(self, *arguments: Any) -> sqlite3.Cursor:
        """Each statement of the script must bear being run twice."""
        return self._when_free(super().executescript, *arguments)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is executed in it, or nothing. It takes the lock first: a lock that is wanted in the middle could
        wait for one who waits for us."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self.in_transaction:
                self.rollback()
            raise

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """While it lasts, HeldError comes at once."""
        before, self.patience = self.patience, 0.0
        super().execute("PRAGMA busy_timeout=0")
        try:
            yield
        finally:
            self.patience = before
            super().execute(f"PRAGMA busy_timeout={TRY_SECONDS * 1000:.0f}")

    def _when_free(self, call: Callable[..., sqlite3.Cursor], *arguments: Any) -> sqlite3.Cursor:
        begun, is_said = time.monotonic(), False
        while True:
            try:
                cursor = call(*arguments)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in BUSY:
                    raise
                waited = time.monotonic() - begun
                if waited >= self.patience:
                    raise HeldError(
                        f"{self.path}: another program holds this file, still after {waited:.0f} s; call again when it "
                        "has let go"
                    ) from None
                if waited >= SAID_AFTER_SECONDS and not is_said:
                    is_said = True
                    most = "" if self.patience == math.inf else f", {self.patience:.0f} s at most"
                    logger.warning("%s: another program holds this file; waiting until it lets go%s", self.path, most)
                time.sleep(PAUSE_SECONDS)
            else:
                if is_said:
                    logger.warning("%s: free again after %.0f s; going on", self.path, time.monotonic() - begun)
                return cursor


def connect(path: Path, *, how: str | None = None, patience: float = math.inf) -> PatientConnection:
    """A connection in autocommit; `how`: the parameters of SQLite's URI, like mode=ro."""
    place = str(path) if how is None else f"{path.absolute().as_uri()}?{how}"
    connection = sqlite3.connect(
        place, uri=how is not None, timeout=TRY_SECONDS, isolation_level=None, factory=PatientConnection
    )
    connection.path, connection.patience = path, patience
    return connection
