"""What is measured of single layers, as one small parquet file beside each trial's record.

Nine tenths of `metrics.jsonl` are layer signals, in a form that costs seconds to search. The driver turns them into
`layers.parquet`, a row per (step, layer, signal), when a trial ends: a tenth of the size, and readable by any tool that
knows parquet. `metrics.jsonl` stays the truth. The table remembers how long the record was that it was made from; where
the record has changed, or no table is there, readers take the record itself.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from altgrad.training.record import read_rows

logger = logging.getLogger(__name__)

FILE = "layers.parquet"
SCHEMA = pa.schema([("step", pa.int64()), ("layer", pa.string()), ("signal", pa.string()), ("value", pa.float64())])
ORDER = ("signal", "layer", "step")
"""Like values beside each other: a third smaller than in the order of the record."""
_SOURCE = b"altgrad.record_bytes"


def write_layers(folder: Path) -> None:
    """Makes the table of a trial's folder from its record."""
    record = folder / "metrics.jsonl"
    size = record.stat().st_size
    table = _from_record(record).replace_schema_metadata({_SOURCE: str(size).encode()})
    partial = folder / (FILE + ".partial")
    write_parquet(table, partial)
    partial.replace(folder / FILE)


def read_layers(folder: Path, signals: Collection[str] | None = None) -> pa.Table:
    """SCHEMA, of a trial: all signals, or those asked for; by signal, layer and step. Empty where it has no record."""
    path, record = folder / FILE, folder / "metrics.jsonl"
    try:
        # Without a record (someone made room) the table is all there is.
        if not record.exists() or _source(path) == record.stat().st_size:
            return read_parquet(path, signals)
    except FileNotFoundError:
        pass
    except (pa.ArrowException, OSError) as error:
        logger.warning("%s is torn (%s): its trial's record is read in its place", path, error)
    found = _from_record(record) if record.exists() else SCHEMA.empty_table()
    return found if signals is None else found.filter(pc.is_in(found["signal"], pa.array(list(signals), pa.string())))


def write_parquet(table: pa.Table, path: Path) -> None:
    """Small files: floats split by bytes (those that came of float32 shrink to half), all else by dictionary."""
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=9,
        use_dictionary=[name for name in table.column_names if name not in floats],
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        write_statistics=False,
    )


def read_parquet(path: Path, signals: Collection[str] | None = None) -> pa.Table:
    """A stored table of layer signals, in its order."""
    chosen = None if signals is None else [("signal", "in", list(signals))]
    return pq.read_table(path, filters=chosen, partitioning=None).replace_schema_metadata(None)


def _source(path: Path) -> int | None:
    """How many bytes the record had that a table was made from."""
    found = (pq.read_schema(path).metadata or {}).get(_SOURCE)
    return None if found is None else int(found)


def _from_record(record: Path) -> pa.Table:
    values = list(zip(*_values(record), strict=True)) or [()] * len(SCHEMA)
    columns = [pa.array(column, kind) for column, kind in zip(values, SCHEMA.types, strict=True)]
    return pa.table(columns, schema=SCHEMA).sort_by([(name, "ascending") for name in ORDER])


def _values(record: Path) -> Iterator[tuple[int, str, str, float]]:
    for row in read_rows(record)[0]:
        for layer, signals in row.get("layers", {}).items():
            for name, value in signals.items():
                if value is not None:
                    yield row["step"], layer, name, float(value)
