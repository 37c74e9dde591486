"""Every cell with its trials and the command that trains it again: what the numbers of a report lead to.

A cell's command runs a sweep of one configuration (see `record.best`), written beside the report, whose trials
are the cell's own: the same configurations, hence the same ids on the same data and, on the same machine, the same
losses. Where that is not so, the reason stands in the command's place.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from altgrad import NUMERICS_VERSION
from altgrad.analysis.cells import Cell
from altgrad.analysis.records import ending_of
from altgrad.analysis.sections import Captioned, Group, Material, Section
from altgrad.analysis.tables import DASH, Table, number
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record.best import sweep_of_one, write
from altgrad.sweep.space.populations import PREFIX
from altgrad.training.config import TrainConfig

Trial = Mapping[Hashable, Any]
INTRO = (
    "The trials of every cell, at all settings that were run; a number in the tables above comes from those of the "
    "setting shown there. The command trains that setting again, under all its seeds from the first to the last, with "
    "its references: on the same data, versions and machine it gives the same losses, bit for bit. A relative path in "
    "it starts where the sweep was started; for another setting, change its values in the file."
)


def cells_and_trials(material: Material) -> Section:
    """Each cell's trials and command; writes the commands' sweeps to cells/."""
    trials = {trial["trial_id"]: trial for trial in material.trials.to_dict("records")}
    exchanged = {item[0] for item in material.mutations}
    folder = material.out_dir / "trials"
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    address = os.path.relpath(folder, material.folder)
    shown = []
    for cell in material.study.cells:
        ids = [name for item in cell.tried or (cell,) for name in item.trial_ids]
        own = [trials[name] for name in ids]
        command, reason = _command(material, cell, [trials[name] for name in cell.trial_ids], exchanged)
        links = [f"{address}/{name}/" if name in present else "" for name in ids]
        heading = " · ".join(cell.key)
        shown.append(Captioned(_table(cell, own, links), reason, heading, f"cell-{cell.name}", command))
    return Section("", Group.CELLS, INTRO, shown)


def _table(cell: Cell, trials: Sequence[Trial], links: Sequence[str]) -> Table:
    several = cell.settings > 1
    lines = [
        (
            trial["trial_id"],
            *((number(trial["lr"], "g"),) if several else ()),
            str(trial["seed"]),
            ending_of(trial) + (f" by {trial['signal']} at {trial['step']:.0f}" if trial["signal"] else ""),
            number(trial["val_loss"], ".6g", missing=DASH),
        )
        for trial in trials
    ]
    columns = ("trial", *(("lr",) if several else ()), "seed", "outcome", "loss")
    numeric = frozenset(range(1, len(columns))) - {columns.index("outcome")}
    return Table(columns, lines, numeric, links=links)


def _command(material: Material, cell: Cell, trials: Sequence[Trial], exchanged: Collection[str]) -> tuple[str, str]:
    """The command that trains the cell's setting again, or '' and why there is none."""
    reason = _obstacle(trials, exchanged)
    if reason:
        return "", f"No command trains this again: {reason}."
    config = TrainConfig.model_validate_json(trials[0]["config"])
    try:
        spec = sweep_of_one(config, [trial["seed"] for trial in trials], cell.name)
        if config not in spec.expand():
            raise SpecError("the sweep of its values trains other trials")
    except ValueError as error:
        return "", f"No command trains this again: {error}."
    path = material.folder / "cells" / f"{cell.name}.yaml"
    write(spec, path)
    return shlex.join(["altgrad", "run", str(path), "--out", f"again/{cell.name}"]), ""


def _obstacle(trials: Sequence[Trial], exchanged: Collection[str]) -> str:
    names = [trial["trial_id"] for trial in trials]
    if took_over := next((name for name in names if name in exchanged), None):
        return f"{took_over} took over weights and values from others (population-based training)"
    if member := next((name for name in names if name.startswith(PREFIX)), None):
        return f"{member} was a member of a population, whose values depend on the others"
    if any(trial["numerics"] != NUMERICS_VERSION for trial in trials):
        return "its trials were computed by an older version of the numerics"
    return ""
