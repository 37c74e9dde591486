"""The report of a sweep folder: one HTML file that needs nothing else, the same as Markdown, and the numbers
as CSV.

The report is of the sweep that the folder ran last, whose trials `sweep.json` names; what earlier sweeps left
in the folder is counted, listed in the CSV, and not mixed in. Everything is recomputed from the ledger each
time, so a report can be written while the sweep still runs; it then says how many trials are missing. The HTML
holds its pictures, runs no script and loads nothing from anywhere.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from altgrad.analysis import comparison_sections, pictures
from altgrad.analysis.contents import SECTIONS
from altgrad.analysis.finding import Finding, find
from altgrad.analysis.frames import results_table
from altgrad.analysis.records import UNRESOLVED, Records, mutations, unevaluated
from altgrad.analysis.rendering import write_pages
from altgrad.analysis.sections import Material, Section
from altgrad.analysis.study import Study
from altgrad.analysis.sweeps import Sweep, read_sweep
from altgrad.sweep.engine.processes import nobodys_main
from altgrad.sweep.record.folder import cores
from altgrad.sweep.record.layout import LEDGER
from altgrad.training.outcome import OutcomeKind

ELSEWHERE = frozenset(
    (pictures.heat_map, pictures.loss_curves, comparison_sections.learning_rates, comparison_sections.speed_and_memory)
)
"""Half of the drawing; the other half is made at the same time."""
LARGE = 8 << 20
"""Bytes of a ledger from which a second process is worth its start of three seconds."""
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
    folder = out_dir / "report" if to is None else to
    asked = (Path(out_dir), trial_ids, margin, equal_within, folder)
    shutil.rmtree(folder / "settings", ignore_errors=True)
    with _drawn_elsewhere(asked) as elsewhere:
        sweep, materials = _materials(*asked)
        own = [[build(material) for build in SECTIONS if build not in ELSEWHERE] for material in materials]
        theirs = elsewhere()
    for material, ours, others in zip(materials, own, theirs, strict=True):
        _write(material, iter(ours), iter(others))
    results_table(sweep.recorded.trials, sweep.axes).to_csv(folder / "results.csv", index=False)
    return materials[0].finding


def _materials(
    out_dir: Path, trial_ids: Sequence[str] | None, margin: float | None, equal_within: float | None, folder: Path
) -> tuple[Sweep, list[Material]]:
    """The sweep, and what the report of each of its settings is made from."""
    sweep = read_sweep(out_dir, trial_ids)
    settings = sweep.settings
    labels = list(settings)[:MOST_SETTINGS]
    folders = {label: folder / "settings" / str(place) if place else folder for place, label in enumerate(labels)}
    exchanged = mutations(out_dir, list(sweep.selected.trials["trial_id"]))
    materials = []
    for label, records in ((label, settings[label]) for label in labels):
        study = sweep.study(records, margin, equal_within)
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
        materials.append(material)
    return sweep, materials


@contextlib.contextmanager
def _drawn_elsewhere(asked: tuple[Any, ...]) -> Iterator[Callable[[], list[list[Section]]]]:
    """What gives the sections of ELSEWHERE by setting: of a large sweep a second process has made them meanwhile."""
    ledger = asked[0] / LEDGER
    if cores() < 2 or not ledger.is_file() or ledger.stat().st_size < LARGE:
        yield lambda: _sections_elsewhere(*asked)
        return
    with nobodys_main(), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.submit(_sections_elsewhere, *asked).result


def _sections_elsewhere(*asked: Any) -> list[list[Section]]:
    return [[build(material) for build in SECTIONS if build in ELSEWHERE] for material in _materials(*asked)[1]]


def _write(material: Material, own: Iterator[Section], theirs: Iterator[Section]) -> None:
    """Writes the report of one setting from its sections, and removes what an earlier one left."""
    sections = [next(theirs if build in ELSEWHERE else own) for build in SECTIONS]
    (material.folder / "figures").mkdir(parents=True, exist_ok=True)
    shown = {picture.path.stem for section in sections for picture in section.pictures}
    named = {f"{cell.name}.yaml" for cell in material.study.cells}
    for path in (*material.folder.glob("figures/*.[ps][nv]g"), *material.folder.glob("cells/*.yaml")):
        if path.stem not in shown and path.name not in named:
            path.unlink()
    write_pages(material.folder, material.name, sections)


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
