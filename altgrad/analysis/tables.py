"""The tables of a report, as texts: every cell, geometry against plain steps, stops, learning rates, shifts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from altgrad.analysis.cells import UNITS, Cell, mean_of_known
from altgrad.analysis.contrasts import Contrast
from altgrad.analysis.failures import reason
from altgrad.analysis.records import FAILED
from altgrad.analysis.study import Study
from altgrad.analysis.verdicts import Verdict
from altgrad.analysis.wording import percent, signed

DASH = "–"


@dataclass(frozen=True)
class Table:
    """A table of texts with a heading per column; `numeric` are the columns to align right.

    `grouped_by` names a column whose equal neighbours belong together; `links` holds per line the address that its
    first text leads to ("": none).
    """

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    grouped_by: str = ""
    links: Sequence[str] = ()

    @property
    def groups(self) -> list[list[tuple[Sequence[str], str]]]:
        """The lines with their links, in runs of one value of `grouped_by`."""
        links = self.links or [""] * len(self.lines)
        paired = list(zip(self.lines, links, strict=True))
        if self.grouped_by not in self.columns:
            return [paired]
        place = list(self.columns).index(self.grouped_by)
        return [list(run) for _, run in itertools.groupby(paired, key=lambda pair: pair[0][place])]


def cells_table(study: Study) -> Table:
    """Every cell: its loss, its distance from BF16 and the verdict on it."""
    columns = (
        "format",
        "arm",
        "policy",
        "lr",
        "of settings",
        "seeds",
        _measure(study),
        f"minus BF16, {study.unit}",
        "p, distribution-free",
        "excess over BF16",
        "verdict",
        "flip yield",
        "stall ratio",
        "outcomes",
    )
    lines = []
    for cell in study.cells:
        comparison, verdict = study.comparison(cell), study.verdicts.get(cell.key)
        lines.append(
            (
                cell.format,
                cell.arm,
                cell.policy,
                number(cell.lr, "g"),
                _settings_text(cell),
                str(cell.n),
                loss_text(cell),
                effect_text(comparison),
                _free_text(comparison),
                DASH if verdict is None else excess_text(verdict),
                verdict_text(study, cell, verdict),
                number(cell.signals["flip_yield"], ".2f"),
                number(cell.signals["stall_ratio"], ".2f"),
                _outcomes_text(cell.outcomes),
            )
        )
    table = Table(columns, lines, frozenset({3, 4, 5, 6, 7, 8, 9, 11, 12}), "format", links(study.cells))
    chosen = () if any(cell.settings > 1 for cell in study.cells) else ("lr", "of settings")
    return slim(table, ("policy", "p, distribution-free", *chosen))


def geometry_table(study: Study) -> Table:
    """What every geometry-aware arm gains over the plain arm of its residence, and beyond BF16 and FP32."""
    columns = (
        "format",
        "policy",
        "arm",
        "plain arm",
        "pairs",
        f"gain, {study.unit}",
        "median",
        "beyond BF16",
        "median beyond",
        "p, distribution-free",
        "beyond FP32 control",
        "beyond BF16, reading",
        "more seeds to decide",
    )
    beyond = {(item.kind, item.cell.key): item for item in study.beyond}
    lines = []
    for item in study.gains:
        more, control = (beyond.get((kind, item.cell.key)) for kind in ("beyond BF16", "beyond FP32"))
        lines.append(
            (
                item.cell.format,
                item.cell.policy,
                item.cell.arm,
                item.other.arm + (" in FP32" if item.other.format != item.cell.format else ""),
                str(item.n),
                effect_text(item),
                number(item.median, ".3f"),
                effect_text(more),
                DASH if more is None else number(more.median, ".3f"),
                _free_text(more),
                effect_text(control),
                _reading(study, item, more),
                _needed_text(more),
            )
        )
    table = Table(
        columns, lines, frozenset({4, 5, 6, 7, 8, 9, 10, 12}), "format", links(item.cell for item in study.gains)
    )
    return slim(table, ("policy", "p, distribution-free", "beyond FP32 control"))


OF_TRIAL = ("trial", "format", "arm", "policy", "lr", "seed")


def _of_trial(row: Mapping[Any, Any]) -> tuple[str, ...]:
    """The cells of OF_TRIAL."""
    names = (row[name] for name in ("trial_id", "format", "optimizer", "policy"))
    return (*names, number(row["lr"], "g"), str(row["seed"]))


def stops_table(trials: pd.DataFrame) -> Table:
    """Every failed trial with the evidence of its guard, or the message of what ended without one."""
    columns = (*OF_TRIAL, "outcome", "signal", "layer", "step", "value", "limit", "message")
    failed = trials[trials["state"] == FAILED]
    lines = [
        (
            *_of_trial(row.to_dict()),
            row["outcome"],
            row["signal"] or "val_loss",
            row["layer"] or DASH,
            number(row["step"], ".0f"),
            number(row["value"], ".4g", missing="not finite"),
            number(row["limit"], "g"),
            "" if row["signal"] else row["message"],
        )
        for _, row in failed.iterrows()
    ]
    told = any(line[-1] for line in lines)
    left_out = ("policy", "lr") if told else ("policy", "lr", "message")
    return slim(Table(columns, lines, frozenset({4, 5, 9, 10, 11})), left_out)


def shifts_table(trials: pd.DataFrame) -> Table:
    """Every trial of which a layer moved to another format."""
    columns = (*OF_TRIAL, "outcome", "step", "loss", "layers moved")
    lines = [
        (
            *_of_trial(row.to_dict()),
            row["outcome"] + (f" by {row['signal']}" if row["signal"] else ""),
            number(row["step"], ".0f"),
            number(row["val_loss"], ".3f", missing=DASH),
            row["formats"],
        )
        for _, row in trials[trials["formats"] != ""].iterrows()
    ]
    return slim(Table(columns, lines, frozenset({4, 5, 7, 8})), ("policy", "lr"))


def choices_table(study: Study) -> Table:
    """Sensitivity to the learning rate: every setting's mean loss and its distance from the cell's chosen one."""
    lines, cells = [], []
    for cell in study.cells:
        for item in sorted(cell.tried, key=lambda item: item.lr):
            common = item.losses.keys() & cell.losses.keys() if not (item.stops or cell.stops) else ()
            distance = mean_of_known(item.losses[seed] - cell.losses[seed] for seed in common)
            chosen = "chosen" if item.trial_ids == cell.trial_ids and (cell.losses or cell.stops) else ""
            outside = "" if item.lr in cell.rates else "not compared"
            cells.append(cell)
            lines.append(
                (
                    cell.format,
                    cell.arm,
                    cell.policy,
                    number(item.lr, "g"),
                    str(len(item.losses)),
                    loss_text(item),
                    DASH if math.isnan(distance) else signed(distance),
                    chosen or outside or DASH,
                )
            )
    columns = ("format", "arm", "policy", "lr", "finished", _measure(study), "minus the chosen", "choice")
    return slim(Table(columns, lines, frozenset({3, 4, 5, 6}), "format", links(cells)), ("policy",))


def mutations_table(found: Sequence[tuple[str, int, str, float, float, str]]) -> Table:
    """What members of populations took over from others, by step."""
    lines = [
        (name, str(step), field, number(before, "g"), number(after, "g"), source)
        for name, step, field, before, after, source in found
    ]
    return Table(("trial", "step", "value", "before", "after", "weights of"), lines, frozenset({1, 3, 4}))


def links(cells: Iterable[Cell]) -> list[str]:
    """For each cell the place in the report that lists its trials."""
    return [f"#cell-{cell.name}" for cell in cells]


def _measure(study: Study) -> str:
    return "loss, nats" if study.unit == UNITS["lm"] else "1 − F1 micro"


def slim(table: Table, names: Sequence[str]) -> Table:
    """The table without those of the named columns that hold one value throughout."""
    kept = [
        index
        for index, name in enumerate(table.columns)
        if name not in names or len({line[index] for line in table.lines}) > 1
    ]
    return replace(
        table,
        columns=[table.columns[index] for index in kept],
        lines=[[line[index] for index in kept] for line in table.lines],
        numeric=frozenset(place for place, index in enumerate(kept) if index in table.numeric),
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


def loss_text(cell: Cell) -> str:
    """A cell's mean loss ± half its interval, or how many of its seeds failed or were shifted to another format."""
    shifted = f"shifted {len(cell.shifted)} of {cell.n + len(cell.shifted)}" if cell.shifted else ""
    if cell.stops:
        own = f"failed {len(cell.stops)} of {cell.n}"
    elif cell.losses:
        low, high = cell.interval
        own = number(cell.mean, ".3f") + ("" if math.isnan(low) else f" ± {(high - low) / 2:.3f}")
    else:
        own = ""
    return ", ".join(filter(None, (own, shifted))) or DASH


def effect_text(item: Contrast | None) -> str:
    """A contrast's mean and interval, or why it has none."""
    if item is None:
        return DASH
    if item.status == "measured" and math.isfinite(item.half):
        return f"{signed(item.mean)} [{signed(item.low)}, {signed(item.high)}]"
    return (
        item.status if math.isnan(item.mean) or item.status == "identical" else f"{signed(item.mean)} ({item.status})"
    )


def excess_text(verdict: Verdict) -> str:
    """How far above BF16 a cell ends, relative, with its interval."""
    if math.isnan(verdict.excess):
        return DASH
    spread = "" if math.isinf(verdict.high) else f" [{percent(verdict.low)}, {percent(verdict.high)}]"
    return percent(verdict.excess) + spread


def _free_text(item: Contrast | None) -> str:
    return DASH if item is None or math.isnan(item.p_free) else f"{item.p_free:.3g}"


def _settings_text(cell: Cell) -> str:
    return str(cell.settings) if len(cell.rates) == cell.settings else f"{len(cell.rates)} of {cell.settings}"


def verdict_text(study: Study, cell: Cell, verdict: Verdict | None) -> str:
    if cell is study.reference:
        return _reference_text(cell)
    if cell.shifted and not cell.n:
        return "needed rescue"
    if verdict is None or verdict.word == "no result":
        return DASH if not cell.is_judged else "pruned" if cell.pruned else "no result"
    return "not decided" if verdict.word == "open" else verdict.word


def _reading(study: Study, gain: Contrast, more: Contrast | None) -> str:
    """Of an 8-bit format: whether its arm gains more there than in BF16, and whether it may gain most."""
    if gain.status == "stopped":
        counts = ", ".join(f"{cell.arm} {reason(study, cell)}" for cell in (gain.cell, gain.other) if cell.stops)
        word = (
            "" if math.isnan(gain.p_stop) else f" ({'decided' if gain.decided else 'not decided'}, p {gain.p_stop:.2g})"
        )
        return counts + word
    if more is None:
        return DASH
    if more.status in ("identical", "no result", "one seed", "exploratory", "stopped", "shifted"):
        return more.status
    may = any(item.cell is more.cell for group in study.best for item in group)
    tail = "" if not may else "; gains most" if study.leads else "; may gain most"
    if more.decided:
        return ("less than in BF16" if more.mean < 0 else "more than in BF16") + tail
    if more.within(study.equal_limit(more)):
        return f"as in BF16 within {study.equal_limit(more):.2g}{tail}"
    return f"not decided{tail}"


def _needed_text(item: Contrast | None) -> str:
    if item is None or item.status != "measured" or item.is_apart:
        return DASH
    return "> 60" if item.seeds_needed is None else str(item.seeds_needed)


def _outcomes_text(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))
