"""Pictures of signals over steps: one panel per arm, one line per format, so that formats compare within an arm.

Trials have a column `panel` that says in which they are drawn: their arm's, that of their policy and arm, or none ("")
for a reference that others are only measured from.

Seeds are drawn as their mean and its 95 % t interval. Axes are shared between the panels and cut to where runs
differ. What leaves the axis is not hidden: a stopped run ends in a cross, at the upper edge if that is where
it went. Of a long run every k-th point is drawn.

Each function writes one file and returns True, or returns False and writes nothing where there is nothing to
show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import blended_transform_factory
from scipy import special

from altgrad.analysis.cells import REFERENCE_ARM, REFERENCE_FORMAT, arm_order, format_order
from altgrad.analysis.figures import LINEAR, drawn
from altgrad.analysis.inference import ALPHA, Array
from altgrad.analysis.palette import BACK, INK, WARN, line_of, marked
from altgrad.analysis.records import FAILED
from altgrad.training.guards import DEFAULT_GUARDS

FLAT_YIELD, FLAT_COSINE = 0.1, 1e-3
"""Of signals that are 1 where nothing is wrong: panels of no more than this say nothing."""
LEAST_BAND = 3
"""Seeds from which a mean has a band."""
LINE = 0.165
"""Inches between two names beside lines."""
POINTS = 120
"""The most of a line that are drawn."""
Label = tuple[float, str, str, bool]
"""Where a line ends, its name, its format, and whether it reaches the last step."""


def loss_curves(trials: pd.DataFrame, rows: pd.DataFrame, path: Path) -> bool:
    """Training loss by format, one panel per arm, BF16 AdamW in each; False (no file) without rows."""
    curves, averaged = _curves(trials, rows, "train_loss")
    if not curves:
        return False
    reference = _reference_curve(trials, curves)
    last = max(int(curve.index[-1]) for curve in curves.values())
    low, high = _loss_limits(curves, reference, last)

    def panel(axes: Axes, arm: str) -> list[Label]:
        labels: list[Label] = []
        if reference is not None:
            shown = thinned(reference)
            axes.plot(shown.index, shown, lw=1.6, zorder=4, **look_of(REFERENCE_FORMAT, len(shown)))
            end = float(reference.iloc[-1])
            labels.append((end, f"BF16 {REFERENCE_ARM} {end:.2f}", REFERENCE_FORMAT, True))
        for name, members in _by_format(trials[trials["panel"] == arm]):
            if reference is None or (arm, name) != (REFERENCE_ARM, REFERENCE_FORMAT):
                labels += _draw_format(axes, name, members, curves, high)
        return labels

    _draw_panels(trials, path, "training loss, nats", averaged, (low, high), last, panel)
    return True


def excess_curves(trials: pd.DataFrame, rows: pd.DataFrame, path: Path) -> bool:
    """Training loss minus BF16 AdamW's at the same step and seed, one panel per arm; False without such
    pairs.

    The batches are the same, so their noise cancels. The axis is linear to ±0.02 nats and logarithmic beyond.
    """
    curves, averaged = _curves(trials, rows, "train_loss")
    found = trials[(trials["format"] == REFERENCE_FORMAT) & (trials["optimizer"] == REFERENCE_ARM)]
    found = found[found["trial_id"].isin(set(curves))]
    references = {seed: curves[trial_id] for seed, trial_id in zip(found["seed"], found["trial_id"], strict=True)}
    others = trials[
        ~trials["trial_id"].isin(set(found["trial_id"]))
        & trials["seed"].isin(set(references))
        & trials["trial_id"].isin(set(curves))
    ]
    excess = {
        trial_id: (curves[trial_id] - references[seed]).dropna()
        for seed, trial_id in zip(others["seed"], others["trial_id"], strict=True)
    }
    excess = {trial_id: curve for trial_id, curve in excess.items() if len(curve)}
    if not excess:
        return False
    last = max(int(curve.index[-1]) for curve in excess.values())
    late = pd.concat([curve[curve.index >= min(last / 8, curve.index[-1])] for curve in excess.values()])
    limits = (min(1.2 * float(late.min()), -LINEAR), max(1.2 * float(late.max()), LINEAR))

    def panel(axes: Axes, arm: str) -> list[Label]:
        axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.6)
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.plot([0, last], [0, 0], color=INK, lw=1.4, zorder=4)
        return [
            label
            for name, members in _by_format(others[others["panel"] == arm])
            for label in _draw_format(axes, name, members, excess, limits[1], "+.3f")
        ]

    _draw_panels(others, path, "training loss minus BF16's, nats", averaged, limits, last, panel)
    return True


def flip_yields(trials: pd.DataFrame, rows: pd.DataFrame, path: Path) -> bool:
    """Flip yield over steps by format, one panel per arm, with the guard's limit; False where none is.

    Arms in which all of it stays within FLAT_YIELD of 1 are left out, unless all do.
    """
    limit = next((rule.limit for rule in DEFAULT_GUARDS if rule.signal == "flip_yield"), None)

    def ground(axes: Axes, last: int) -> None:
        if limit is not None:
            axes.fill_between([0, last], 0, limit, color=WARN, alpha=0.07, lw=0)
            axes.plot([0, last], [limit, limit], color=WARN, lw=1.2, ls=":")
            axes.text(0, limit, f" stalled below {limit:g}", color=WARN, fontsize=8, va="bottom")

    def limits(values: pd.Series) -> tuple[float, float]:
        return 0.0, float(np.clip(1.1 * values.quantile(0.99), 1.05, 1.6))

    return _near_one(trials, rows, "flip_yield", path, FLAT_YIELD, limits, ground, ".2f")


def gradient_cosines(trials: pd.DataFrame, rows: pd.DataFrame, path: Path) -> bool:
    """Cosine of the gradient with the float32 shadow's over steps, one panel per arm; False where none was measured.

    Arms in which all of it stays within FLAT_COSINE of 1 are left out, unless all do.
    """

    def limits(values: pd.Series) -> tuple[float, float]:
        low = float(values.quantile(0.02))
        return low - 0.05 * (1 - low) - 1e-3, 1 + 0.02 * (1 - low) + 1e-3

    return _near_one(trials, rows, "gradient_cosine", path, FLAT_COSINE, limits, lambda *_: None, ".3f")


def _near_one(
    trials: pd.DataFrame,
    rows: pd.DataFrame,
    signal: str,
    path: Path,
    near: float,
    limits: Callable[[pd.Series], tuple[float, float]],
    ground: Callable[[Axes, int], None],
    form: str,
) -> bool:
    """A signal that is 1 where nothing is wrong; `limits` of all its values, `ground` draws under a panel's lines."""
    curves, averaged = _curves(trials, rows, signal)
    if not curves:
        return False
    measured = _without_flat(trials[trials["trial_id"].isin(set(curves))], curves, near)
    last = max(int(curve.index[-1]) for curve in curves.values())
    low, high = limits(pd.concat(list(curves.values())))

    def panel(axes: Axes, arm: str) -> list[Label]:
        ground(axes, last)
        return [
            label
            for name, members in _by_format(measured[measured["panel"] == arm])
            for label in _draw_format(axes, name, members, curves, high, form)
        ]

    _draw_panels(measured, path, signal.replace("_", " "), averaged, (low, high), last, panel)
    return True


def _without_flat(trials: pd.DataFrame, curves: Mapping[str, pd.Series], near: float) -> pd.DataFrame:
    """The trials of panels in which a curve leaves 1 by more than `near`; all, where none does."""
    moved = [name for name in trials["trial_id"] if (curves[name] - 1).abs().max() > near]
    panels = set(trials["panel"][trials["trial_id"].isin(moved)]) - {""}
    return trials[trials["panel"].isin(panels)] if panels else trials


def _draw_panels(
    trials: pd.DataFrame,
    path: Path,
    ylabel: str,
    averaged: str,
    limits: tuple[float, float],
    last: int,
    panel: Callable[[Axes, str], list[Label]],
) -> None:
    """One panel per name in the trials' column `panel`, two to a row, axes shared; `panel` draws one and returns the
    names of its lines."""
    arms = sorted({name for name in trials["panel"] if name}, key=arm_order)
    columns = min(2, len(arms))
    inner = max(2.2, LINE * (trials["format"].nunique() + 2))
    count = -(-len(arms) // columns)
    with drawn(path, (inner + 0.75) * count) as figure:
        grid = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False)
        for axes, arm in zip(grid.flat, arms, strict=False):
            labels = panel(axes, arm)
            axes.set(title=arm, xlabel=f"step ({averaged})", ylim=limits, xlim=(0, last * (1.2 + 0.12 * columns)))
            axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
            axes.tick_params(labelbottom=True)
            _label_ends(axes, last, labels, LINE / inner)
        for axes in grid.flat[len(arms) :]:
            axes.set_visible(False)
        figure.supylabel(ylabel, fontsize=10)


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _tick(value: float, _: int | None) -> str:
    return _minus(f"{value:+.2g}") if value else "0"


def _by_format(trials: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    groups = [(str(name), group) for name, group in trials.groupby("format")]
    return sorted(groups, key=lambda item: format_order(item[0]))


def _curves(trials: pd.DataFrame, rows: pd.DataFrame, signal: str) -> tuple[dict[str, pd.Series], str]:
    """The finite values by trial and step, as running means of a twentieth of them, and so in words."""
    kept = rows[rows["trial_id"].isin(set(trials["trial_id"])) & np.isfinite(rows[signal])]
    values = kept.set_index("step")[signal]
    groups = {str(trial_id): own for trial_id, own in values.groupby(kept["trial_id"].to_numpy())}
    if not groups:
        return {}, ""
    apart = [np.diff(own.index).min() for own in groups.values() if len(own) > 1]
    spacing = int(min(apart or [own.index[0] for own in groups.values()]))
    window = max(1, int(kept["step"].max()) // 20 // spacing)
    if window == 1:
        return groups, "each step" if spacing == 1 else f"every {spacing} steps"
    means = {trial_id: own.rolling(window, min_periods=1).mean() for trial_id, own in groups.items()}
    return means, f"mean of {window * spacing} steps"


def _reference_curve(trials: pd.DataFrame, curves: Mapping[str, pd.Series]) -> pd.Series | None:
    found = trials[(trials["format"] == REFERENCE_FORMAT) & (trials["optimizer"] == REFERENCE_ARM)]
    own = [curves[trial_id] for trial_id in found["trial_id"] if trial_id in curves]
    return pd.concat(own, axis=1).mean(axis=1) if own else None


def _draw_format(
    axes: Axes, name: str, members: pd.DataFrame, curves: Mapping[str, pd.Series], top: float, form: str = ".2f"
) -> list[Label]:
    """Draws the seeds' mean with its interval, and each stopped run alone with a cross; returns the lines' names."""
    labels: list[Label] = []
    running = []
    for trial_id, state, step in zip(members["trial_id"], members["state"], members["step"], strict=True):
        if trial_id not in curves:
            continue
        if state != FAILED:
            running.append(curves[trial_id])
            continue
        curve = thinned(curves[trial_id])
        end, look = min(float(curve.iloc[-1]), top), look_of(name, len(curve))
        axes.plot(curve.index, curve, lw=1.1, alpha=0.8, **look)
        cross = {"color": look["color"], "mec": BACK, "mew": 0.7, "ms": 8}
        axes.plot(curve.index[-1:], [end], "X", clip_on=False, zorder=5, **cross)
        labels = [(end, f"× {name} at {step:.0f}", name, False)]
    if running:
        steps, mean, half = over_seeds(running)
        look = look_of(name, len(steps))
        if len(running) == 2:
            for curve in map(thinned, running):
                axes.plot(curve.index, curve, color=look["color"], lw=0.5, alpha=0.6)
        elif len(running) > 2:
            axes.fill_between(steps, mean - half, mean + half, color=look["color"], alpha=0.12, lw=0)
        axes.plot(steps, mean, lw=1.5, **look)
        labels.append((float(mean[-1]), _minus(f"{name} {mean[-1]:{form}}"), name, True))
    return labels


def thinned(curve: pd.Series) -> pd.Series:
    """Every k-th value, and the last, so that no more than POINTS are left."""
    return curve.iloc[_kept(len(curve))]


def _kept(count: int) -> list[int]:
    stride = -(-count // (POINTS - 1))
    return sorted({*range(0, count, stride), count - 1}) if count else []


def over_seeds(curves: Sequence[pd.Series]) -> tuple[Array, Array, Array]:
    """Steps, thinned; the mean of the curves at each, and half its 95 % t interval.

    That is NaN where fewer than three have a value: of two it is nine times their distance, and hides all else.
    """
    steps = curves[0].index
    if not all(curve.index.equals(steps) for curve in curves[1:]):
        steps = pd.Index(sorted(set().union(*(curve.index for curve in curves))))
    kept = steps[_kept(len(steps))]
    # Plain arrays: a frame for each line of each panel takes longer than drawing it.
    values = np.array([curve.reindex(kept).to_numpy(dtype=float) for curve in curves])
    known = np.isfinite(values)
    n = known.sum(axis=0)
    mean = np.divide(np.where(known, values, 0.0).sum(axis=0), n, out=np.full(len(kept), np.nan), where=n > 0)
    squares = np.where(known, (values - mean) ** 2, 0.0).sum(axis=0)
    df = np.where(n >= LEAST_BAND, n - 1.0, np.nan)
    half = special.stdtrit(df, 1 - ALPHA / 2) * np.sqrt(squares / df / np.maximum(n, 1))
    return kept.to_numpy(dtype=float), mean, half


def look_of(name: str, points: int) -> dict[str, Any]:
    return line_of(name) | {"markevery": marked(points, name)}


def _loss_limits(curves: Mapping[str, pd.Series], reference: pd.Series | None, last: int) -> tuple[float, float]:
    """From below the least loss to a little above the ends of the runs, but no higher than 1.35 times the
    reference's end.

    The reference's own last two thirds are always in view (the median run's, where there is no reference).
    """
    guide = reference if reference is not None else pd.concat(list(curves.values()), axis=1).median(axis=1)
    after = guide[guide.index >= last / 3]
    low = min(float(curve.min()) for curve in curves.values())
    ends = max((float(curve.iloc[-1]) for curve in curves.values() if curve.index[-1] == last), default=low)
    end = float(guide.iloc[-1])
    early = float(after.iloc[0] if len(after) else guide.iloc[0])
    high = max(min(1.04 * ends, 1.35 * end), early, 1.02 * low)
    return low - 0.04 * (high - low), high


def _label_ends(axes: Axes, last: int, labels: Sequence[Label], gap: float) -> None:
    """Writes names beside the ends of the lines, at least `gap` (a share of the axis) apart and within it."""
    low, high = axes.get_ylim()
    to_share = axes.transData + axes.transAxes.inverted()
    ordered = sorted(labels, key=lambda label: (min(max(label[0], low), high), label[1]))
    shares = [float(to_share.transform((0, min(max(value, low), high)))[1]) for value, *_ in ordered]
    blend = blended_transform_factory(axes.transData, axes.transAxes)
    places = spread(shares, gap, 1.0)
    for (_, text, name, reaches), share, place in zip(ordered, shares, places, strict=True):
        look = line_of(name)
        if reaches:
            ends = [last * 1.005, last * 1.045]
            axes.plot(ends, [share, place], lw=0.7, clip_on=False, transform=blend, markevery=[1], **look)
        axes.text(last * 1.075, place, text, fontsize=8, va="center", clip_on=False, transform=blend)


def spread(values: Sequence[float], gap: float, high: float) -> list[float]:
    """Ascending places near ascending `values`, at least `gap` apart, none above `high`."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap) if places else value)
    ceiling = high
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return places
