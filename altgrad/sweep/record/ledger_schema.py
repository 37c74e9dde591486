"""The tables of a ledger, and how one of an earlier version gets what it lacks: tables and columns are only added.

What is measured of single layers is not among them: it would be nine tenths of the file (`layer_table`). Of it the
ending of a trial carries when each rule of failure first held (`signs`).
"""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Any

from altgrad.training.catalogue import CLASSIFICATION_SIGNALS, SIGNALS

if TYPE_CHECKING:
    from altgrad.training.config import TrainConfig

ROW_SIGNALS = (
    *SIGNALS,
    "perplexity",
    "bits_per_byte",
    "lr",
    "tokens_per_s",
    "clipped_tensors",
    "clip_factor",
    *CLASSIFICATION_SIGNALS,
)
EVENTS = ("shifts", "warnings", "nonfinite_layer")
"""What a row says in words, where there is something to say; a ledger holds them as one JSON mapping."""
OUTCOME_FIELDS = (
    "kind",
    "signal",
    "layer",
    "step",
    "value",
    "limit_",
    "first_seen",
    "message",
    "train_loss",
    "val_loss",
    "bits_per_byte",
    "seconds",
    "formats",
    "device",
    "driver",
    "hostname",
)
TRIAL_FIELDS = (
    "trial_id",
    "config",
    "task",
    "format",
    "arm",
    "policy",
    "lr",
    "rung_clip",
    "seed",
    "data_sha256",
    "created",
    "numerics",
)

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS trials (
    trial_id TEXT PRIMARY KEY, config TEXT NOT NULL, task TEXT, format TEXT, arm TEXT, policy TEXT,
    lr REAL, rung_clip REAL, seed INTEGER, data_sha256 TEXT, created REAL, numerics INTEGER);
CREATE TABLE IF NOT EXISTS rows (
    trial_id TEXT NOT NULL, step INTEGER NOT NULL, {", ".join(f"{name} REAL" for name in ROW_SIGNALS)},
    formats TEXT, events TEXT, PRIMARY KEY (trial_id, step)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outcomes (
    trial_id TEXT PRIMARY KEY, kind TEXT NOT NULL, signal TEXT, layer TEXT, step INTEGER, value REAL,
    limit_ REAL, first_seen INTEGER, message TEXT, train_loss REAL, val_loss REAL, bits_per_byte REAL,
    seconds REAL, formats TEXT, device TEXT, driver TEXT, hostname TEXT, recorded REAL, signs TEXT);
CREATE TABLE IF NOT EXISTS spend (started REAL PRIMARY KEY, hours REAL, gpu_hours REAL, usd REAL);
CREATE TABLE IF NOT EXISTS samples (
    search TEXT NOT NULL, number INTEGER NOT NULL, params TEXT NOT NULL, trials TEXT NOT NULL,
    PRIMARY KEY (search, number));
CREATE TABLE IF NOT EXISTS mutations (
    trial_id TEXT NOT NULL, step INTEGER NOT NULL, field TEXT NOT NULL, before REAL, after REAL, source TEXT NOT NULL,
    applied INTEGER NOT NULL, PRIMARY KEY (trial_id, step, field));
CREATE TABLE IF NOT EXISTS notices (subject TEXT PRIMARY KEY, recorded REAL, message TEXT NOT NULL);
"""
ADDED = {
    "rows": dict.fromkeys(ROW_SIGNALS, "REAL") | {"formats": "TEXT", "events": "TEXT"},
    "outcomes": dict.fromkeys(("formats", "device", "driver", "hostname", "signs"), "TEXT"),
    "trials": {"numerics": "INTEGER"},
}
"""Columns that earlier versions lack."""
_COLUMNS = "SELECT m.name, p.name FROM sqlite_master m JOIN pragma_table_info(m.name) p WHERE m.type = 'table'"


def trial_values(
    trial_id: str, config: TrainConfig, data_sha256: str, *, created: float, numerics: int | None
) -> tuple[Any, ...]:
    """A trial's entry, in the columns of TRIAL_FIELDS."""
    return (
        trial_id,
        config.model_dump_json(),
        config.task,
        config.format,
        config.arm,
        config.recipe_name,
        config.optimizer.lr,
        getattr(config.optimizer, "rung_clip", None),
        config.seed,
        data_sha256,
        created,
        numerics,
    )


def bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Makes what the database lacks."""
    connection.executescript(SCHEMA)
    for table, columns in ADDED.items():
        known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        for name, kind in columns.items():
            if name not in known:
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")


def is_outdated(connection: sqlite3.Connection) -> bool:
    """Whether the database lacks a table or column."""
    with contextlib.closing(sqlite3.connect(":memory:")) as new:
        new.executescript(SCHEMA)
        expected = set(new.execute(_COLUMNS))
    return not expected <= set(connection.execute(_COLUMNS))
