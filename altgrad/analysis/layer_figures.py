"""Pictures of layers: how stiffness, flip yield and overflow go over training in each kind, and the spacing of every
format over the histogram of a healthy run's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from altgrad.analysis.cells import Cell, format_order
from altgrad.analysis.curves import look_of
from altgrad.analysis.figures import drawn
from altgrad.analysis.layer_signals import KINDS
from altgrad.analysis.palette import SOFT, colour_of, line_of
from altgrad.quantization import get_format

OVER_TRAINING = {"stiffness": "stiffness, log2 of spacing", "flip_yield": "flip yield", "weight_overflow": "overflow"}
"""Signals of layers that are drawn over steps, and their names."""
BINADE = "weight_binade@"


def over_training(cells: Sequence[Cell], by_kind: pd.DataFrame, path: Path) -> bool:
    """A row per kind of layer, a column per signal that is not 0 throughout, a line per format (means over seeds).

    False, and no file, where there is none. `cells`: of one arm and policy. `by_kind`: of
    `layer_signals.signals_by_kind`.
    """
    owners = {name: cell.format for cell in cells for name in cell.trial_ids}
    own = by_kind[by_kind["trial_id"].isin(owners) & by_kind["signal"].isin(OVER_TRAINING)]
    if own.empty:
        return False
    own = own.assign(format=own["trial_id"].map(owners))
    means = own.groupby(["kind", "signal", "format", "step"])["value"].mean()
    shown = {name: title for name, title in OVER_TRAINING.items() if (own["value"][own["signal"] == name] != 0).any()}
    if not shown:
        return False
    kinds = [kind for kind in KINDS if kind in means.index.get_level_values("kind")]
    names = sorted(set(own["format"]), key=format_order)
    with drawn(path, 0.8 + 1.25 * len(kinds)) as figure:
        grid = figure.subplots(len(kinds), len(shown), sharex=True, sharey="col", squeeze=False)
        for row, kind in enumerate(kinds):
            for axes, (signal, title) in zip(grid[row], shown.items(), strict=True):
                for name in names:
                    if (kind, signal, name) in means.index:
                        curve = means[kind, signal, name].sort_index()
                        axes.plot(curve.index, curve, lw=1.3, label=name, **look_of(name, len(curve)))
                if row == 0:
                    axes.set_title(title, fontsize=9)
                axes.tick_params(labelsize=8)
            grid[row][0].set_ylabel(kind, fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("step", fontsize=9)
        handles = [Line2D([], [], lw=1.3, label=name, **line_of(name)) for name in names]
        figure.legend(handles=handles, loc="outside upper center", ncols=9, frameon=False, fontsize=9)
    return True


def stiffness_field(formats: Sequence[str], binades: pd.Series, path: Path) -> bool:
    """Every format's spacing over magnitudes, and how many weights lie there; False without a histogram.

    `binades`: share of the weights by binade below the largest of their layer, binade 0 being its upper half.
    """
    names = sorted(dict.fromkeys(formats), key=format_order)
    if binades.empty or not names:
        return False
    last = max(12, int(binades.index[binades > 1e-4].max()) + 1)
    with drawn(path, 4.4) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
        counts = upper.twinx()
        counts.bar(-binades.index.to_numpy() - 0.5, binades, width=0.96, color=SOFT, alpha=0.25, zorder=0)
        counts.set_ylabel("share of weights (bars)")
        counts.spines["right"].set_visible(True)
        counts.grid(False)
        for name in names:
            depth, spacing = spacing_by_depth(name, last)
            upper.plot(depth, spacing, lw=1.4, label=name, **look_of(name, len(depth)))
        upper.set(ylabel="spacing, log2 of the layer's largest", ylim=(-last - 9, 0), xlim=(-last, 0))
        upper.legend(ncols=3, fontsize=8, loc="lower right", frameon=False)
        upper.set_zorder(counts.get_zorder() + 1)
        upper.patch.set_visible(False)
        for row, name in enumerate(names):
            fmt = get_format(name)
            values = fmt.values[fmt.values > 0].double().numpy() / fmt.max
            places = np.log2(values)
            lower.plot(places, np.full(len(places), row), "|", color=colour_of(name), ms=7, mew=0.8)
        lower.set_yticks(range(len(names)), names, fontsize=8)
        lower.set(ylim=(len(names) - 0.4, -0.6), xlabel="magnitude, log2 of the layer's largest weight")
        lower.grid(False, axis="y")
    return True


def spacing_by_depth(name: str, last: int) -> tuple[np.ndarray, np.ndarray]:
    """log2 of magnitudes from the largest down, and log2 of the format's spacing there, the largest value being 1."""
    fmt = get_format(name)
    values = fmt.values[fmt.values >= 0].double().numpy() / fmt.max
    depth = np.linspace(-last, 0, 40 * last, endpoint=False)
    above = np.searchsorted(values, 2.0**depth, side="right")
    return depth, np.log2(values[above] - values[above - 1])


def histogram(by_layer: pd.DataFrame) -> pd.Series:
    """Share of weights by binade, a mean over trials and layers, from signals named weight_binade@k (last look)."""
    own = by_layer[by_layer["signal"].str.startswith(BINADE)]
    if own.empty:
        return pd.Series(dtype=float)
    own = own[own["step"] == own["step"].max()]
    means: pd.Series = own.groupby(own["signal"].str.removeprefix(BINADE).astype(int))["value"].mean().sort_index()
    return means
