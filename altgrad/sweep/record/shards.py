"""An export: all that an analysis needs of a sweep, in a folder that can be committed, sent and read on its own.

    0001-3f2a9c1d/
      trials.parquet     what was asked of each trial that is new or has changed, with the heading of its record
      outcomes.parquet   how these ended, and when each rule of failure first held
      steps.parquet      the training loss at every step of those that ended
      checks.parquet     all evaluations, and every other signal at the ends of up to 24 log intervals
      layers.parquet     layer signals at a trial's first check, its last and a few checkpoints between
      sweep.json         what stood in the sweep's folder then; spend, samples and mutations are tables too

A shard is never rewritten: what came later stands in the next one, and of a trial that is in several the last is read,
whole; but a result is never replaced by an interruption, and an ending never by none. A shard appears by rename, under
a name that holds a hash of its content, so two machines may add shards to copies of one export, and damage is seen.

Losses and signals are exact. Layer signals are rounded to float32, but for what references are measured by. A lean
export (`transfer.LEAN`) has fewer checks and fewer bits of all but evaluations.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record.held import PatientConnection, connect
from altgrad.sweep.record.layer_table import read_parquet, write_parquet
from altgrad.sweep.record.layout import MANIFEST, shards
from altgrad.sweep.record.ledger_schema import OUTCOME_FIELDS, ROW_SIGNALS, SCHEMA, TRIAL_FIELDS
from altgrad.training.outcome import RESULT_KINDS
from altgrad.training.record import from_plain, to_plain

PARTIAL = ".partial-"
VERSION = 1
_VERSION = b"altgrad.export"
AT_EVERY_STEP = ("train_loss",)
AT_CHECKS = tuple(name for name in ROW_SIGNALS if name not in AT_EVERY_STEP)
IN_CHECKS = (*AT_CHECKS, "formats", "events")
TEXTS = {
    *("trial_id", "config", "task", "format", "arm", "policy", "data_sha256", "record", "fingerprint", "kind"),
    *("signal", "layer", "message", "formats", "device", "driver", "hostname", "events", "search", "params", "trials"),
    *("field", "source", "signs"),
}
INTEGERS = {"seed", "numerics", "step", "first_seen", "number", "applied"}
TABLES = {
    "trials": (*TRIAL_FIELDS, "record", "fingerprint"),
    "outcomes": ("trial_id", *OUTCOME_FIELDS, "recorded", "signs"),
    "steps": ("trial_id", "step", *AT_EVERY_STEP),
    "checks": ("trial_id", "step", *IN_CHECKS),
    "layers": ("trial_id", "step", "layer", "signal", "value"),
    "spend": ("started", "hours", "gpu_hours", "usd"),
    "samples": ("search", "number", "params", "trials"),
    "mutations": ("trial_id", "step", "field", "before", "after", "source", "applied"),
}
OF_SWEEP = {"spend": 1, "samples": 2, "mutations": 3}
"""Tables of the sweep as a whole, and how many of their first columns are their key."""

OF_LAYERS = pa.schema(
    [
        ("trial_id", pa.string()),
        ("step", pa.int64()),
        ("layer", pa.string()),
        ("signal", pa.string()),
        ("value", pa.float64()),
    ]
)

Rows = list[tuple[Any, ...]]


def write_shard(folder: Path, tables: Mapping[str, pa.Table | Iterable[Sequence[Any]]], manifest: str | None) -> Path:
    """Adds a shard with these tables, in the columns of TABLES; numbers may be as a ledger holds them.

    The caller is `alone` in the folder.
    """
    for left in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left)  # of an export that was killed
    known = shards(folder)
    number = int(known[-1].name.partition("-")[0]) + 1 if known else 1
    partial = folder / f"{PARTIAL}{number:04d}"
    partial.mkdir()
    for name, rows in tables.items():
        table = rows if isinstance(rows, pa.Table) else to_table(name, rows)
        if len(table) or name == "trials":
            write_parquet(table.replace_schema_metadata({_VERSION: str(VERSION).encode()}), partial / f"{name}.parquet")
    if manifest is not None:
        (partial / MANIFEST).write_text(manifest, encoding="utf-8")
    return partial.rename(folder / f"{number:04d}-{_digest(partial)}")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other export writes to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _digest(shard: Path) -> str:
    """Of all that a shard holds; it stands in the shard's name."""
    digest = hashlib.sha256()
    for path in sorted([*shard.glob("*.parquet"), *shard.glob(MANIFEST)]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


class Export:
    """The export in `folder`, to read; SpecError where it is none, or a shard can't be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = shards(folder)
        if not self._shards:
            raise SpecError(
                f"{folder}: no export in this folder (no shards like 0001-3f2a9c1d); altgrad export makes one"
            )
        self._place: dict[str, Path] = {}
        """the shard of each trial that counts"""
        worth: dict[str, int] = {}
        for shard in self._shards:
            if not shard.name.endswith(_digest(shard)):
                raise SpecError(
                    f"{shard} is not what was exported (the hash in its name is another): a file is missing or has "
                    "changed; copy it again, or leave the whole folder out"
                )
            kinds: dict[str, str] = dict(_read(shard, "outcomes", ("trial_id", "kind")))
            for (trial_id,) in _read(shard, "trials", ("trial_id",)):
                own = 0 if trial_id not in kinds else 1 + (kinds[trial_id] in RESULT_KINDS)
                if own >= worth.get(trial_id, 0):
                    worth[trial_id], self._place[trial_id] = own, shard

    def fingerprints(self) -> dict[str, str]:
        """What each trial's state was, by id, as it counts."""
        return {row[0]: row[1] for row in self.rows("trials", ("trial_id", "fingerprint"))}

    def rows(self, table: str, columns: Sequence[str] | None = None) -> Rows:
        """The rows that count, shard by shard, in the columns asked for, else all; numbers are plain ones."""
        columns = TABLES[table] if columns is None else columns
        if (key := OF_SWEEP.get(table)) is not None:
            found = {row[:key]: row for shard in self._shards for row in _read(shard, table, columns)}
            return list(found.values())
        return [row for shard in self._shards for row in self._own(shard, table, columns)]

    def _own(self, shard: Path, table: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        place = columns.index("trial_id")
        return (row for row in _read(shard, table, columns) if self._place.get(row[place]) == shard)

    def layers(self, signals: Collection[str] | None = None) -> pa.Table:
        """TABLES["layers"] of the trials that count: all signals, or those asked for."""
        found = [OF_LAYERS.empty_table()]
        for shard in self._shards:
            if (path := shard / "layers.parquet").exists():
                table = read_parquet(path, signals)
                own = [name for name, place in self._place.items() if place == shard]
                found.append(table.filter(pc.is_in(table["trial_id"], pa.array(own, pa.string()))))
        return pa.concat_tables(found)


@contextlib.contextmanager
def as_ledger(folder: Path) -> Iterator[PatientConnection]:
    """The export as a ledger in memory, for all that reads ledgers."""
    export = Export(folder)
    with contextlib.closing(connect(Path(":memory:"))) as connection:
        connection.executescript(SCHEMA)
        connection.execute("BEGIN")
        _enter(connection, "trials", TRIAL_FIELDS, export.rows("trials", TRIAL_FIELDS))
        _enter(connection, "outcomes", TABLES["outcomes"], export.rows("outcomes"))
        _enter(connection, "rows", TABLES["steps"], export.rows("steps"))
        connection.executemany(
            f"UPDATE rows SET {','.join(f'{name}=?' for name in IN_CHECKS)} WHERE trial_id=? AND step=?",
            ((*(to_plain(value) for value in row[2:]), *row[:2]) for row in export.rows("checks")),
        )
        for table in OF_SWEEP:
            _enter(connection, table, TABLES[table], export.rows(table))
        connection.execute("COMMIT")
        yield connection


def step_rows(export: Export) -> dict[str, list[dict[str, Any]]]:
    """Each trial's rows as its record held them, as far as they were exported, by id and in order of steps."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for trial_id, step, *values in export.rows("steps"):
        known = dict(zip(AT_EVERY_STEP, values, strict=True))
        found.setdefault(trial_id, {})[step] = {"step": step} | {k: v for k, v in known.items() if v is not None}
    for trial_id, step, *values, events in export.rows("checks"):
        row: dict[str, Any] = found[trial_id][step]
        row |= {name: value for name, value in zip(IN_CHECKS[:-1], values, strict=True) if value is not None}
        row |= json.loads(events) if events else {}
    layers = export.layers()
    columns = (layers[name].to_pylist() for name in TABLES["layers"])
    for trial_id, step, layer, signal, value in zip(*columns, strict=True):
        if step in found.get(trial_id, {}):
            found[trial_id][step].setdefault("layers", {}).setdefault(layer, {})[signal] = value
    return {trial_id: [rows[step] for step in sorted(rows)] for trial_id, rows in found.items()}


def _enter(connection: PatientConnection, table: str, columns: Sequence[str], rows: Rows) -> None:
    connection.executemany(
        f"INSERT INTO {table} ({','.join(columns)}) VALUES ({','.join('?' * len(columns))})",
        (tuple(to_plain(value) for value in row) for row in rows),
    )


def _types(columns: Sequence[str]) -> dict[str, pa.DataType]:
    kinds = {**dict.fromkeys(TEXTS, pa.string()), **dict.fromkeys(INTEGERS, pa.int64())}
    # In a search's table `trials` is a text; everything unnamed is a number.
    return {name: kinds.get(name, pa.float64()) for name in columns}


def to_table(name: str, given: Iterable[Sequence[Any]]) -> pa.Table:
    """The rows as columns; those in which nothing stands are left out, each would cost half a kilobyte."""
    columns, rows = TABLES[name], list(given)
    values = zip(*rows, strict=True) if rows else ((),) * len(columns)
    found = {}
    for (name, kind), column in zip(_types(columns).items(), values, strict=True):
        if not rows or name in columns[:2] or any(value is not None for value in column):
            if pa.types.is_floating(kind) and any(isinstance(value, str) for value in column):
                column = tuple(from_plain(value) for value in column)
            found[name] = pa.array(column, kind)
    return pa.table(found)


def _read(shard: Path, table: str, columns: Sequence[str]) -> Rows:
    """Rows in these columns; a column that the shard lacks is None throughout."""
    path = shard / f"{table}.parquet"
    if not path.exists():
        return []
    try:
        file = pq.ParquetFile(path)
        version = int((file.schema_arrow.metadata or {}).get(_VERSION, b"0"))
        if version > VERSION:
            raise SpecError(f"{path} is of version {version} of exports; this altgrad reads up to {VERSION}")
        present = [name for name in columns if name in file.schema_arrow.names]
        read = file.read(columns=present)
    except (pa.ArrowInvalid, OSError) as error:
        raise SpecError(
            f"{path} is torn ({' '.join(str(error).split())[:120]}); without the folder {shard.name} the rest is read"
        ) from None
    found = {name: read[name].to_pylist() for name in present}
    return list(zip(*(found.get(name, [None] * len(read)) for name in columns), strict=True))
