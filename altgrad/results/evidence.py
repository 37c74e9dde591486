"""What the study's sweeps left: the export of each, and those of one setting put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from altgrad.analysis.frames import Frames
from altgrad.analysis.grids import SettledRates
from altgrad.analysis.records import PENDING
from altgrad.analysis.scores import judged
from altgrad.analysis.study import Study, build_study
from altgrad.analysis.sweeps import Sweep, read_sweep
from altgrad.sweep.record.layout import shards
from altgrad.training.outcome import RESULT_KINDS

SWEEPS = ("rates", "main", "long", "twins", "original", "wider", "layers", "law", "classify", "large", "unguarded")
"""In the order in which the plan names them."""


@dataclass(frozen=True)
class Evidence:
    """One sweep's export: `study` is of its one setting."""

    name: str
    folder: Path
    sweep: Sweep

    @property
    def trials(self) -> pd.DataFrame:
        """A row per trial of the sweep."""
        return self.sweep.selected.trials

    @property
    def rows(self) -> pd.DataFrame:
        """A row per trial and step, with signals at checks."""
        return self.sweep.selected.rows

    @cached_property
    def study(self) -> Study:
        return self.study_at(None)

    def study_at(self, margin: float | None) -> Study:
        """The study with another margin of what trains, .02 for 2 %; None: the sweep's."""
        return self.sweep.study(self.sweep.selected, margin, None)

    @property
    def results(self) -> int:
        """Trials with a result."""
        return int(self.trials["outcome"].isin(list(RESULT_KINDS)).sum())

    @property
    def is_whole(self) -> bool:
        return self.results == len(self.trials)

    @property
    def outcomes(self) -> dict[str, int]:
        """How many trials ended how, the commonest first."""
        return {str(kind): int(count) for kind, count in self.trials["outcome"].value_counts().items()}

    @cached_property
    def repeated_steps(self) -> int:
        """Steps of trials with a result that were recorded twice or not at all."""
        rows = self.rows[self.rows["trial_id"].isin(self.trials["trial_id"])]
        results = self.trials[self.trials["outcome"].isin(list(RESULT_KINDS))]
        ended = results.set_index("trial_id")["step"].astype(int)
        counts = rows[rows["trial_id"].isin(ended.index)].groupby("trial_id")["step"].agg(["size", "nunique", "max"])
        counts = counts.reindex(ended.index, fill_value=0)
        wrong = (counts["size"] != ended) | (counts["nunique"] != ended) | (counts["max"] != ended)
        return int(wrong.sum())

    @property
    def cpu_hours(self) -> float:
        """Of all trials, each of which has one core."""
        return float(self.trials["seconds"].sum()) / 3600

    @cached_property
    def wall_hours(self) -> float:
        """Of the drivers."""
        return float(Frames(self.folder).spend["hours"].sum())

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(self.sweep.manifest or {})

    @property
    def commits(self) -> list[str]:
        """Of the driver of each shard, in order; '+' where its working tree had changes."""
        found: dict[str, None] = {}
        for shard in shards(self.folder):
            if (path := shard / "sweep.json").exists():
                git = json.loads(path.read_text(encoding="utf-8")).get("git") or {}
                if git.get("sha"):
                    found[f"{git['sha'][:10]}{'+' if git.get('dirty') else ''}"] = None
        return list(found)

    @property
    def settled(self) -> SettledRates:
        return self.sweep.settled_lrs


def load(root: Path) -> dict[str, Evidence]:
    """The exports in `root` by name, in the order of SWEEPS; what has not been run is not there."""
    found = {}
    for name in SWEEPS:
        if (folder := root / name).is_dir() and shards(folder):
            sweep = read_sweep(folder)
            if len(sweep.settings) > 1:
                raise ValueError(f"{folder} has {len(sweep.settings)} settings; a sweep of the study has one")
            if (sweep.selected.trials["outcome"] != PENDING).any():
                found[name] = Evidence(name, folder, sweep)
    return found


def together(parts: Sequence[Evidence]) -> Study:
    """The study of several sweeps of one setting, each trial once."""
    trials = pd.concat([part.trials for part in parts], ignore_index=True).drop_duplicates("trial_id")
    if trials["setting"].nunique() > 1:
        raise ValueError(f"{', '.join(part.name for part in parts)} do not share one setting")
    settled: dict[str, dict[str, dict[str, float]]] = {}
    for part in parts:
        for format, arms in part.settled.items():
            for arm, own in arms.items():
                settled.setdefault(format, {}).setdefault(arm, {}).update(own)
    sweep = parts[0].sweep
    return build_study(
        judged(trials), margin=sweep.margin(None), equal_within=sweep.equal_within(None), settled=settled
    )
