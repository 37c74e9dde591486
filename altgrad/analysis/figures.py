"""The pictures that count and compare, and the look that all pictures share; drawn without a display.

Formats are ordered by their exponent bits and keep one colour in every picture: cool hues for mantissa-heavy
formats, warm ones for exponent-heavy formats, taken from palettes that survive colour blindness (Okabe & Ito;
Tol). No picture relies on hue alone: lines carry their names, heat-map cells their numbers, bars their
counts.

Each function writes one file and returns True, or returns False and writes nothing where there is nothing to
show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import SymLogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from altgrad.analysis.cells import UNITS, Cell, arm_order, format_order
from altgrad.analysis.records import FAILED, FINISHED
from altgrad.analysis.study import Study
from altgrad.analysis.wording import signed

DPI = 130
WIDTH = 9.0
LINEAR = 0.02
"""Half-width of the linear part of a symmetric logarithmic axis, nats."""
BY_EXPONENT = ("#332288", "#0072B2", "#56B4E9", "#009E73", "#8A8A1E", "#E69F00", "#D55E00", "#882255", "#AA4499")
NEUTRAL = {"BF16": "#000000", "FP16": "#5A5A5A", "FP32": "#8C8C8C"}
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.6,
    "hatch.color": "#BBBBBB",
}


def colour_of(name: str) -> str:
    """The format's colour, the same in every picture."""
    return NEUTRAL.get(name) or BY_EXPONENT[format_order(name)[1]]


@contextmanager
def drawn(path: Path, height: float) -> Iterator[Figure]:
    """A figure of the report's width and this height, inches, saved to `path` at the end."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


def heat_map(study: Study, policy: str, path: Path) -> bool:
    """Loss, or a classifier's error, minus BF16's by format and arm; False where there is no reference or no cell."""
    cells = {(cell.format, cell.arm): cell for cell in study.cells if cell.policy == policy}
    if study.reference is None or not cells:
        return False
    names = sorted({name for name, _ in cells}, key=format_order)
    arms = sorted({arm for _, arm in cells}, key=arm_order)
    shown = {
        key: item
        for key, cell in cells.items()
        if (item := study.comparison(cell)) is not None and not math.isnan(item.mean)
    }
    largest = max((abs(value.mean) for value in shown.values()), default=0.1)
    norm = SymLogNorm(linthresh=LINEAR, vmin=-max(largest, 0.1), vmax=max(largest, 0.1), base=10)
    palette = matplotlib.colormaps["PuOr_r"]
    with drawn(path, 1.1 + 0.56 * len(names)) as figure:
        axes = figure.add_subplot()
        for row, name in enumerate(names):
            for column, arm in enumerate(arms):
                cell = cells.get((name, arm))
                pair = shown.get((name, arm))
                colour = palette(0.5 + 0.8 * (float(norm(pair.mean)) - 0.5)) if pair else "white"
                stopped = cell is not None and bool(cell.stops)
                axes.add_patch(
                    Rectangle((column, row), 1, 1, facecolor="#EEEEEE" if stopped else colour, edgecolor="white", lw=2)
                )
                if stopped:
                    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="////", lw=0))
                dark = pair is not None and _is_dark(colour)
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    _cell_text(study, cell),
                    ha="center",
                    va="center",
                    fontsize=9 if len(arms) <= 5 else 7.5,
                    color="white" if dark else "#111111",
                    bbox={"facecolor": "#EEEEEE", "edgecolor": "none", "pad": 1.5} if stopped else None,
                )
        axes.set(xlim=(0, len(arms)), ylim=(len(names), 0), title=f"{_measured(study)} minus BF16 AdamW's")
        axes.set_xticks(np.arange(len(arms)) + 0.5, [arm.replace("_", "\n", 1) for arm in arms])
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return True


def stop_reasons(trials: pd.DataFrame, path: Path) -> bool:
    """Stopped runs by format and signal, of all runs with a result of their format; False where none was stopped."""
    failed = trials[trials["state"] == FAILED]
    if failed.empty:
        return False
    names = sorted(trials["format"].unique(), key=format_order)
    signals = failed["signal"].replace("", "val_loss not finite")
    counts = pd.crosstab(failed["format"], signals).reindex(names, fill_value=0)
    totals = trials[trials["state"].isin((FINISHED, FAILED))]["format"].value_counts().reindex(names, fill_value=0)
    colours = ("#D55E00", "#0072B2", "#E69F00", "#882255", "#009E73", "#56B4E9", "#332288", "#999933")
    with drawn(path, 1.5 + 0.34 * len(names)) as figure:
        axes = figure.add_subplot()
        axes.barh(names, totals, color="#EEEEEE", height=0.72)
        left = np.zeros(len(names))
        for index, signal in enumerate(counts.columns):
            width = counts[signal].to_numpy()
            axes.barh(names, width, left=left, color=colours[index % len(colours)], height=0.72, label=str(signal))
            left += width
        for row, name in enumerate(names):
            axes.text(totals[name], row, f"  {int(left[row])} of {totals[name]} stopped", va="center", fontsize=9)
        axes.set(xlabel="runs (grey: finished)", xlim=(0, max(1, totals.max()) * 1.25))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        figure.legend(loc="outside upper left", ncols=3, frameon=False, title="Stopped by", alignment="left")
    return True


def _is_dark(colour: Any) -> bool:
    return sum(to_rgb(colour)) < 1.35


def _cell_text(study: Study, cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.stops:
        return f"{cell.main_stop().signal}\n{len(cell.stops)} of {cell.n} stopped"
    if cell is study.reference:
        return f"reference\n{cell.mean:.3f}"
    item = study.comparison(cell)
    shifted = f"{len(cell.shifted)} of {cell.n + len(cell.shifted)}"
    if item is None or math.isnan(item.mean):
        return f"needed rescue\n{shifted} shifted" if cell.shifted else "no result"
    own = f"{shifted} left out" if cell.shifted else item.status
    spread = f"±{item.half:.3f}" if math.isfinite(item.half) else own
    return f"{signed(item.mean)}\n{spread}"


def _measured(study: Study) -> str:
    return "Validation loss, nats," if study.unit == UNITS["lm"] else "Error, 1 − F1 micro,"
