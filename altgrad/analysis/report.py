"""The report of a sweep folder: one HTML file that needs nothing else, the same as Markdown, and the numbers
as CSV.

The report is of the sweep that the folder ran last, whose trials `sweep.json` names; what earlier sweeps left
in the folder is counted, listed in the CSV, and not mixed in. Everything is recomputed from the ledger each
time, so a report can be written while the sweep still runs; it then says how many trials are missing. The HTML
holds its pictures, runs no script and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from altgrad import NUMERICS_VERSION
from altgrad.analysis import curves, figures
from altgrad.analysis.finding import Finding, find
from altgrad.analysis.frames import results_table
from altgrad.analysis.reading import GAIN, how_to_read, words
from altgrad.analysis.records import FINISHED, UNRESOLVED, Records, ending_of, mutations, unevaluated
from altgrad.analysis.scores import geometry_scores_table, judged, scores_table
from altgrad.analysis.study import Study, build_study
from altgrad.analysis.sweeps import read_sweep
from altgrad.analysis.tables import (
    cells_table,
    choices_table,
    geometry_table,
    mutations_table,
    shifts_table,
    stops_table,
)
from altgrad.analysis.twins import twin_control
from altgrad.sweep.ledger import outdated_text
from altgrad.training.outcome import OutcomeKind

MOST_SETTINGS = 8
"""A search over settings may have as many as samples; beyond these they stand in results.csv only."""


@dataclass(frozen=True)
class Picture:
    """A picture's title, how to read it, and its file; `nothing` is said where there is none (None)."""

    title: str
    caption: str
    nothing: str
    path: Path | None

    @property
    def data(self) -> str:
        """The file as base64, for a data URL."""
        assert self.path is not None
        return base64.b64encode(self.path.read_bytes()).decode()


def write_report(
    out_dir: Path,
    trial_ids: Sequence[str] | None = None,
    *,
    margin: float | None = None,
    equal_within: float | None = None,
    to: Path | None = None,
) -> Finding:
    """Writes report/ into the sweep's folder, or the folder `to`, and returns its finding.

    `margin` (.1: 10 % above BF16's loss is as good) and `equal_within` (nats) default to those of the sweep's spec.

    It is of the trials named, else of those under `trials` in sweep.json, else (a folder that does not say) of
    all in the ledger that share the newest setting. Where a sweep has several settings, trials compare within one
    only: the report is of the first, and those of the others stand under report/settings/. FileNotFoundError where
    the folder has no ledger; ValueError where the ledger holds none of the trials.
    """
    out_dir = Path(out_dir)
    sweep = read_sweep(out_dir, trial_ids)
    manifest, selected, settings = sweep.manifest, sweep.selected, sweep.settings
    folder = out_dir / "report" if to is None else to
    shutil.rmtree(folder / "settings", ignore_errors=True)
    labels = list(settings)[:MOST_SETTINGS]
    folders = {label: folder / "settings" / str(place) if place else folder for place, label in enumerate(labels)}
    exchanged = mutations(out_dir, list(selected.trials["trial_id"]))
    margin, equal_within = sweep.margin(margin), sweep.equal_within(equal_within)
    findings = []
    for label in labels:
        others = {name: path / "report.html" for name, path in folders.items() if name != label}
        shown = Shown(_sweep_name(manifest, out_dir), manifest, label, others, len(settings) - len(labels), exchanged)
        records = settings[label]
        study = build_study(judged(records.trials), margin=margin, equal_within=equal_within)
        findings.append(_write(folders[label], records, study, shown))
    results_table(sweep.recorded.trials, sweep.axes).to_csv(folder / "results.csv", index=False)
    return findings[0]


@dataclass(frozen=True)
class Shown:
    """What a report says of its sweep: `label` tells this setting from the `others`, whose reports stand elsewhere."""

    name: str
    manifest: Mapping[str, Any] | None
    label: str
    others: Mapping[str, Path]
    unreported: int
    """settings beyond MOST_SETTINGS"""
    mutations: list[tuple[str, int, str, float, float, str]]


def _write(folder: Path, records: Records, study: Study, shown: Shown) -> Finding:
    """Writes the report of one setting."""
    is_pruned = records.trials["outcome"] == OutcomeKind.PRUNED
    results = int(((records.trials["state"] != UNRESOLVED) | is_pruned).sum())
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    finding = find(
        study,
        results,
        len(records.trials),
        unevaluated=unevaluated(records.trials),
        scope=str(records.trials["scope"].iloc[0]),
    )
    finding = replace(finding, path=folder / "report.html")
    context = _context(shown.name, shown.manifest, records, study, finding)
    context |= {"setting": shown.label, "unreported": shown.unreported}
    context["others"] = [(label, os.path.relpath(path, folder)) for label, path in shown.others.items()]
    ours = set(records.trials["trial_id"])
    exchanged = [item for item in shown.mutations if item[0] in ours]
    context["mutations"] = mutations_table(exchanged) if exchanged else None
    context["learning_rates"] = choices_table(study) if any(cell.settings > 1 for cell in study.cells) else None
    context |= {
        "scores": scores_table(records.trials, study),
        "geometry_scores": geometry_scores_table(records.trials, study),
    }
    context["pictures"] = _pictures(records, study, folder / "figures")
    for name in ("report.html", "report.md"):
        (folder / name).write_text(_render(f"{name}.jinja", context), encoding="utf-8")
    return finding


def _render(template: str, context: Mapping[str, Any]) -> str:
    loader = PackageLoader("altgrad.analysis", "templates")
    environment = Environment(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=template.startswith("report.html"),
        finalize=None if template.startswith("report.html") else _inert,
    )
    environment.filters["plain"] = _plain
    return environment.get_template(template).render(context)


def _inert(value: object) -> object:
    """A value in Markdown, where HTML would come to life: whoever reads the report trusts it."""
    return value.replace("&", "&amp;").replace("<", "&lt;") if isinstance(value, str) else value


def _plain(value: object) -> str:
    """A text from outside (a path, a message) in Markdown: one line, no links, pictures or new cells."""
    # Some readers make links of bare addresses too.
    return re.sub(r"(?i)([|`\\]|\](?=[(\[:])|:(?=//)|(?<=www)\.)", r"\\\1", " ".join(str(value).split()))


def _context(
    name: str, manifest: Mapping[str, Any] | None, records: Records, study: Study, finding: Finding
) -> dict[str, Any]:
    trials = records.trials
    return {
        "name": name,
        "finding": finding,
        **words(study),
        "gain": GAIN.format(measure=study.measure),
        "reading": how_to_read(study),
        "outside": _outside_text(records),
        "cells": cells_table(study),
        "geometry": geometry_table(study),
        "stops": stops_table(trials),
        "shifts": shifts_table(trials),
        "counts": dict(Counter(map(ending_of, trials.to_dict("records"))).most_common()),
        "control": twin_control(study.cells),
        "hours": trials["seconds"].sum() / 3600,
        "provenance": None if manifest is None else _flat(manifest),
    }


def _outside_text(records: Records) -> str:
    count, mixed = records.outside, _mixed_devices(records.trials)
    texts = [f"{outdated_text(records.outdated)}."] if records.outdated else []
    if own := int((records.trials["numerics"] != NUMERICS_VERSION).sum()):
        texts.append(f"{own} trials of this sweep were computed by an older numerics version than this installation's.")
    if count:
        who = (
            "1 other trial of earlier sweeps in this folder is"
            if count == 1
            else (f"{count} other trials of earlier sweeps in this folder are")
        )
        texts.append(f"{who} left out; results.csv lists every trial.")
    if mixed:
        texts.append(
            f"Trials of seed {', '.join(map(str, mixed))} ran on different devices (results.csv: device): their paired "
            "differences hold a difference of devices too."
        )
    return " ".join(texts)


def _mixed_devices(trials: pd.DataFrame) -> list[int]:
    """The seeds of which finished trials ran on more than one kind of device."""
    known = trials[(trials["device"] != "") & (trials["state"] == FINISHED)]
    kinds = known.groupby("seed")["device"].nunique()
    return [int(seed) for seed in kinds.index[kinds > 1]]


def _sweep_name(manifest: Mapping[str, Any] | None, out_dir: Path) -> str:
    spec = (manifest or {}).get("spec", manifest or {})
    return str(spec.get("name") or out_dir.resolve().name)


def _pictures(records: Records, study: Study, folder: Path) -> list[Picture]:
    for stale in folder.glob("*.png"):
        stale.unlink()
    policies = list(dict.fromkeys(cell.policy for cell in study.cells))
    pictures = []
    # A curve under a format's name is of that format alone.
    trials = records.trials[records.trials["formats"] == ""]
    for policy in policies:
        own = trials[trials["trial_id"].isin(_chosen_ids(trials, study, policy))]
        suffix = "" if len(policies) == 1 else f"_{policy}"
        title = "" if len(policies) == 1 else f", policy {policy}"
        pictures += _policy_pictures(own, records.rows, study, policy, folder, suffix, title)
    return pictures


def _chosen_ids(trials: pd.DataFrame, study: Study, policy: str) -> set[str]:
    """The trials of the policy's cells at their chosen parameters, and the reference's."""
    cells = [cell for cell in study.cells if cell.policy == policy or cell is study.reference]
    return {trial_id for cell in cells for trial_id in cell.trial_ids} & set(trials["trial_id"])


def _policy_pictures(
    trials: pd.DataFrame, rows: pd.DataFrame, study: Study, policy: str, folder: Path, suffix: str, title: str
) -> list[Picture]:
    def drawn(name: str, draw: Callable[[Path], bool]) -> Path | None:
        path = folder / f"{name}{suffix}.png"
        return path if draw(path) else None

    return [
        Picture(
            f"Distance from BF16{title}",
            "What formats are judged by, minus BF16 AdamW's at the same seed, mean and half the simultaneous interval. "
            "Purple is lower than BF16, orange higher; hatched cells had runs stopped and have no mean.",
            "There is no BF16 AdamW reference to measure from.",
            drawn("heat_map", lambda path: figures.heat_map(study, policy, path)),
        ),
        Picture(
            f"Loss by format{title}",
            "One panel per arm. Bands span the seeds; the dashed line is BF16 AdamW; a cross is where a "
            "guard stopped a run. The axis is cut to where runs differ.",
            "No training loss is recorded yet.",
            drawn("loss_curves", lambda path: curves.loss_curves(trials, rows, path)),
        ),
        Picture(
            f"Distance from BF16 while training{title}",
            "Training loss minus BF16 AdamW's at the same step and seed (the dashed line at zero). The "
            "batches are the same, so their noise cancels. Linear within ±0.02 nats, logarithmic beyond.",
            "There is no BF16 AdamW run with the same seed to measure from.",
            drawn("excess_curves", lambda path: curves.excess_curves(trials, rows, path)),
        ),
        Picture(
            f"Stops by reason{title}",
            "Runs that a guard ended, by the signal that ended them.",
            "No run was stopped by a guard.",
            drawn("stop_reasons", lambda path: figures.stop_reasons(trials, path)),
        ),
        Picture(
            f"Flip yield{title}",
            "Code changes that happened over code changes expected of the steps taken. Near 1 the steps "
            "reach the weights; near 0 rounding swallows them.",
            "No flip yield is recorded: nothing was quantized.",
            drawn("flip_yield", lambda path: curves.flip_yields(trials, rows, path)),
        ),
    ]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested value as dotted names and texts."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [(prefix, json.dumps(item)) for item in value]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
