"""Whether a format trains or fails, as tested statements about a margin over BF16's loss.

What is measured is log(loss / BF16's loss) at each seed, against M = log(1 + margin). An arm trains if its interval
lies below M, and a format if one of its arms does; an arm fails if its interval lies above M, and a format if all of
its arms do. Tests on either side (Schuirmann 1987), corrected over all arms where one is enough, over the formats where
all have to agree (Berger 1982): of each 20 sweeps at most one says anything false of any format.

A stopped run has no loss. An arm with one never trains; whether it fails is judged with the loss of the run's first
step in its place, a composite endpoint (ICH E9 R1). An arm that ends no lower than it began has not learned, and does
not train either. Nor is an arm said to train with a run that needed a shift to another format: such a run is left out,
and what the others reach is not what the format always does. A format of which an arm has no result (all runs lost,
pruned or shifted) cannot be said to fail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from altgrad.analysis.cells import Cell, Key, mean_of_known
from altgrad.analysis.contrasts import table, weights_of
from altgrad.analysis.inference import ALPHA, independent, intervals, more_seeds

Word = Literal["trains", "fails", "open", "no result"]
LEAST = 1e-9
"""Of an error that may be 0, for its logarithm."""


@dataclass(frozen=True)
class Verdict:
    """On one cell: what is decided, and its excess over BF16, relative (.1 is 10 %), with the interval of that."""

    cell: Cell
    word: Word
    excess: float = math.nan
    low: float = -math.inf
    high: float = math.inf
    fails_as_format: bool = False
    """Whether it is above the margin by the level of a format, which takes all of its arms."""
    bounds: Bounds | None = None
    limit: float = 0.0

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds more would decide on which side of the margin it lies; None: over 60."""
        return None if self.bounds is None else self.bounds.needed(self.limit)


@dataclass(frozen=True)
class FormatVerdict:
    """On the formats named (one grid may have two names), by the verdicts on their arms, the best first."""

    formats: tuple[str, ...]
    word: Word
    arms: tuple[Verdict, ...]

    @property
    def lacking(self) -> tuple[Verdict, ...]:
        """The arms without a result, where all others fail."""
        lacking = tuple(arm for arm in self.arms if arm.word == "no result")
        return lacking if lacking and all(a.word == "no result" or a.fails_as_format for a in self.arms) else ()

    @property
    def best(self) -> Verdict:
        """The arm that stands for the format: one that trains, else the best by rank."""
        return next((arm for arm in self.arms if arm.word == "trains"), self.arms[0])


def verdicts(cells: Sequence[Cell], reference: Cell, margin: float, twins: Mapping[str, str]) -> dict[Key, Verdict]:
    """On every 8-bit cell, by its key; `twins`: each format's first twin, which count once."""
    judged = [cell for cell in cells if cell.is_judged]
    usable = [cell for cell in judged if cell.has_result and not cell.exploratory and not reference.exploratory]
    arms = len({(twins[cell.format], cell.arm, cell.policy) for cell in usable})
    formats = len({(twins[cell.format], cell.policy) for cell in usable})
    limit = math.log1p(margin)
    found = {cell.key: Verdict(cell, "open" if cell.has_result else "no result") for cell in judged}
    if not usable:
        return found
    trains = _bounds([cell for cell in usable if not cell.stops], reference, 2 * ALPHA / arms, twins)
    fails = _bounds(usable, reference, 2 * ALPHA / arms, twins)
    format_fails = _bounds(usable, reference, 2 * ALPHA / formats, twins)
    for cell in usable:
        own = trains.get(cell.key)
        above, as_format = fails[cell.key], format_fails[cell.key]
        shown = own or above
        if shown is None or above is None or as_format is None:
            continue
        word: Word = "open"
        if own is not None and own.high < limit and cell.learned and not cell.shifted:
            word = "trains"
        elif above.low > limit:
            word = "fails"
        found[cell.key] = Verdict(
            cell,
            word,
            _relative(shown.mean),
            _relative(shown.low),
            _relative(shown.high),
            as_format.low > limit,
            shown,
            limit,
        )
    return found


def _relative(log_ratio: float) -> float:
    """1.1 for log(2.1); infinity where that is no number any more."""
    return math.expm1(log_ratio) if log_ratio < 700 else math.inf


def format_verdicts(
    cells: Sequence[Cell], found: Mapping[Key, Verdict], twins: Mapping[str, str]
) -> list[FormatVerdict]:
    """One for each 8-bit format among the cells, in their order; formats that are one grid together."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(cell.format for cell in cells if cell.is_judged):
        groups.setdefault(twins[name], []).append(name)
    judged = []
    for group in groups.values():
        # Of an arm under two names the one with more seeds.
        by_arm: dict[str, Cell] = {}
        for cell in cells:
            if cell.is_judged and cell.format in group and (cell.arm not in by_arm or cell.n > by_arm[cell.arm].n):
                by_arm[cell.arm] = cell
        arms = tuple(found[cell.key] for cell in sorted(by_arm.values(), key=lambda cell: cell.rank))
        words = [arm.word for arm in arms]
        word: Word = "open"
        if "trains" in words:
            word = "trains"
        elif all(item == "no result" for item in words):
            word = "no result"
        elif all(arm.fails_as_format for arm in arms):
            word = "fails"
        judged.append(FormatVerdict(tuple(group), word, arms))
    return judged


def survival(cell: Cell) -> tuple[float, float]:
    """The exact 95 % interval (Clopper and Pearson) of the share of the cell's runs that finish."""
    interval = stats.binomtest(len(cell.losses), cell.n).proportion_ci(1 - ALPHA)
    return float(interval.low), float(interval.high)


def open_stop_rate(n: int) -> float:
    """The stop rate that n clean runs leave possible at 95 %."""
    return float(1 - ALPHA ** (1 / n))


@dataclass(frozen=True)
class Bounds:
    """An interval of log(loss / BF16's), and what it follows from."""

    mean: float
    low: float
    high: float
    spread: float
    n: int
    level: float
    kappa: float

    def needed(self, limit: float) -> int | None:
        distance = abs(limit - self.mean)
        return more_seeds(distance, self.spread, self.n, self.level, self.kappa) if self.spread > 0 else None


def _bounds(cells: Sequence[Cell], reference: Cell, level: float, twins: Mapping[str, str]) -> dict[Key, Bounds | None]:
    """Intervals of log(loss / reference's) at this two-sided level; None where a cell has fewer than 2 seeds."""
    columns = [_ratios(cell, reference) for cell in cells]
    if not any(columns):
        return dict.fromkeys((cell.key for cell in cells), None)
    floor = 16 * float(np.finfo(np.float32).eps)
    places = _places(cells, columns, twins)
    values = table(columns)
    weights = weights_of([((cell, 1), (reference, -1)) for cell in cells])
    known = np.isfinite(values)
    # A cell that is BF16's in every seed has no variance of its own, and would leave none to the others.
    tied = np.asarray(known.any(0) & np.where(known, np.abs(values) <= floor, True).all(0))
    masked = np.where(tied | (np.array(places) != np.arange(len(cells))), np.nan, values)
    result = intervals(masked, weights, level, floor=floor)
    kappa = independent(weights)[0] if len(cells) > 1 else 1.0
    found: dict[Key, Bounds | None] = {}
    for cell, place in zip(cells, places, strict=True):
        n, mean, half = int(known[:, place].sum()), float(result.mean[place]), float(result.half[place])
        if tied[place]:
            found[cell.key] = Bounds(0.0, 0.0, 0.0, 0.0, n, level, kappa) if n > 1 else None
        elif n > 1:
            found[cell.key] = Bounds(mean, mean - half, mean + half, float(result.spread[place]), n, level, kappa)
        else:
            found[cell.key] = None
    return found


def _places(cells: Sequence[Cell], columns: Sequence[Mapping[int, float]], twins: Mapping[str, str]) -> list[int]:
    """For each cell the place of the one that stands for it and its twins: that with the most seeds."""
    groups: dict[Key, list[int]] = {}
    for i, cell in enumerate(cells):
        groups.setdefault((twins[cell.format], cell.arm, cell.policy), []).append(i)
    found = list(range(len(cells)))
    for group in groups.values():
        best = max(group, key=lambda i: len(columns[i]))
        for i in group:
            found[i] = best
    return found


def _ratios(cell: Cell, reference: Cell) -> dict[int, float]:
    """log(loss / reference's) by seed; of a stopped run with the loss of its first step."""
    starts = mean_of_known([*cell.starts.values(), *reference.starts.values()])
    ends = dict(cell.losses)
    for seed in cell.stops:
        start = cell.starts.get(seed, math.nan)
        ends[seed] = start if math.isfinite(start) else starts
    return {
        seed: math.log(max(end, LEAST) / max(reference.losses[seed], LEAST))
        for seed, end in ends.items()
        if seed in reference.losses and math.isfinite(end)
    }
