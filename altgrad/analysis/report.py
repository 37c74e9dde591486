"""The report of a sweep folder: one HTML file that needs nothing else, the same as Markdown, and the numbers
as CSV.

The report is of the sweep that the folder ran last, whose trials `sweep.json` names; what earlier sweeps left
in the folder is counted, listed in the CSV, and not mixed in. Everything is recomputed from the ledger each
time, so a report can be written while the sweep still runs; it then says how many trials are missing. The HTML
holds its pictures, runs no script and loads nothing from anywhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from altgrad.analysis.contents import SECTIONS
from altgrad.analysis.finding import Finding, find
from altgrad.analysis.frames import results_table
from altgrad.analysis.records import UNRESOLVED, Records, mutations, unevaluated
from altgrad.analysis.rendering import write_pages
from altgrad.analysis.scores import judged
from altgrad.analysis.sections import Material
from altgrad.analysis.study import Study, build_study
from altgrad.analysis.sweeps import read_sweep
from altgrad.training.outcome import OutcomeKind

MOST_SETTINGS = 8
"""A search over settings may have as many as samples; beyond these they stand in results.csv only."""


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
    settings = sweep.settings
    folder = out_dir / "report" if to is None else to
    shutil.rmtree(folder / "settings", ignore_errors=True)
    labels = list(settings)[:MOST_SETTINGS]
    folders = {label: folder / "settings" / str(place) if place else folder for place, label in enumerate(labels)}
    exchanged = mutations(out_dir, list(sweep.selected.trials["trial_id"]))
    margin, equal_within = sweep.margin(margin), sweep.equal_within(equal_within)
    findings = []
    for label, records in ((label, settings[label]) for label in labels):
        study = build_study(judged(records.trials), margin=margin, equal_within=equal_within)
        ours = set(records.trials["trial_id"])
        material = Material(
            out_dir,
            folders[label],
            _sweep_name(sweep.manifest, out_dir),
            sweep.manifest,
            records,
            study,
            _finding(records, study, folders[label] / "report.html"),
            label,
            {name: path / "report.html" for name, path in folders.items() if name != label},
            len(settings) - len(labels),
            [item for item in exchanged if item[0] in ours],
        )
        findings.append(_write(material))
    results_table(sweep.recorded.trials, sweep.axes).to_csv(folder / "results.csv", index=False)
    return findings[0]


def _write(material: Material) -> Finding:
    """Writes the report of one setting."""
    figures, cells = material.folder / "figures", material.folder / "cells"
    figures.mkdir(parents=True, exist_ok=True)
    for stale in (*figures.glob("*.png"), *figures.glob("*.svg"), *cells.glob("*.yaml")):
        stale.unlink()
    write_pages(material.folder, material.name, [build(material) for build in SECTIONS])
    return material.finding


def _finding(records: Records, study: Study, path: Path) -> Finding:
    is_pruned = records.trials["outcome"] == OutcomeKind.PRUNED
    results = int(((records.trials["state"] != UNRESOLVED) | is_pruned).sum())
    finding = find(
        study,
        results,
        len(records.trials),
        unevaluated=unevaluated(records.trials),
        scope=str(records.trials["scope"].iloc[0]),
    )
    return replace(finding, path=path)


def _sweep_name(manifest: Mapping[str, Any] | None, out_dir: Path) -> str:
    spec = (manifest or {}).get("spec", manifest or {})
    return str(spec.get("name") or out_dir.resolve().name)
