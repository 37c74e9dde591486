"""The record of one trial: plain files that survive a kill, written by the worker alone.

    trials/<trial_id>/
      config.json      the resolved configuration, and the sha256 of its data
      metrics.jsonl    one line per training step, flushed per log interval
      checkpoint/      the newest complete state
      outcome.json     how it ended; written last, by rename

Lines are strict JSON: a non-finite number is the string "nan", "inf" or "-inf". An attempt that resumes from step k
first drops the lines after k, so that every step stands once. The folder is locked while a worker owns it: an
attempt that starts while a killed driver's worker still lives waits for that worker's death instead of writing
beside it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from altgrad.training.outcome import Outcome

logger = logging.getLogger(__name__)

LOCK_WAIT_SECONDS = 60.0
NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_plain(value: Any) -> Any:
    """The value with every non-finite float replaced by its name, recursively."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`."""
    if isinstance(value, str):
        return NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: from_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return value


def flat(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted names."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flat(item, f"{path}{name}.") if isinstance(item, Mapping) else {f"{path}{name}": item}
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON so that a reader sees the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(to_plain(value), file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_rows(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete lines from byte `offset` on, and the offset behind the last of them.

    A torn line (a disk that lied, an edit by hand) is skipped with a warning that names it.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data[: data.rfind(b"\n") + 1]
    rows, place = [], offset
    for line in complete.splitlines(keepends=True):
        try:
            row = from_plain(json.loads(line))
            row["step"]
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            logger.warning(
                "%s: the line at byte %d is torn and was skipped: its step is not in the record", path, place
            )
        place += len(line)
    return rows, offset + len(complete)


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json in a trial's folder says; nothing where there is none, or a torn one."""
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def read_outcome(path: Path) -> Outcome | None:
    """The outcome in a file; None where there is none, or a torn one, which a warning names."""
    try:
        return Outcome.from_dict(from_plain(json.loads(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is torn (%s): the trial counts as unfinished, and goes on from its checkpoint", path, error)
        return None


class RowReader:
    """Reads a growing `metrics.jsonl`, from where it last read; from its start once the file has been replaced.

    A worker that resumes replaces the file by a shorter one: the steps behind its checkpoint will be trained again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0

    def new(self) -> list[dict[str, Any]]:
        """The rows since the last call; none where there is no file yet."""
        if not self._path.exists():
            return []
        status = self._path.stat()
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._offset = 0
        rows, self._offset = read_rows(self._path, self._offset)
        self._inode = status.st_ino
        return rows


class TrialFolder:
    """Exclusive ownership of one trial's folder; a context manager that holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: IO[str] | None = None
        self._lock: IO[str] | None = None

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def outcome_path(self) -> Path:
        return self.path / "outcome.json"

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoint"

    def __enter__(self) -> TrialFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w", encoding="utf-8")
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._lock.close()
                    raise TimeoutError(
                        f"{self.path} has been owned by another process for {LOCK_WAIT_SECONDS:.0f} s"
                    ) from None
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, config: dict[str, Any], *, after_step: int) -> None:
        """Opens the record of an attempt that starts behind `after_step`."""
        write_json(self.path / "config.json", config)
        self.outcome_path.unlink(missing_ok=True)
        kept: list[dict[str, Any]] = []
        if self.metrics_path.exists():
            kept = [row for row in read_rows(self.metrics_path)[0] if row["step"] <= after_step]
        partial = self.metrics_path.with_name("metrics.jsonl.partial")
        partial.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        partial.replace(self.metrics_path)
        self._metrics = self.metrics_path.open("a", encoding="utf-8")

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows and flushes them to the operating system."""
        assert self._metrics is not None, "begin() opens the record"
        self._metrics.write("".join(_line(row) for row in rows))
        self._metrics.flush()

    def finish(self, outcome: Outcome) -> None:
        write_json(self.outcome_path, outcome.to_dict())


def _line(row: dict[str, Any]) -> str:
    return json.dumps(to_plain(row), separators=(",", ":"), allow_nan=False) + "\n"
