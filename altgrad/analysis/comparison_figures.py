"""Pictures that compare: interactions with their intervals, runs that survive, learning rates, losses against costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from altgrad.analysis.cells import Cell, arm_order, format_order
from altgrad.analysis.curves import look_of
from altgrad.analysis.figures import drawn
from altgrad.analysis.inference import t_interval
from altgrad.analysis.palette import BACK, INK, MARK, SOFT, line_of
from altgrad.analysis.study import Study

MARKERS = ("o", "s", "^", "D", "v", "p", "<", "d", "h", "X", "*", "P", ">", "8")
"""Of arms, where colours tell formats apart."""


def forest(study: Study, path: Path) -> bool:
    """Every interaction with BF16 of the main policy with its simultaneous interval; False where none was measured.

    Filled: the pairs that may gain most (no other is shown to beat them). Blue: decided to differ from 0.
    """
    items = [
        item
        for item in study.beyond
        if item.kind == "beyond BF16" and item.cell.policy == study.policy and math.isfinite(item.mean)
    ]
    if not items:
        return False
    may = {item.cell.key for group in study.best for item in group}
    spans = [max(abs(item.low), abs(item.high)) for item in items if math.isfinite(item.half)]
    reach = 1.15 * max([*spans, *(abs(item.mean) for item in items), 1e-3])
    with drawn(path, 1.3 + 0.27 * len(items)) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, lw=1.0, ls=(0, (4, 2)))
        for row, item in enumerate(items):
            colour = MARK if item.decided else SOFT
            low, high = (max(-reach, item.low), min(reach, item.high)) if math.isfinite(item.half) else (-reach, reach)
            is_whole = math.isfinite(item.half)
            axes.plot([low, high], [row, row], color=colour, lw=1.6 if is_whole else 0.8, ls="-" if is_whole else ":")
            face = colour if item.cell.key in may else BACK
            axes.plot(item.mean, row, "o", color=colour, mfc=face, mew=1.4, ms=6.5, zorder=3)
        axes.set(ylim=(len(items) - 0.4, -0.6), xlim=(-reach, reach))
        axes.set_xlabel(f"gain beyond the same arm's gain in BF16, {study.unit} (right: the format benefits)")
        axes.set_yticks(range(len(items)), [f"{item.cell.format} {item.cell.arm}" for item in items], fontsize=8.5)
        axes.grid(False, axis="y")
        kinds = (
            ("may gain most", SOFT, SOFT),
            ("shown to be beaten", SOFT, BACK),
            ("decided to differ from 0", MARK, MARK),
        )
        handles = [Line2D([], [], marker="o", ls="", color=edge, mfc=face, label=text) for text, edge, face in kinds]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return True


def survival(study: Study, policy: str, last: int, path: Path) -> bool:
    """Share of runs not stopped, over steps, a panel per arm in which runs were stopped; False where none was."""
    cells = [cell for cell in study.cells if cell.policy == policy and cell.n]
    arms = sorted({cell.arm for cell in cells if cell.stops}, key=arm_order)
    if not arms:
        return False

    def panel(axes: Axes, arm: str) -> None:
        for cell in (cell for cell in cells if cell.arm == arm):
            steps = sorted(stop.step for stop in cell.stops.values())
            places = [0, *(step for step in steps for _ in (0, 1)), last]
            alive = [1.0, *(1 - (k + second) / cell.n for k in range(len(steps)) for second in (0, 1))]
            look = look_of(cell.format, len(places))
            axes.plot(places, [*alive, alive[-1]], lw=1.5, **look)
        axes.set(ylim=(-0.03, 1.05), xlim=(0, last))

    _panels(arms, cells, path, panel, xlabel="step", ylabel="share of runs not stopped")
    return True


def rate_sensitivity(study: Study, policy: str, path: Path) -> bool:
    """Mean loss by learning rate with 95 % t intervals, a panel per arm; False where none was run at several rates."""
    cells = [cell for cell in study.cells if cell.policy == policy and cell.settings > 1]
    arms = sorted({cell.arm for cell in cells}, key=arm_order)
    tried = {cell.key: sorted(cell.tried, key=lambda item: item.lr) for cell in cells}
    finite = [item.mean for items in tried.values() for item in items if math.isfinite(item.mean)]
    if not arms or not finite:
        return False
    low, high = min(finite), max(min(max(finite), 1.35 * min(finite)), 1.01 * min(finite))

    def panel(axes: Axes, arm: str) -> None:
        for cell in (cell for cell in cells if cell.arm == arm):
            known = [item for item in tried[cell.key] if math.isfinite(item.mean)]
            rates = [item.lr for item in known]
            halves = [_half(item) for item in known]
            look = line_of(cell.format)
            axes.errorbar(rates, [item.mean for item in known], halves, lw=1.3, elinewidth=0.8, capsize=2, **look)
        axes.set_xscale("log")
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))

    _panels(arms, cells, path, panel, xlabel="learning rate", ylabel=f"validation {study.measure}, {study.unit}")
    return True


def _half(cell: Cell) -> float:
    low, high = t_interval(list(cell.losses.values()))
    return 0.0 if math.isnan(low) else (high - low) / 2


def _panels(
    arms: Sequence[str],
    cells: Sequence[Cell],
    path: Path,
    panel: Callable[[Axes, str], None],
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """A panel per arm, up to three to a row, axes shared, under one legend of formats."""
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    with drawn(path, 0.9 + 2.3 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, arm in zip(grid.flat, arms, strict=False):
            panel(axes, arm)
            axes.set(title=arm, xlabel=xlabel)
            axes.tick_params(labelbottom=True)
        for axes in grid.flat[len(arms) :]:
            axes.set_visible(False)
        names = sorted({cell.format for cell in cells if cell.arm in arms}, key=format_order)
        handles = [Line2D([], [], lw=1.5, label=name, **line_of(name)) for name in names]
        figure.legend(handles=handles, loc="outside upper center", ncols=9, frameon=False, fontsize=9)
        figure.supylabel(ylabel, fontsize=10)


def trade_offs(found: pd.DataFrame, policy: str, unit: str, path: Path) -> bool:
    """Loss against speed, and against the bytes of weights and optimizer state; False without finished cells.

    `found`: of `comparisons.costs`. Colours tell formats, markers arms.
    """
    own = found[found["policy"] == policy]
    if own.empty:
        return False
    arms = sorted(own["arm"].unique(), key=arm_order)
    names = sorted(own["format"].unique(), key=format_order)
    low = float(own["loss"].min())
    top = min(float(own["loss"].max()), 1.3 * low)
    with drawn(path, 4.2) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        kept = own["weight_bytes"] + own["state_bytes"]
        # Formats that keep as much coincide: a little apart, in their order.
        order = own["format"].map(names.index).groupby(kept).rank(method="dense")
        apart = 0.06 * (order - order.groupby(kept).transform("mean"))
        for place, arm in enumerate(arms):
            cells = own[own["arm"] == arm]
            look = {"marker": MARKERS[place % len(MARKERS)], "s": 36, "edgecolors": BACK, "linewidths": 0.5}
            look["c"] = [line_of(name)["color"] for name in cells["format"]]
            heights = cells["loss"].clip(upper=top)
            left.scatter(cells["speed"].where(cells["speed"] > 0), heights, **look)
            right.scatter(kept[cells.index] + apart[cells.index], heights, **look)
        left.set(xlabel="tokens (samples) per second, of this emulation", ylabel=f"validation loss, {unit}")
        if (own["speed"] > 0).any():
            left.set_xscale("log")
        right.set(xlabel="bytes of weights and optimizer state, per weight")
        right.set_xticks(sorted(set(kept)))
        margin = 0.06 * max(top - low, 1e-3)
        left.set_ylim(low - margin, top + margin)
        shown = [Line2D([], [], marker=m, ls="", color=SOFT, label=arm) for m, arm in zip(MARKERS, arms, strict=False)]
        shown += [Line2D([], [], marker="s", ls="", color=line_of(n)["color"], label=n) for n in names]
        figure.legend(handles=shown, loc="outside upper left", ncols=8, frameon=False, fontsize=8.5)
    return True
