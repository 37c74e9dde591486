"""The runs of a sweep as W&B holds them: in a folder of its files, or on a server.

`OfflineRuns` and `OnlineRuns` answer the same two questions: which groups of runs (sweeps) there are, and what the runs
of one hold. A run in several folders, as a trial leaves that was interrupted and went on, is one run: of a step, and of
an ending, the later folder's counts. Runs of other programs are counted and left out.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record.wandb_files import Reading
from altgrad.sweep.record.wandb_names import DATA, SUMMARY
from altgrad.training.record import flat

JOB_TYPES = ("reference", "trial")
EXPECTED = "a folder with runs, 'entity/project' or 'project' is expected"
REQUEST_SECONDS = 60
PROJECT = r"[\w-][\w.-]*(/[\w-][\w. -]*)?"
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class WandbRun:
    """One run: its configuration under dotted names, its metrics a mapping per step, its summary; `started` is Unix
    time."""

    id: str
    group: str
    started: float
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    summary: Mapping[str, Any]


class Runs(Protocol):
    """Where runs are: `name` says it, `title` in one word; `others` counts runs of other programs, and `notes` are
    lines for the reader."""

    name: str
    title: str
    others: int
    notes: list[str]

    def groups(self) -> Mapping[str, int]:
        """How many runs each group has."""

    def runs(self, group: str) -> Iterator[WandbRun]:
        """The group's runs, one at a time."""


def runs_in(place: str) -> Runs:
    """The runs in a folder, or where it holds none, of a project on W&B's server; SpecError where there are none."""
    if _files_in(Path(place)):
        return OfflineRuns(Path(place))
    if not re.fullmatch(PROJECT, place):
        raise SpecError(f"--wandb: {_lack(place)}, and it is no project's name; {EXPECTED}")
    return OnlineRuns(place)


def _files_in(folder: Path) -> list[Path]:
    """W&B's files of runs in OUT/wandb, in the OUT around it, or in the folder of one run."""
    runs = ("", "*run-*/", "wandb/*run-*/")
    found = [path for run in runs for path in folder.glob(f"{run}run-*.wandb")]
    return sorted(path for path in found if path.parent.name.startswith(("offline-run-", "run-")))


def _lack(place: str) -> str:
    """Why a path is no place of offline runs."""
    path = Path(place)
    if path.is_dir():
        return f"{place!r} is a folder without runs of W&B (offline-run-20260101_120000-ID/run-ID.wandb)"
    return f"{place!r} is a file" if path.exists() else f"{place!r} is no folder here"


@dataclass(frozen=True)
class _Head:
    """How a file begins: everything but metrics and summary."""

    path: Path
    id: str
    group: str
    started: float
    config: Mapping[str, Any]


class OfflineRuns:
    """The runs in a folder of W&B's files."""

    def __init__(self, folder: Path) -> None:
        whole = folder.resolve()
        self.name, self.others = str(folder), 0
        self.title = whole.parent.name if whole.name == "wandb" else whole.name
        self.notes: list[str] = []
        self._files = _files_in(folder)

    def groups(self) -> Mapping[str, int]:
        return Counter(heads[-1].group for heads in self._heads.values())

    def runs(self, group: str) -> Iterator[WandbRun]:
        for heads in self._heads.values():
            if heads[-1].group == group:
                yield self._run(heads)

    @cached_property
    def _heads(self) -> dict[str, list[_Head]]:
        """The files of each run of ours by its id, by the time at which they begin; runs by the first."""
        found: dict[str, list[_Head]] = {}
        others = set()
        for path in self._files:
            head = self._head(path)
            if head is None:
                continue
            if _is_ours(head.config):
                found.setdefault(head.id, []).append(head)
            else:
                others.add(head.id)
        self.others = len(others)
        for heads in found.values():
            heads.sort(key=lambda head: head.started)
        return dict(sorted(found.items(), key=lambda item: item[1][0].started))

    def _head(self, path: Path) -> _Head | None:
        reading = Reading(path)
        for record in reading.records():
            if record.WhichOneof("record_type") == "run":
                run = record.run
                started = run.start_time.ToNanoseconds() / 1e9
                return _Head(path, run.run_id, run.run_group, started, _values(run.config.update))
        self.notes.append(f"{path} {reading.torn or 'holds no run'}: nothing of it is in the report")
        return None

    def _run(self, heads: list[_Head]) -> WandbRun:
        metrics: dict[int, dict[str, Any]] = {}
        summary: dict[str, Any] = {}
        config = dict(heads[-1].config)
        for head in heads:
            reading = Reading(head.path)
            for record in reading.records():
                kind = record.WhichOneof("record_type")
                if kind == "history":
                    metrics[record.history.step.num] = _values(record.history.item)
                elif kind == "summary":
                    summary |= _values(item for item in record.summary.update if _name(item).startswith(SUMMARY))
                elif kind == "config" and head is heads[-1]:
                    config |= _values(record.config.update)
            if reading.torn is not None:
                self.notes.append(f"{head.path} {reading.torn}: only what is whole in it is in the report")
        rows = [metrics[step] for step in sorted(metrics)]
        return WandbRun(heads[-1].id, heads[-1].group, heads[0].started, config, rows, summary)


def _values(items: Iterable[Any]) -> dict[str, Any]:
    """Items of a record, by their names."""
    return {_name(item): json.loads(item.value_json) for item in items}


def _name(item: Any) -> str:
    name: str = item.key or ".".join(item.nested_key)
    return name


class OnlineRuns:
    """The runs of `project` ("entity/project", or "project" of the own entity), by W&B's public API.

    SpecError where W&B can't be reached, has no credentials or knows no such project.
    """

    def __init__(self, project: str) -> None:
        self.name, self.title, self.others = project, project.rpartition("/")[2], 0
        self.notes: list[str] = []
        self._api = self._asked(_connect)

    def groups(self) -> Mapping[str, int]:
        found = self._asked(lambda: [(run.group, run.job_type) for run in self._api.runs(self.name, per_page=500)])
        ours = [group for group, job_type in found if group and job_type in JOB_TYPES]
        self.others = len(found) - len(ours)
        return Counter(ours)

    def runs(self, group: str) -> Iterator[WandbRun]:
        found = self._asked(lambda: list(self._api.runs(self.name, filters={"group": group}, lazy=False)))
        for run in found:
            if run.job_type not in JOB_TYPES:  # counted with the groups
                continue
            config = flat(run.config)
            if _is_ours(config):
                metrics = self._asked(partial(_history, run))
                started = datetime.fromisoformat(run.created_at).timestamp()
                yield WandbRun(run.id, group, started, config, metrics, run.summary_metrics)
            else:
                self.others += 1

    def _asked(self, question: Callable[[], Answer]) -> Answer:
        """What W&B answers; whatever it raises is one line here."""
        try:
            return question()
        except SpecError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise SpecError(
                f"--wandb: {_lack(self.name)}, and as a project W&B does not give it ({type(error).__name__}: {said}); "
                f"{EXPECTED}"
            ) from None


def _history(run: Any) -> list[dict[str, Any]]:
    return list(run.scan_history(use_cache=False))


def _connect() -> Any:
    import wandb

    if not os.environ.get("WANDB_API_KEY") and not wandb.login(prompt=False):
        raise PermissionError("neither WANDB_API_KEY nor a `wandb login`")
    return wandb.Api(timeout=REQUEST_SECONDS)


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a trial's run has this configuration."""
    return {DATA, "format", "optimizer.kind"} <= config.keys()
