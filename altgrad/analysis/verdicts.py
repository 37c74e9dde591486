"""Whether a format trains or fails, as tested statements about a margin over BF16's loss.

What is measured is log(loss / BF16's loss) at each seed, against M = log(1 + margin). An arm trains if its interval
lies below M, and a format if one of its arms does; an arm fails if its interval lies above M, and a format if all of
its arms do. Tests on either side (Schuirmann 1987), corrected over all arms where one is enough, over the formats where
all have to agree (Berger 1982): of each 20 sweeps at most one says anything false of any format.

A stopped run has no loss. An arm with one never trains; whether it fails is judged with the loss of the run's first
step in its place, a composite endpoint (ICH E9 R1). An arm that ends no lower than it began has not learned, and does
not train either. A format of which an arm has no result (all runs lost or pruned) cannot be said to fail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from altgrad.analysis.cells import Cell, Key, mean_of_known
from altgrad.analysis.contrasts import table, weights_of, without_repeats
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
    seeds_needed: int | None = None


@dataclass(frozen=True)
class FormatVerdict:
    """On the formats named (one grid may have two names), by the verdicts on their arms, the best first."""

    formats: tuple[str, ...]
    word: Word
    arms: tuple[Verdict, ...]

    @property
    def best(self) -> Verdict:
        """The arm that stands for the format: one that trains, else the best by rank."""
        return next((arm for arm in self.arms if arm.word == "trains"), self.arms[0])


def verdicts(cells: Sequence[Cell], reference: Cell, margin: float, tolerance: float) -> dict[Key, Verdict]:
    """On every 8-bit cell, by its key; `tolerance`: what two losses differ by as float noise."""
    judged = [cell for cell in cells if cell.is_judged]
    usable = [cell for cell in judged if cell.has_result and not cell.exploratory]
    names = list(dict.fromkeys(cell.format for cell in usable))
    firsts = {name: group[0] for group in twin_groups(usable, names, tolerance) for name in group}
    arms = len({(firsts[cell.format], cell.arm, cell.policy) for cell in usable})
    formats = len({(firsts[cell.format], cell.policy) for cell in usable})
    limit = math.log1p(margin)
    found = {cell.key: Verdict(cell, "open" if cell.has_result else "no result") for cell in judged}
    if not usable:
        return found
    trains = _bounds([cell for cell in usable if not cell.stops], reference, 2 * ALPHA / arms)
    fails = _bounds(usable, reference, 2 * ALPHA / arms)
    format_fails = _bounds(usable, reference, 2 * ALPHA / formats)
    for cell in usable:
        own = trains.get(cell.key)
        above, as_format = fails[cell.key], format_fails[cell.key]
        shown = own or above
        if shown is None or above is None or as_format is None:
            continue
        word: Word = "open"
        if own is not None and own.high < limit and cell.learned:
            word = "trains"
        elif above.low > limit:
            word = "fails"
        found[cell.key] = Verdict(
            cell,
            word,
            math.expm1(shown.mean),
            math.expm1(shown.low),
            math.expm1(shown.high),
            as_format.low > limit,
            shown.needed(limit) if word == "open" else None,
        )
    return found


def format_verdicts(cells: Sequence[Cell], found: dict[Key, Verdict], tolerance: float) -> list[FormatVerdict]:
    """One for each 8-bit format among the cells, in their order; formats that are one grid together."""
    names = list(dict.fromkeys(cell.format for cell in cells if cell.is_judged))
    judged = []
    for group in twin_groups(cells, names, tolerance):
        own = [cell for cell in cells if cell.format == group[0] and cell.is_judged]
        arms = tuple(found[cell.key] for cell in sorted(own, key=lambda cell: cell.rank))
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


def twin_groups(cells: Sequence[Cell], names: Sequence[str], tolerance: float) -> list[list[str]]:
    """The formats, those together whose runs are the same in every arm and seed that both have finished.

    E0M7 and E1M6 are one grid up to a power of two. The literal gradient mode, whose steps depend on the name, is
    exempt.
    """
    by_key = {cell.key: cell for cell in cells}

    def are_same(a: str, b: str) -> bool:
        pairs = [
            (cell, by_key[b, cell.arm, cell.policy])
            for cell in cells
            if cell.format == a and cell.family != "manifold_gradient" and (b, cell.arm, cell.policy) in by_key
        ]
        shared = [
            abs(own.losses[seed] - other.losses[seed])
            for own, other in pairs
            for seed in own.losses.keys() & other.losses.keys()
        ]
        alike = all(own.stops.keys() == other.stops.keys() for own, other in pairs)
        return bool(shared) and alike and max(shared) <= tolerance

    groups: list[list[str]] = []
    for name in names:
        home = next((group for group in groups if are_same(group[0], name)), None)
        if home is None:
            groups.append([name])
        else:
            home.append(name)
    return groups


def twin_control(cells: Sequence[Cell]) -> tuple[int, float] | None:
    """How many pairs of runs differ only in E0M7 against E1M6, and their largest difference, nats; or None.

    The two are one grid up to a power of two, which the scale takes up: a difference is a fault. The literal gradient
    mode is exempt, its stiffness differs by definition.
    """
    by_key = {cell.key: cell for cell in cells}
    found = [
        abs(loss - twin.losses[seed])
        for (name, arm, policy), cell in by_key.items()
        if name == "E0M7"
        and cell.family != "manifold_gradient"
        and (twin := by_key.get(("E1M6", arm, policy))) is not None
        and twin.lr == cell.lr
        for seed, loss in cell.losses.items()
        if seed in twin.losses
    ]
    return (len(found), max(found)) if found else None


def survival(cell: Cell) -> tuple[float, float]:
    """The exact 95 % interval (Clopper and Pearson) of the share of the cell's runs that finish."""
    interval = stats.binomtest(len(cell.losses), cell.n).proportion_ci(1 - ALPHA)
    return float(interval.low), float(interval.high)


def open_stop_rate(n: int) -> float:
    """The stop rate that n clean runs leave possible at 95 %."""
    return float(1 - ALPHA ** (1 / n))


@dataclass(frozen=True)
class _Bounds:
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


def _bounds(cells: Sequence[Cell], reference: Cell, level: float) -> dict[Key, _Bounds | None]:
    """Intervals of log(loss / reference's) at this two-sided level; None where a cell has fewer than 2 seeds."""
    columns = [_ratios(cell, reference) for cell in cells]
    if not any(columns):
        return dict.fromkeys((cell.key for cell in cells), None)
    floor = 16 * float(np.finfo(np.float32).eps)
    firsts = without_repeats(columns, floor)
    values = table(columns)
    weights = weights_of([((cell, 1), (reference, -1)) for cell in cells])
    known = np.isfinite(values)
    # A cell that is BF16's in every seed has no variance of its own, and would leave none to the others.
    tied = np.asarray(known.any(0) & np.where(known, np.abs(values) <= floor, True).all(0))
    masked = np.where(tied | (np.array(firsts) != np.arange(len(cells))), np.nan, values)
    result = intervals(masked, weights, level, floor=floor)
    kappa = independent(weights)[0] if len(cells) > 1 else 1.0
    found: dict[Key, _Bounds | None] = {}
    for own, (cell, place) in enumerate(zip(cells, firsts, strict=True)):
        n, mean, half = int(known[:, own].sum()), float(result.mean[place]), float(result.half[place])
        if tied[place]:
            found[cell.key] = _Bounds(0.0, 0.0, 0.0, 0.0, n, level, kappa) if n > 1 else None
        elif n > 1:
            found[cell.key] = _Bounds(mean, mean - half, mean + half, float(result.spread[place]), n, level, kappa)
        else:
            found[cell.key] = None
    return found


def _ratios(cell: Cell, reference: Cell) -> dict[int, float]:
    """log(loss / reference's) by seed; of a stopped run with the loss of its first step."""
    starts = mean_of_known([*cell.starts.values(), *reference.starts.values()])
    ends = dict(cell.losses)
    for seed in cell.stops:
        start = cell.starts.get(seed, math.nan)
        ends[seed] = starts if math.isnan(start) else start
    return {
        seed: math.log(max(end, LEAST) / max(reference.losses[seed], LEAST))
        for seed, end in ends.items()
        if seed in reference.losses and not math.isnan(end)
    }
