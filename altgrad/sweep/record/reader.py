"""What analyses ask of a ledger, or of an export in its place: whole tables, as they stand, with nothing written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from altgrad.sweep.record import read_only
from altgrad.sweep.record.held import PatientConnection
from altgrad.sweep.record.layout import LEDGER
from altgrad.sweep.record.ledger_schema import ROW_SIGNALS

Entry = Mapping[str, Any]
"""A line of a table, by column."""
EVALUATION = ("trial_id", "step", "train_loss", "val_loss", "bits_per_byte", "formats")
SPEND = ("started", "hours", "gpu_hours", "usd")
MUTATION = ("trial_id", "step", "field", "before", "after", "source")


class Reader:
    """An open ledger; numbers that are none stand in it as the texts 'nan', 'inf' and '-inf'."""

    def __init__(self, connection: PatientConnection) -> None:
        self._connection = connection

    def trials(self) -> list[Entry]:
        """Every trial as it was entered, in the order in which they were."""
        return self._lines("SELECT * FROM trials ORDER BY created, trial_id")

    def outcomes(self) -> dict[str, Entry]:
        """How each trial that ended ended, with its signs of failure, by id."""
        return {line["trial_id"]: line for line in self._lines("SELECT * FROM outcomes")}

    def evaluations(self) -> list[Entry]:
        """Every step with a validation loss, in the columns of EVALUATION."""
        return self._lines(f"SELECT {', '.join(EVALUATION)} FROM rows WHERE val_loss IS NOT NULL")

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """trial_id, step and ROW_SIGNALS of every step of every trial, trial by trial."""
        yield from self._connection.execute(
            f"SELECT trial_id, step, {', '.join(ROW_SIGNALS)} FROM rows ORDER BY trial_id, step"
        )

    def moved(self) -> dict[str, str]:
        """The last moves of layers to other formats of each trial that had some."""
        query = "SELECT trial_id, formats FROM rows WHERE formats IS NOT NULL ORDER BY step"
        return dict(self._connection.execute(query).fetchall())

    def spend(self) -> list[tuple[Any, ...]]:
        """A line per run of a driver, in the columns of SPEND."""
        return self._connection.execute(f"SELECT {', '.join(SPEND)} FROM spend ORDER BY started").fetchall()

    def mutations(self) -> list[tuple[Any, ...]]:
        """What members of populations took over, in the columns of MUTATION, by step."""
        query = f"SELECT {', '.join(MUTATION)} FROM mutations ORDER BY step, rowid"
        return self._connection.execute(query).fetchall()

    def _lines(self, query: str) -> list[Entry]:
        cursor = self._connection.execute(query)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, line, strict=True)) for line in cursor]


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    """The ledger in a sweep's folder, or the export in its place; sqlite3.DatabaseError where it is damaged."""
    with read_only.current(folder / LEDGER) as connection:
        yield Reader(connection)
