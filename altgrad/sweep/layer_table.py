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

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from altgrad.training.record import read_rows

logger = logging.getLogger(__name__)

FILE = "layers.parquet"
COLUMNS = ("step", "layer", "signal", "value")
ORDER = ["signal", "layer", "step"]
"""Like values beside each other: a third smaller than in the order of the record."""
_SOURCE = b"altgrad.record_bytes"


def write_layers(folder: Path) -> None:
    """Makes the table of a trial's folder from its record."""
    record = folder / "metrics.jsonl"
    size = record.stat().st_size
    frame = _from_record(record)
    table = to_arrow(frame.sort_values(ORDER, kind="stable"))
    partial = folder / (FILE + ".partial")
    write_parquet(table.replace_schema_metadata({_SOURCE: str(size).encode()}), partial)
    partial.replace(folder / FILE)


def is_current(folder: Path) -> bool:
    """Whether the folder has a table of the record as it is."""
    try:
        size = (folder / "metrics.jsonl").stat().st_size
    except FileNotFoundError:
        size = None
    try:
        found = (pq.read_schema(folder / FILE).metadata or {}).get(_SOURCE)
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return found is not None and (size is None or int(found) == size)


def read_layers(folder: Path, signals: Collection[str] | None = None) -> pd.DataFrame:
    """COLUMNS of a trial: all signals, or those asked for; by signal, layer and step. Empty where it has no record."""
    path, record = folder / FILE, folder / "metrics.jsonl"
    if is_current(folder):
        try:
            return read_parquet(path, signals)
        except pa.ArrowInvalid as error:
            logger.warning("%s is torn (%s): its trial's record is read in its place", path, error)
    if not record.exists():
        return pd.DataFrame(columns=list(COLUMNS))
    frame = _from_record(record).sort_values(ORDER, kind="stable", ignore_index=True)
    return frame if signals is None else frame[frame["signal"].isin(signals)].reset_index(drop=True)


def to_arrow(frame: pd.DataFrame) -> pa.Table:
    """A frame of layer signals as it is stored; NaN stays a number that was measured."""
    types = {"step": pa.int32(), "value": pa.float64()}
    return pa.table({name: pa.array(frame[name].to_numpy(), types.get(name, pa.string())) for name in frame.columns})


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


def read_parquet(path: Path, signals: Collection[str] | None = None) -> pd.DataFrame:
    """A stored frame of layer signals, in its order."""
    chosen = None if signals is None else [("signal", "in", list(signals))]
    frame: pd.DataFrame = pq.read_table(path, filters=chosen).to_pandas()
    return frame


def _from_record(record: Path) -> pd.DataFrame:
    return pd.DataFrame.from_records(list(_values(record)), columns=list(COLUMNS))


def _values(record: Path) -> Iterator[tuple[int, str, str, float]]:
    for row in read_rows(record)[0]:
        for layer, signals in row.get("layers", {}).items():
            for name, value in signals.items():
                if value is not None:
                    yield row["step"], layer, name, float(value)
