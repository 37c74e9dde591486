"""Where in a step, in which layers and when runs begin to fail: a table of first signs, and a timeline of them.

A cell stands here if it fails, had runs stopped, or shows a sign of failure though it trains: what a guard ends at the
end is seldom what began it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from altgrad.analysis.cells import Cell
from altgrad.analysis.failures import stop_text
from altgrad.analysis.figures import drawn
from altgrad.analysis.palette import BACK, SERIES, SOFT
from altgrad.analysis.signs import CommonSign, Sign, common_sign, pass_text
from altgrad.analysis.study import Study
from altgrad.analysis.tables import DASH, Table, links, number, slim, verdict_text
from altgrad.analysis.wording import listed
from altgrad.sweep.record.signs import DIRECTIONS, Direction

MOST_ROWS = 40
"""Of the timeline; the table has them all."""
MARKS: dict[Direction, tuple[str, str]] = {
    "forward": (">", SERIES[1]),
    "backward": ("<", SERIES[0]),
    "optimizer": ("o", SERIES[4]),
}
"""Marker and colour of each direction."""


def failing(study: Study) -> list[Cell]:
    """The cells that stand here, in the study's order."""
    return [cell for cell in study.cells if cell.stops or any(cell.signs.values()) or _fails(study, cell)]


def signs_table(study: Study) -> Table:
    """The commonest first sign of every failing cell, what showed later in other directions, and how its runs ended."""
    columns = (
        "format",
        "arm",
        "policy",
        "runs that show it",
        "direction",
        "first sign",
        "layer type",
        "layer",
        "step",
        "value",
        "limit",
        "later",
        "stopped by",
        "verdict",
    )
    lines = []
    for cell in failing(study):
        found = common_sign(list(cell.signs.values()))
        own = (DASH,) * 9 if found is None else _texts(cell, found)
        stop = f"{stop_text(cell)}, {len(cell.stops)} of {cell.n}" if cell.stops else DASH
        verdict = verdict_text(study, cell, study.verdicts.get(cell.key))
        lines.append((cell.format, cell.arm, cell.policy, *own, stop, verdict))
    return slim(Table(columns, lines, frozenset({3, 8, 9, 10}), "format", links(failing(study))), ("policy",))


def _texts(cell: Cell, found: CommonSign) -> tuple[str, ...]:
    """The nine columns from `runs that show it` to `later`."""
    sign, (first, last) = found.sign, found.steps
    return (
        f"{found.seeds} of {found.runs}",
        sign.direction,
        f"{sign.signal}: {sign.meaning}",
        listed(found.kinds[:3]),
        sign.layer or DASH,
        str(first) if first == last else f"{first} to {last}",
        number(sign.value, ".3g", missing="not finite"),
        number(sign.limit, "g"),
        _later_text(cell, sign),
    )


def _later_text(cell: Cell, first: Sign) -> str:
    """The first sign in each other direction, over the runs."""
    parts = []
    for direction in DIRECTIONS:
        others = [sign for signs in cell.signs.values() for sign in signs[1:] if sign.direction == direction]
        if others and direction != first.direction:
            sign = min(others, key=lambda sign: sign.step)
            parts.append(f"{direction}: {sign.signal} in {sign.kind}, step {sign.step}")
    return "; ".join(parts) or DASH


def _fails(study: Study, cell: Cell) -> bool:
    verdict = study.verdicts.get(cell.key)
    return verdict is not None and verdict.word == "fails"


def timeline(study: Study, policies: Sequence[str], last: int, path: Path) -> bool:
    """First signs by direction and stops, a row per failing cell, to step `last`; False where there is none."""
    cells = [cell for cell in failing(study) if cell.policy in policies][:MOST_ROWS]
    cells = [cell for cell in cells if cell.stops or any(cell.signs.values())]
    if not cells:
        return False
    with drawn(path, 1.4 + 0.3 * len(cells)) as figure:
        axes = figure.add_subplot()
        for row, cell in enumerate(cells):
            _draw_row(axes, row, cell, last)
        axes.set(xlabel="step", xlim=(0, last * 1.42), ylim=(len(cells) - 0.4, -0.6))
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
        names = [f"{cell.format} {cell.arm}{f', {cell.policy}' if len(policies) > 1 else ''}" for cell in cells]
        axes.set_yticks(range(len(cells)), names)
        axes.tick_params(length=0, axis="y")
        handles = [
            Line2D([], [], marker=marker, color=colour, ls="", label=f"first sign, {pass_text(direction)}")
            for direction, (marker, colour) in MARKS.items()
        ]
        handles.append(Line2D([], [], marker="X", color=SOFT, ls="", label="stopped"))
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return True


def _draw_row(axes: Axes, row: int, cell: Cell, last: float) -> None:
    shown = sorted(cell.signs)
    for place, seed in enumerate(shown):
        height = row + (place - (len(shown) - 1) / 2) * min(0.22, 0.66 / max(1, len(shown)))
        stop = cell.stops.get(seed)
        end = last if stop is None else stop.step
        axes.plot([0, end], [height, height], color=SOFT, lw=0.7, zorder=1)
        for sign in cell.signs[seed]:
            marker, colour = MARKS[sign.direction]
            axes.plot(sign.step, height, marker, color=colour, ms=5.5, mec=BACK, mew=0.4, zorder=3)
        if stop is not None:
            axes.plot(stop.step, height, "X", color=SOFT, ms=5, mec=BACK, mew=0.4, zorder=2)
    found = common_sign(list(cell.signs.values()))
    text = "" if found is None else f"{found.sign.signal}, {listed(found.kinds[:2])}"
    axes.text(last * 1.02, row, text, va="center", fontsize=8)
