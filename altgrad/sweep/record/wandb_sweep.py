"""A sweep's folder made of its W&B runs, for all that reads such folders: ledger, records and `sweep.json`.

Runs hold what the records hold, but for most signals of layers between checkpoints. Each says which sweep it was part
of as `sweep.json` said then; what the latest of them says is the sweep that is made, with the trials that it had still
to run. Runs of earlier versions do not say it: their sweep has the name of their group, all the group's trials in the
order in which they began, and the default margin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from altgrad import NUMERICS_VERSION
from altgrad.sweep.complaints import SpecError, headline, nearest
from altgrad.sweep.record import layout
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.ledger_schema import TRIAL_FIELDS, trial_values
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.record.shards import TABLES
from altgrad.sweep.record.transfer import write_record
from altgrad.sweep.record.wandb_names import (
    DATA,
    MANIFEST,
    MUTATIONS,
    PLACE,
    SIGNS,
    STEP,
    Signals,
    config_of,
    outcome_of,
)
from altgrad.sweep.record.wandb_runs import Runs, WandbRun
from altgrad.sweep.space.sampling import search_id
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import TrainConfig
from altgrad.training.record import write_json

NAMED = 5
"""Of many names so many are told."""


@dataclass(frozen=True)
class _Trial:
    """What a run says of its trial beside its record; `manifest` is empty in runs of earlier versions."""

    id: str
    config: TrainConfig
    data_sha256: str
    manifest: Mapping[str, Any]
    place: int
    created: float
    mutations: list[list[Any]]
    signs: str | None
    has_ended: bool


def sweep_from(runs: Runs, group: str | None, out: Path) -> list[str]:
    """Makes the sweep `group` in the new folder `out`; returns what is to be said of it, a line each.

    SpecError where there are no trials, no such group, or several and none is named.
    """
    group = _chosen(runs, group)
    trials, notes = _taken(runs, group, out)
    notes = [*runs.notes, *notes]
    if runs.others:
        notes.append(f"{runs.others} runs of other programs are left out")
    if not trials:
        raise SpecError(f"--wandb: {runs.name}: no run of {group!r} can be read: {'; '.join(notes)}")
    manifest, asked = _last_sweep(trials, group, notes)
    with Ledger(out / layout.LEDGER) as ledger:
        ledger.restore("trials", _entries(trials, asked), TRIAL_FIELDS)
        exchanged = [(trial.id, *mutation) for trial in trials for mutation in trial.mutations]
        ledger.restore("mutations", exchanged, TABLES["mutations"])
        Recorder(ledger, out / "trials").ingest([trial.id for trial in trials])
        for trial in trials:
            if trial.signs is not None:  # from every check; of layers W&B holds fewer
                ledger.record_signs(trial.id, trial.signs)
    write_json(out / layout.MANIFEST, {**manifest, "wandb": runs.name, "trials": list(asked)})
    if left := [trial.id for trial in trials if not trial.has_ended]:
        notes.append(f"{len(left)} runs have not ended, and their trials count as unfinished: {_some(left)}")
    return notes


def _chosen(runs: Runs, group: str | None) -> str:
    groups = runs.groups()
    if not groups:
        others = f" ({runs.others} of other programs)" if runs.others else ""
        raise SpecError("; ".join([f"--wandb: {runs.name} holds no runs of AltGrad{others}", *runs.notes]))
    listed = ", ".join(f"{name} ({count} runs)" for name, count in sorted(groups.items()))
    if group is None and len(groups) > 1:
        raise SpecError(f"--wandb: {runs.name} holds several sweeps; --group NAME chooses one: {listed}")
    if group is not None and group not in groups:
        raise SpecError(f"--group: {group!r} is no sweep in {runs.name}; there are {listed}{nearest(group, groups)}")
    return next(iter(groups)) if group is None else group


def _taken(runs: Runs, group: str, out: Path) -> tuple[list[_Trial], list[str]]:
    """The group's trials, their records written to `out`; and what could not be read."""
    signals, trials, notes = Signals(), [], []
    for run in runs.runs(group):
        try:
            outcome = outcome_of(run.summary)
            trial = _trial(run, has_ended=outcome is not None)
        except (ValueError, KeyError) as error:
            notes.append(f"run {run.id} is left out, as this AltGrad can't read it: {headline(error)}")
            continue
        rows = [signals.row(metrics) for metrics in run.metrics if metrics.get(STEP) is not None]
        heading = json.dumps({"data_sha256": trial.data_sha256})
        write_record(out / "trials" / run.id, trial.config.model_dump_json(), heading, rows, outcome)
        trials.append(trial)
    if signals.unknown:
        notes.append(
            f"{len(signals.unknown)} metrics are left out, as this AltGrad does not know them: "
            f"{_some(sorted(signals.unknown))}"
        )
    return trials, notes


def _trial(run: WandbRun, *, has_ended: bool) -> _Trial:
    """ValueError or KeyError where the run does not say what a trial is."""
    values = config_of({name: value for name, value in run.config.items() if name != DATA})
    own = {name: value for name, value in values.items() if name in TrainConfig.model_fields}
    manifest = json.loads(run.config.get(MANIFEST) or "{}")
    started = manifest.get("started")
    return _Trial(
        run.id,
        TrainConfig.model_validate(own),
        run.config[DATA],
        manifest,
        run.config.get(PLACE) or 0,
        datetime.strptime(started, "%Y-%m-%dT%H:%M:%S%z").timestamp() if started else run.started,
        json.loads(run.summary.get(MUTATIONS) or "[]"),
        run.summary.get(SIGNS),
        has_ended,
    )


def _last_sweep(trials: list[_Trial], group: str, notes: list[str]) -> tuple[Mapping[str, Any], dict[str, TrainConfig]]:
    """What `sweep.json` said of the sweep last, and the trials that were asked for then, in their order.

    Where the runs, or this version, can't tell these, they are all that there are, and the notes say why.
    """
    ordered = sorted(trials, key=lambda trial: (trial.place, trial.created, trial.id))
    every = {trial.id: trial.config for trial in ordered}
    newest = max(trials, key=lambda trial: (bool(trial.manifest), trial.created))
    if "spec" not in newest.manifest:
        notes.append(
            "the runs do not say their sweep's settings, as an earlier AltGrad made them: defaults are taken, and "
            "signs of failure are those at checkpoints"
        )
        return {"spec": {"name": group}, **newest.manifest}, every
    try:
        spec = SweepSpec.model_validate(newest.manifest["spec"])
        where = {name: getattr(newest.config.data, name) for name in ("source", "revision")}
        spec = spec.with_data(**where)
        asked = spec.trials(newest.data_sha256)
        if spec.search == "optuna":
            asked |= {trial.id: trial.config for trial in ordered if _is_of_search(trial, spec)}
        if asked.keys() & every.keys():
            return newest.manifest, asked
        reason = "none of these runs has the id of a trial of theirs, as another version of the numerics gives others"
    except ValueError as error:
        reason = headline(error)
    notes.append(f"the sweep's settings do not tell its trials here ({reason}): all runs of the sweep's name are taken")
    return newest.manifest, every


def _is_of_search(trial: _Trial, spec: SweepSpec) -> bool:
    """Whether the search chose the trial, in the runs of a driver before too."""
    own = trial.manifest.get("spec")
    return own is not None and search_id(SweepSpec.model_validate(own)) == search_id(spec)


def _entries(trials: list[_Trial], asked: Mapping[str, TrainConfig]) -> list[tuple[Any, ...]]:
    """The ledger's entries of these trials, and of those that were asked for and have no run yet."""
    newest = max(trials, key=lambda trial: trial.created)
    known = {trial.id: trial for trial in trials}
    entries = [
        trial_values(
            trial.id,
            asked.get(trial.id, trial.config),
            trial.data_sha256,
            created=trial.created,
            numerics=trial.manifest.get("numerics"),
        )
        for trial in trials
    ]
    return entries + [
        trial_values(name, config, newest.data_sha256, created=newest.created, numerics=NUMERICS_VERSION)
        for name, config in asked.items()
        if name not in known
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
