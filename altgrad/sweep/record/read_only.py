"""A ledger opened for reading, wherever it lies: nothing beside it is made, changed or left.

SQLite itself needs to write where it only reads: a database with a write-ahead log wants a file of shared memory beside
it, which a read-only mount or another user's folder refuses. There the database is taken as it is; where its log holds
what the database does not, both are copied aside first, or the newest rows would be missing.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from altgrad.sweep.record.held import READER_SECONDS, PatientConnection, connect
from altgrad.sweep.record.layout import shards
from altgrad.sweep.record.ledger_schema import bring_up_to_date, is_outdated

LOG = "-wal"


@contextlib.contextmanager
def reading(path: Path, patience: float = READER_SECONDS) -> Iterator[PatientConnection]:
    """A connection that reads the database at `path`; sqlite3.DatabaseError where it is none, or damaged.

    HeldError where another program holds it for longer than `patience`, in seconds.
    """
    with contextlib.ExitStack() as stack:
        connection = connect(path, how="mode=ro", patience=patience)
        try:
            connection.execute("SELECT name FROM sqlite_master").fetchall()
        except sqlite3.OperationalError as error:
            connection.close()
            if "unable to open" not in str(error) and "readonly" not in str(error):
                raise
            log = path.with_name(path.name + LOG)
            if log.exists() and log.stat().st_size:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="altgrad-")))
                for name in (path.name, log.name):
                    shutil.copyfile(path.with_name(name), folder / name)
                connection = connect(folder / path.name, how="mode=rw", patience=patience)
            else:
                connection = connect(path, how="mode=ro&immutable=1", patience=patience)
        stack.callback(connection.close)
        yield connection


@contextlib.contextmanager
def current(path: Path) -> Iterator[PatientConnection]:
    """`reading` a ledger, or the export beside which it would stand; an earlier version's is completed in memory."""
    if not path.exists() and shards(path.parent):
        from altgrad.sweep.record.shards import as_ledger  # with pyarrow, which a ledger needs not

        with as_ledger(path.parent) as connection:
            yield connection
        return
    with reading(path) as connection:
        if not is_outdated(connection):
            yield connection
            return
        with contextlib.closing(connect(Path(":memory:"))) as copy:
            connection.backup(copy)
            bring_up_to_date(copy)
            yield copy
