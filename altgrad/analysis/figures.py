"""The pictures that count and compare, and the look that all pictures share; drawn without a display.

Formats are ordered by their exponent bits and keep one colour, dash pattern and marker in every picture (see
`palette`). Each function writes one figure, a PNG and beside it the SVG that the page shows, and returns True; or
returns False and writes nothing where there is nothing to show.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from altgrad.analysis.cells import UNITS, Cell, Key, arm_order, format_order
from altgrad.analysis.contrasts import Contrast
from altgrad.analysis.palette import ABOVE, BACK, BELOW, FAINT, GRID, HATCHES, INK, SERIES, SOFT
from altgrad.analysis.records import FAILED, FINISHED
from altgrad.analysis.study import Study
from altgrad.analysis.vector import themed
from altgrad.analysis.wording import signed

DPI = 130
WIDTH = 9.0
LINEAR = 0.02
"""Half-width of the linear part of a symmetric logarithmic axis, nats."""
UNDECIDED = 0.3
"""Share of its colour that an undecided difference keeps."""
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": BACK,
    "axes.facecolor": "none",
    "hatch.linewidth": 0.6,
    "hatch.color": SOFT,
    "svg.fonttype": "none",
    "svg.hashsalt": "altgrad",
    "path.simplify_threshold": 0.2,
}


@contextmanager
def drawn(path: Path, height: float) -> Iterator[Figure]:
    """A figure of the report's width and this height, inches; saved at the end to `path`, a PNG, and as SVG beside it.

    Its colours should be those of `palette`: others do not follow the page into the dark.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        engine = ConstrainedLayoutEngine()
        FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        # What lies within the axes needs no room of its own, and asking each for its size takes a third of the time.
        for axes in figure.axes:
            for artist in (*axes.texts, *axes.lines, *axes.patches, *axes.collections):
                artist.set_in_layout(False)
        # Laid out once, by hand: a figure that owns its engine is drawn twice whenever it is saved.
        engine.execute(figure)
        figure.savefig(path, dpi=DPI)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
        path.with_suffix(".svg").write_text(themed(drawing.getvalue(), path.stem), encoding="utf-8")


Column = tuple[str, str]
"""Policy and arm."""


def heat_map(study: Study, policies: Sequence[str], path: Path) -> bool:
    """Loss, or a classifier's error, minus BF16 AdamW's by format and by arm and policy, and below it minus that of
    BF16 with the same arm; False where there is no reference or no cell."""
    cells = {(cell.format, cell.policy, cell.arm): cell for cell in study.cells if cell.policy in policies}
    if study.reference is None or not cells:
        return False
    names = sorted({cell.format for cell in cells.values()}, key=format_order)
    columns = columns_of(study, policies)
    own = {cell.key for cell in cells.values()}
    blocks = [(f"{_measured(study)} minus BF16 AdamW's", study.against_reference, names)]
    same = {key: item for key, item in study.against_same_arm.items() if key in own}
    if len({arm for _, arm in columns}) > 1 and same:
        rows = [name for name in names if any(key[0] == name for key in same)]
        blocks.append((f"{_measured(study)} minus that of BF16 with the same arm", same, rows))
    means = [abs(item.mean) for _, found, _ in blocks for key, item in found.items() if key in own]
    largest = max((mean for mean in means if math.isfinite(mean)), default=0.1)
    norm = SymLogNorm(linthresh=LINEAR, vmin=-max(largest, 0.1), vmax=max(largest, 0.1), base=10)
    heights = [0.5 * len(rows) for *_, rows in blocks]
    with drawn(path, sum(heights) + 0.9 * len(blocks) + 1.0) as figure:
        grid = figure.subplots(len(blocks) + 1, 1, height_ratios=[*heights, 0.35])
        for axes, (title, contrasts, rows) in zip(grid, blocks, strict=False):
            _draw_block(axes, study, cells, rows, columns, contrasts, norm)
            axes.set_title(title)
        _draw_scale(grid[-1], norm, study.unit)
    return True


def columns_of(study: Study, policies: Sequence[str]) -> list[Column]:
    """What a heat map of these policies has a column for."""
    found = {(cell.policy, cell.arm) for cell in study.cells if cell.policy in policies}
    return sorted(found, key=lambda column: (list(policies).index(column[0]), arm_order(column[1])))


def _draw_block(
    axes: Axes,
    study: Study,
    cells: Mapping[tuple[str, str, str], Cell],
    names: Sequence[str],
    columns: Sequence[Column],
    contrasts: Mapping[Key, Contrast],
    norm: SymLogNorm,
) -> None:
    """A field per format and column: its colour by the mean, faded and without a border where nothing is decided."""
    size = 9 if len(columns) <= 5 else 7.5 if len(columns) <= 8 else 6 if len(columns) <= 12 else 5
    for row, name in enumerate(names):
        for place, column in enumerate(columns):
            cell = cells.get((name, *column))
            if cell is None:
                continue
            item = contrasts.get(cell.key)
            area: dict[str, Any] = {"facecolor": FAINT, "edgecolor": BACK, "lw": 2}
            if cell.stops:
                area |= {"hatch": "////", "edgecolor": SOFT, "lw": 0}
            elif item is not None and math.isfinite(item.mean):
                area |= _shade(item.mean, norm, decided=item.decided)
            axes.add_patch(Rectangle((place + 0.03, row + 0.05), 0.94, 0.9, **area))
            # Not one text of two lines: SVG aligns each line by itself.
            texts = [text for text in _cell_text(study, cell, item) if text]
            for text, y in zip(texts, (0.32, 0.68) if len(texts) == 2 else (0.5,), strict=True):
                box = {"facecolor": FAINT, "edgecolor": "none", "pad": 1.5} if cell.stops else None
                axes.text(place + 0.5, row + y, text, ha="center", va="center", fontsize=size, bbox=box)
    # A field is no wider than its numbers want.
    axes.set(xlim=(0, max(len(columns), 4)), ylim=(len(names), 0))
    labels = [_column_text(column, columns[0][0]) for column in columns]
    axes.set_xticks(np.arange(len(columns)) + 0.5, labels, fontsize=10 if len(columns) <= 8 else 7.5)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _column_text(column: Column, first: str) -> str:
    """The arm over several lines, with its policy where that is not the first's."""
    policy, arm = column
    text = arm.replace("_", "\n", 1).replace(", ", "\n")
    return text if policy == first else f"{text}\n{policy.replace('_', chr(10), 1)}"


def _shade(mean: float, norm: SymLogNorm, *, decided: bool) -> dict[str, Any]:
    """A field's fill and border."""
    strength = abs(2 * float(norm(mean)) - 1) * (1 if decided else UNDECIDED)
    fill = (*matplotlib.colors.to_rgb(ABOVE if mean > 0 else BELOW), strength)
    return {"facecolor": fill, "edgecolor": INK if decided else GRID, "lw": 1.2 if decided else 0.8}


def _draw_scale(axes: Axes, norm: SymLogNorm, unit: str) -> None:
    """The colours of decided differences, and below them of undecided ones."""
    top = float(norm.vmax or 1.0)
    steps = np.linspace(0, 1, 42)
    for low, high in itertools.pairwise(steps):
        middle = float(norm.inverse((low + high) / 2))
        for y, decided in ((0.5, True), (0.0, False)):
            fill = _shade(middle, norm, decided=decided)["facecolor"]
            axes.add_patch(Rectangle((low, y), high - low, 0.5, facecolor=fill, lw=0))
    ticks = [value for value in (-10, -1, -0.1, -LINEAR, 0, LINEAR, 0.1, 1, 10) if abs(value) <= top]
    axes.set_xticks(
        [float(norm(value)) for value in ticks], [signed(v).rstrip("0").rstrip(".") if v else "0" for v in ticks]
    )
    axes.set_yticks([0.25, 0.75], ["undecided", "decided"])
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"difference, {unit}")
    axes.grid(False)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def stop_reasons(trials: pd.DataFrame, path: Path) -> bool:
    """Stopped runs by format and signal, of all runs with a result of their format; False where none was stopped."""
    failed = trials[trials["state"] == FAILED]
    if failed.empty:
        return False
    names = sorted(trials["format"].unique(), key=format_order)
    signals = failed["signal"].replace("", "val_loss not finite")
    counts = pd.crosstab(failed["format"], signals).reindex(names, fill_value=0)
    totals = trials[trials["state"].isin((FINISHED, FAILED))]["format"].value_counts().reindex(names, fill_value=0)
    with drawn(path, 1.5 + 0.34 * len(names)) as figure:
        axes = figure.add_subplot()
        axes.barh(names, totals, color=FAINT, height=0.72)
        left = np.zeros(len(names))
        for index, signal in enumerate(counts.columns):
            width = counts[signal].to_numpy()
            look: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "hatch": HATCHES[index % len(HATCHES)]}
            axes.barh(names, width, left=left, height=0.72, label=str(signal), edgecolor=BACK, lw=0, **look)
            left += width
        for row, name in enumerate(names):
            axes.text(totals[name], row, f"  {int(left[row])} of {totals[name]} stopped", va="center", fontsize=9)
        axes.set(xlabel="runs (grey: finished)", xlim=(0, max(1, totals.max()) * 1.25))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        figure.legend(loc="outside upper left", ncols=3, frameon=False, title="Stopped by", alignment="left")
    return True


def _cell_text(study: Study, cell: Cell, item: Contrast | None) -> tuple[str, str]:
    """A field's two lines: its numbers, and whether they are decided."""
    if cell.stops:
        return cell.main_stop().signal, f"{len(cell.stops)} of {cell.n} stopped"
    if cell is study.reference:
        return "reference", f"{cell.mean:.3f}"
    shifted = f"{len(cell.shifted)} of {cell.n + len(cell.shifted)}"
    if item is None or math.isnan(item.mean):
        return ("needed rescue", f"{shifted} shifted") if cell.shifted else ("no result", "")
    if item.status == "identical":
        return "identical", "in every seed"
    own = f"{shifted} left out" if cell.shifted else item.status
    spread = f" ±{item.half:.3f}" if math.isfinite(item.half) else ""
    return f"{signed(item.mean)}{spread}", "decided" if item.decided else "undecided" if spread else own


def _measured(study: Study) -> str:
    return "Validation loss, nats," if study.unit == UNITS["lm"] else "Error, 1 − F1 micro,"
