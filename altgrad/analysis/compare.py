"""Two sweeps beside each other: what was decided in each, and which cells changed by more than chance.

A seed means the same initial weights and batches in both where model, data and batch are the same, so a cell's change
is paired by seed like any other difference. What the two settings do not share is said first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from altgrad.analysis.cells import Cell, Key
from altgrad.analysis.contrasts import Contrast, measured
from altgrad.analysis.records import Records, setting_words
from altgrad.analysis.study import Study
from altgrad.analysis.sweeps import read_sweep
from altgrad.analysis.tables import DASH, Table, effect_text, loss_text
from altgrad.analysis.wording import counted, listed


@dataclass(frozen=True)
class Comparison:
    """Lines of text, and a table of the cells that both sweeps have."""

    lines: list[str]
    table: Table


def compare(first: Path, second: Path, *, margin: float | None = None, equal_within: float | None = None) -> Comparison:
    """The two sweeps' last settings; FileNotFoundError where a folder has no ledger, ValueError for no trials."""
    sides = [_side(out, margin, equal_within) for out in (first, second)]
    (one, a), (other, b) = sides
    lines = [
        f"{out}: {records.trials['scope'].iloc[0]}" for out, (records, _) in zip((first, second), sides, strict=True)
    ]
    lines += _setting_lines(one, other)
    if a.unit != b.unit:
        return Comparison([*lines, "The tasks differ: nothing can be compared."], Table((), ()))
    lines += _verdict_lines(a, b)
    before, after = ({cell.key: cell for cell in study.cells} for study in (a, b))
    for out, own, others in ((first, before, after), (second, after, before)):
        if lone := [key for key in own if key not in others]:
            lines.append(f"only in {out}: {listed(f'{format} {arm} {policy}' for format, arm, policy in lone)}")
    changes = _changes(before, after)
    identical = sum(item.status == "identical" for item in changes)
    decided = [item for item in changes if item.decided]
    margins = [study.margin for study in (a, b)]
    if margins[0] != margins[1]:
        lines.append(f"differs: margin: {margins[0]:g} and {margins[1]:g}")
    lines.append(
        f"{counted(len(changes), 'cell')} in both: {identical} identical in every seed, {len(decided)} decided to "
        "differ" + (f" ({listed(f'{item.cell.format} {item.cell.arm}' for item in decided)})" if decided else "")
    )
    return Comparison(lines, _table(changes, before, first, second, a.unit))


def _side(out: Path, margin: float | None, equal_within: float | None) -> tuple[Records, Study]:
    sweep = read_sweep(out)
    records = next(iter(sweep.settings.values()))
    return records, sweep.study(records, margin, equal_within)


def _setting_lines(one: Records, other: Records) -> Iterator[str]:
    a, b = (setting_words(records.trials["setting"].iloc[0]) for records in (one, other))
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield f"differs: {name}: {a.get(name, DASH)} and {b.get(name, DASH)}"


def _verdict_lines(a: Study, b: Study) -> Iterator[str]:
    found: tuple[dict[str, Any], ...] = tuple(
        {name: item.word for item in study.formats for name in item.formats} for study in (a, b)
    )
    words = {"open": "not decided"}
    for name in [name for name in found[0] if name in found[1]]:
        before, after = (words.get(side[name], side[name]) for side in found)
        if before != after:
            yield f"{name}: {before}, then {after}"


def _changes(before: Mapping[Key, Cell], after: Mapping[Key, Cell]) -> list[Contrast]:
    pairs = [(cell, before[key]) for key, cell in after.items() if key in before]
    # Each side's cells are themselves, whatever they are called.
    contrasts = [
        Contrast("change", cell, ((cell, 1), (replace(old, policy=f"{old.policy}, first"), -1))) for cell, old in pairs
    ]
    return measured(contrasts, {})


def _table(changes: list[Contrast], before: Mapping[Key, Cell], first: Path, second: Path, unit: str) -> Table:
    columns = ("format", "arm", "policy", "pairs", str(first), str(second), f"change, {unit}", "reading")
    lines = []
    for item in changes:
        open_ = "not decided" if item.status in ("measured", "stopped") else item.status
        word = "differs" if item.decided else open_
        old = before[item.cell.key]
        lines.append((*item.cell.key[:3], str(item.n), loss_text(old), loss_text(item.cell), effect_text(item), word))
    return Table(columns, lines, frozenset({3, 4, 5, 6}))
