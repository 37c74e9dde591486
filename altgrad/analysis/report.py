"""The report of a sweep folder: one HTML file that needs nothing else, the same as Markdown, and the numbers
as CSV.

Everything is recomputed from the ledger each time, so a report can be written while the sweep still runs; it
then says how many trials are missing. The HTML holds its pictures, runs no script and loads nothing from
anywhere.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from altgrad.analysis import figures
from altgrad.analysis.cells import ALPHA, MARGIN, Cell, Comparison, Study, build_study
from altgrad.analysis.finding import Finding, find, stop_text
from altgrad.analysis.load import FAILED, UNRESOLVED, Records, load, newest_setting, results_table
from altgrad.analysis.stats import p_floor, signed

DASH = "–"


@dataclass(frozen=True)
class Picture:
    """A picture's file, title and the sentence that says how to read it; `path` is None where there is nothing to draw."""

    title: str
    caption: str
    nothing: str
    path: Path | None

    @property
    def data(self) -> str:
        """The file as base64, for a data URL."""
        assert self.path is not None
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Table:
    """A table of texts with a heading per column; `numeric` are the columns to align right."""

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()


def write_report(out_dir: Path) -> Finding:
    """Writes report/ into the sweep's folder and returns its finding.

    FileNotFoundError where the folder has no ledger; ValueError where the ledger holds no trial.
    """
    out_dir = Path(out_dir)
    recorded = load(out_dir)
    if recorded.trials.empty:
        raise ValueError(f"{out_dir / 'ledger.sqlite'} holds no trials")
    records = newest_setting(recorded)
    study = build_study(records.trials)
    results = int((records.trials["state"] != UNRESOLVED).sum())
    folder = out_dir / "report"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    finding = replace(find(study, results, len(records.trials)), path=folder / "report.html")
    results_table(recorded.trials).to_csv(folder / "results.csv", index=False, na_rep="nan")
    context = _context(out_dir, records, study, finding, _pictures(records, study, folder / "figures"))
    environment = Environment(loader=PackageLoader("altgrad.analysis", "templates"), undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True,
                              autoescape=lambda name: name is not None and name.startswith("report.html"))
    for name in ("report.html", "report.md"):
        (folder / name).write_text(environment.get_template(f"{name}.jinja").render(context), encoding="utf-8")
    return finding


def _context(out_dir: Path, records: Records, study: Study, finding: Finding,
             pictures: Sequence[Picture]) -> dict[str, Any]:
    trials = records.trials
    manifest_path = out_dir / "sweep.json"
    manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.is_file() else None
    seeds = max((cell.n for cell in study.cells), default=0)
    return {
        "name": _sweep_name(manifest, out_dir), "finding": finding, "pictures": pictures, "margin": f"{MARGIN:.0%}",
        "cells": _cells_table(study), "geometry": _geometry_table(study), "stops": _stops_table(trials),
        "learning_rates": _choices_table(trials) if any(cell.choices > 1 for cell in study.cells) else None,
        "counts": trials["outcome"].value_counts().to_dict(), "outside": records.outside, "seeds": seeds,
        "p_floor": f"{p_floor(seeds):.2g}" if seeds else DASH, "alpha": ALPHA, "correction": study.correction,
        "geometry_correction": study.geometry_correction, "hours": trials["seconds"].sum() / 3600,
        "provenance": None if manifest is None else _flat(manifest),
    }


def _sweep_name(manifest: Mapping[str, Any] | None, out_dir: Path) -> str:
    spec = (manifest or {}).get("spec", manifest or {})
    return str(spec.get("name") or out_dir.resolve().name)


def _pictures(records: Records, study: Study, folder: Path) -> list[Picture]:
    for stale in folder.glob("*.png"):
        stale.unlink()
    policies = list(dict.fromkeys(cell.policy for cell in study.cells))
    pictures = []
    for policy in policies:
        own = records.trials[records.trials["trial_id"].isin(_chosen_ids(records.trials, study, policy))]
        suffix = "" if len(policies) == 1 else f"_{policy}"
        title = "" if len(policies) == 1 else f", policy {policy}"
        pictures += _policy_pictures(own, records.rows, study, policy, folder, suffix, title)
    return pictures


def _chosen_ids(trials: pd.DataFrame, study: Study, policy: str) -> set[str]:
    """The trials of the policy's cells at their chosen parameters, and the reference's."""
    cells = [cell for cell in study.cells if cell.policy == policy or cell is study.reference]
    return {trial_id for cell in cells for trial_id in cell.trial_ids if trial_id in set(trials["trial_id"])}


def _policy_pictures(trials: pd.DataFrame, rows: pd.DataFrame, study: Study, policy: str, folder: Path,
                     suffix: str, title: str) -> list[Picture]:
    def drawn(name: str, draw: Callable[[Path], bool]) -> Path | None:
        path = folder / f"{name}{suffix}.png"
        return path if draw(path) else None

    return [
        Picture(f"Distance from BF16{title}",
                "Final validation loss minus BF16 AdamW's at the same seed, mean and half the 95 % interval. Purple is "
                "lower than BF16, orange higher; hatched cells had runs stopped and have no mean.",
                "There is no BF16 AdamW reference to measure from.",
                drawn("heat_map", lambda path: figures.heat_map(study, policy, path))),
        Picture(f"Loss by format{title}",
                "One panel per arm. Bands span the seeds; the dashed line is BF16 AdamW; a cross is where a guard "
                "stopped a run. The axis is cut to where runs differ.",
                "No training loss is recorded yet.",
                drawn("loss_curves", lambda path: figures.loss_curves(trials, rows, path))),
        Picture(f"Distance from BF16 while training{title}",
                "Training loss minus BF16 AdamW's at the same step and seed (the dashed line at zero). The batches are "
                "the same, so their noise cancels. Linear within ±0.02 nats, logarithmic beyond.",
                "There is no BF16 AdamW run with the same seed to measure from.",
                drawn("excess_curves", lambda path: figures.excess_curves(trials, rows, path))),
        Picture(f"Stops by reason{title}", "Runs that a guard ended, by the signal that ended them.",
                "No run was stopped by a guard.",
                drawn("stop_reasons", lambda path: figures.stop_reasons(trials, path))),
        Picture(f"Flip yield{title}",
                "Code changes that happened over code changes expected of the steps taken. Near 1 the steps reach the "
                "weights; near 0 rounding swallows them.",
                "No flip yield is recorded: nothing was quantized.",
                drawn("flip_yield", lambda path: figures.flip_yields(trials, rows, path))),
    ]


def _cells_table(study: Study) -> Table:
    columns = ("format", "arm", "policy", "lr", "rung clip", "seeds", "loss, nats", "minus BF16, nats", "p", "p adj.",
               "verdict", "flip yield", "stall ratio", "outcomes")
    lines = []
    for cell in study.cells:
        comparison, judgement = study.comparison(cell), study.judgement(cell)
        verdict = judgement.verdict + ("" if judgement.decided or judgement.verdict in ("no result", "no reference")
                                       else " (not decided)")
        lines.append((cell.format, cell.arm, cell.policy, number(cell.lr, "g"), number(cell.rung_clip, "g"),
                      str(cell.n), _loss_text(cell), *_difference_texts(comparison),
                      "reference" if cell is study.reference else verdict,
                      number(cell.signals["flip_yield"], ".2f"), number(cell.signals["stall_ratio"], ".2f"),
                      _outcomes_text(cell.outcomes)))
    return _slim(Table(columns, lines, frozenset({3, 4, 5, 6, 7, 8, 9, 11, 12})), ("policy", "rung clip"))


def _geometry_table(study: Study) -> Table:
    columns = ("format", "policy", "arm", "against", "pairs", "difference, nats", "p", "p adj.", "reading")
    lines = [(item.cell.format, item.cell.policy, item.cell.arm, item.other.arm,
              str(item.paired.n if item.paired else 0), *_difference_texts(item), _reading(item))
             for item in study.geometry]
    return _slim(Table(columns, lines, frozenset({4, 5, 6, 7})), ("policy",))


def _stops_table(trials: pd.DataFrame) -> Table:
    columns = ("trial", "format", "arm", "policy", "lr", "seed", "outcome", "signal", "layer", "step", "value", "limit",
               "message")
    failed = trials[trials["state"] == FAILED]
    lines = [(row["trial_id"], row["format"], row["optimizer"], row["policy"], number(row["lr"], "g"), str(row["seed"]),
              row["outcome"], row["signal"] or "val_loss", row["layer"] or DASH, number(row["step"], ".0f"),
              number(row["value"], ".4g", missing="not finite"), number(row["limit"], "g"), row["message"])
             for _, row in failed.iterrows()]
    return _slim(Table(columns, lines, frozenset({4, 5, 9, 10, 11})), ("policy", "lr"))


def _choices_table(trials: pd.DataFrame) -> Table:
    """Mean loss of every learning rate and rung clip that was run; a stopped seed shows as such."""
    lines = []
    for (name, arm, policy, _), group in trials.groupby(["format", "optimizer", "policy", "options"], sort=False):
        first, stopped = group.iloc[0], int((group["state"] == FAILED).sum())
        finished = group[group["state"] == "finished"]["val_loss"]
        loss = f"{stopped} of {len(group)} stopped" if stopped else number(finished.mean(), ".3f")
        lines.append((str(name), str(arm), str(policy), number(first["lr"], "g"), number(first["rung_clip"], "g"),
                      str(len(finished)), loss))
    return Table(("format", "arm", "policy", "lr", "rung clip", "finished", "loss, nats"), lines,
                 frozenset({3, 4, 5, 6}))


def _slim(table: Table, names: Sequence[str]) -> Table:
    """The table without those of the named columns that hold one value throughout."""
    kept = [index for index, name in enumerate(table.columns)
            if name not in names or len({line[index] for line in table.lines}) > 1]
    return Table([table.columns[index] for index in kept], [[line[index] for index in kept] for line in table.lines],
                 frozenset(place for place, index in enumerate(kept) if index in table.numeric))


def number(value: float, form: str, missing: str = DASH) -> str:
    """The number in the given form; `missing` for NaN, ∞ for infinity."""
    if math.isnan(value):
        return missing
    return format(value, form).replace("-", "−") if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def _loss_text(cell: Cell) -> str:
    if cell.stops:
        return f"failed {len(cell.stops)} of {cell.n}"
    low, high = cell.interval
    return number(cell.mean, ".3f") + ("" if math.isnan(low) else f" ± {(high - low) / 2:.3f}")


def _difference_texts(item: Comparison | None) -> tuple[str, str, str]:
    if item is None or item.paired is None:
        return DASH, DASH, DASH
    pair = item.paired
    spread = "" if pair.n < 2 else f" [{signed(pair.low)}, {signed(pair.high)}]"
    return signed(pair.mean) + spread, f"{pair.p:.3g}", f"{item.p_adjusted:.3g}"


def _reading(item: Comparison) -> str:
    if item.kind == "rescued":
        text = f"{item.other.arm} is stopped ({stop_text(item.other)}), {item.cell.arm} finishes"
    elif item.kind == "lost":
        text = f"{item.cell.arm} is stopped ({stop_text(item.cell)}), {item.other.arm} finishes"
    elif item.kind == "stopped":
        return (f"stopped: {item.cell.arm} {len(item.cell.stops)} of {item.cell.n}, "
                f"{item.other.arm} {len(item.other.stops)} of {item.other.n}")
    elif item.paired is None:
        return "no result"
    else:
        text = "gain" if item.paired.mean < 0 else "loss" if item.paired.mean > 0 else "no difference"
    return text if item.decided else f"{text}, not decided"


def _outcomes_text(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested value as dotted names and texts."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [(prefix, json.dumps(item)) for item in value]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
