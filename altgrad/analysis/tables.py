"""The tables of a report, as texts: every cell, geometry against plain steps, stops, learning rates."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from altgrad.analysis.cells import UNITS, Cell, Comparison, Study, mean_of_known
from altgrad.analysis.finding import stop_text
from altgrad.analysis.load import FAILED, FINISHED
from altgrad.analysis.stats import signed

DASH = "–"


@dataclass(frozen=True)
class Table:
    """A table of texts with a heading per column; `numeric` are the columns to align right."""

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()


def cells_table(study: Study) -> Table:
    """Every cell: its loss, its distance from BF16 and the verdict on it."""
    columns = (
        "format",
        "arm",
        "policy",
        "lr",
        "rung clip",
        "seeds",
        _measure(study),
        f"minus BF16, {study.unit}",
        "p",
        "p adj.",
        "verdict",
        "flip yield",
        "stall ratio",
        "outcomes",
    )
    lines = []
    for cell in study.cells:
        comparison, judgement = study.comparison(cell), study.judgement(cell)
        open_ = not judgement.decided and judgement.verdict in ("trains", "fails", "unclear")
        verdict = judgement.verdict + (" (not decided)" if open_ else "")
        lines.append(
            (
                cell.format,
                cell.arm,
                cell.policy,
                number(cell.lr, "g"),
                number(cell.rung_clip, "g"),
                str(cell.n),
                _loss_text(cell),
                *_difference_texts(comparison),
                _reference_text(cell) if cell is study.reference else verdict,
                number(cell.signals["flip_yield"], ".2f"),
                number(cell.signals["stall_ratio"], ".2f"),
                _outcomes_text(cell.outcomes),
            )
        )
    table = Table(columns, lines, frozenset({3, 4, 5, 6, 7, 8, 9, 11, 12}))
    return slim(table, ("policy", "lr", "rung clip"))


def geometry_table(study: Study) -> Table:
    """Every geometry-aware arm against the plain arms of its format."""
    columns = ("format", "policy", "arm", "against", "pairs", f"difference, {study.unit}", "p", "p adj.", "reading")
    lines = [
        (
            item.cell.format,
            item.cell.policy,
            item.cell.arm,
            item.other.arm,
            str(item.paired.n if item.paired else 0),
            *_difference_texts(item),
            _reading(item),
        )
        for item in study.geometry
    ]
    return slim(Table(columns, lines, frozenset({4, 5, 6, 7})), ("policy",))


def stops_table(trials: pd.DataFrame) -> Table:
    """Every failed trial with the evidence of its guard."""
    columns = (
        "trial",
        "format",
        "arm",
        "policy",
        "lr",
        "seed",
        "outcome",
        "signal",
        "layer",
        "step",
        "value",
        "limit",
        "message",
    )
    failed = trials[trials["state"] == FAILED]
    lines = [
        (
            row["trial_id"],
            row["format"],
            row["optimizer"],
            row["policy"],
            number(row["lr"], "g"),
            str(row["seed"]),
            row["outcome"],
            row["signal"] or "val_loss",
            row["layer"] or DASH,
            number(row["step"], ".0f"),
            number(row["value"], ".4g", missing="not finite"),
            number(row["limit"], "g"),
            row["message"],
        )
        for _, row in failed.iterrows()
    ]
    return slim(Table(columns, lines, frozenset({4, 5, 9, 10, 11})), ("policy", "lr"))


def choices_table(trials: pd.DataFrame, study: Study) -> Table:
    """Mean loss of every learning rate and rung clip that was run; a stopped seed shows as such."""
    groups: dict[tuple[str, ...], list[dict[Hashable, Any]]] = {}
    for trial in trials.to_dict("records"):
        key = tuple(trial[name] for name in ("format", "optimizer", "policy", "options"))
        groups.setdefault(key, []).append(trial)
    lines = []
    for (name, arm, policy, _), group in groups.items():
        first, stopped = group[0], sum(trial["state"] == FAILED for trial in group)
        finished = [trial["val_loss"] for trial in group if trial["state"] == FINISHED]
        loss = f"{stopped} of {len(group)} stopped" if stopped else number(mean_of_known(finished), ".3f")
        lines.append(
            (name, arm, policy, number(first["lr"], "g"), number(first["rung_clip"], "g"), str(len(finished)), loss)
        )
    return Table(
        ("format", "arm", "policy", "lr", "rung clip", "finished", _measure(study)), lines, frozenset({3, 4, 5, 6})
    )


def mutations_table(found: Sequence[tuple[str, int, str, float, float, str]]) -> Table:
    """What members of populations took over from others, by step."""
    lines = [
        (name, str(step), field, number(before, "g"), number(after, "g"), source)
        for name, step, field, before, after, source in found
    ]
    return Table(("trial", "step", "value", "before", "after", "weights of"), lines, frozenset({1, 3, 4}))


def _measure(study: Study) -> str:
    return "loss, nats" if study.unit == UNITS["lm"] else "1 − F1 micro"


def slim(table: Table, names: Sequence[str]) -> Table:
    """The table without those of the named columns that hold one value throughout."""
    kept = [
        index
        for index, name in enumerate(table.columns)
        if name not in names or len({line[index] for line in table.lines}) > 1
    ]
    return Table(
        [table.columns[index] for index in kept],
        [[line[index] for index in kept] for line in table.lines],
        frozenset(place for place, index in enumerate(kept) if index in table.numeric),
    )


def number(value: float, form: str, missing: str = DASH) -> str:
    """The number in the given form; `missing` for NaN, ∞ for infinity."""
    if math.isnan(value):
        return missing
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return format(value, form).replace("-", "−")


def _reference_text(cell: Cell) -> str:
    return "reference" if cell.learned else "reference (did not learn)"


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
        return (
            f"stopped: {item.cell.arm} {len(item.cell.stops)} of {item.cell.n}, "
            f"{item.other.arm} {len(item.other.stops)} of {item.other.n}"
        )
    elif item.paired is None:
        return "no result"
    else:
        text = "gain" if item.paired.mean < 0 else "worse" if item.paired.mean > 0 else "no difference"
    return text if item.decided else f"{text}, not decided"


def _outcomes_text(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))
