"""The statistics: small samples of seeds, paired, exact, and corrected for the number of questions.

Two runs with the same seed see the same initial weights and the same batches, so their difference is far
steadier than either loss. Everything here works on such paired differences d_1 … d_n (nats), one per seed.

* Interval: mean ± t(0.975, n - 1) · s / sqrt(n). With 2 seeds the factor is 12.7: wide, and rightly so.
* Sign-flip test: under "no difference" each d_i is as likely negative as positive, so p is the share of the
  2^n sign assignments whose |sum| reaches the observed one. Exact, no normality; but no n can give a p below
  2 / 2^n: .5 with 2 seeds, .0625 with 5, .031 with 6. A table of cells tested with 2 seeds decides nothing
  finer than failure.
* Many cells: Holm's step-down, which with few seeds can never reach .05 (8 cells at 6 seeds: 8 x .031). From
  6 seeds on, when all cells share their seeds, the joint max-T test flips the signs of whole seeds in all
  cells at once and compares each |t| with the largest (Westfall & Young 1993), which keeps the cells'
  correlation and costs far less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

JOINT_SEEDS = range(6, 21)
EXACT_SEEDS = 40
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Paired:
    """n paired differences: mean, 95 % t-interval (NaN below 2), exact sign-flip p, its least value."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    p_floor: float


def paired(differences: Sequence[float]) -> Paired:
    """The summary of finite differences; ValueError where one is not finite or there is none."""
    values = np.asarray(differences, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences={list(differences)!r}: allowed are one or more finite numbers")
    low, high = t_interval(values)
    return Paired(len(values), float(values.mean()), low, high, sign_flip_p(values), p_floor(len(values)))


def t_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The two-sided t-interval of the mean; (NaN, NaN) for fewer than two values."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return math.nan, math.nan
    quantile = float(special.stdtrit(len(sample) - 1, (1 + level) / 2))
    half = quantile * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def p_floor(n: int) -> float:
    """The smallest two-sided p that a sign-flip test of n differences can give."""
    return min(1.0, 2.0 ** (1 - n))


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of "the mean is zero" over all 2^n sign assignments: exact to n = 40, by their normal limit beyond.

    Sums of the two halves are enumerated apart and counted against each other, so the cost is 2^(n/2).
    """
    values = np.asarray(differences, dtype=float)
    if len(values) > EXACT_SEEDS:
        root = math.sqrt(float((values**2).sum()))
        return 1.0 if not root else float(2 * special.ndtr(-abs(float(values.sum())) / root))
    scale = float(np.abs(values).sum())
    threshold = abs(float(values.sum())) - TOLERANCE * scale
    if threshold <= 0:
        return 1.0
    left, right = _signed_sums(values[::2]), np.sort(_signed_sums(values[1::2]))
    reached = len(right) * len(left) - np.searchsorted(right, threshold - left, side="left").sum()
    return min(1.0, 2.0 * float(reached) / 2.0 ** len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)) if len(p) else p
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def max_t(differences: np.ndarray) -> list[float]:
    """Joint max-T adjusted p of a table (seeds x cells), exact over all 2^n sign flips of whole seeds."""
    n, cells = differences.shape
    if n not in JOINT_SEEDS:
        raise ValueError(f"n={n} seeds: the joint test takes {JOINT_SEEDS.start} to {JOINT_SEEDS.stop - 1}")
    squares = (differences**2).sum(axis=0)
    observed = _abs_t(differences.sum(axis=0)[None], squares, n)[0]
    reached = np.zeros(cells)
    # |t| is the same for a flip and its opposite: the first seed's sign may stay.
    count = 2 ** (n - 1)
    for start in range(0, count, 4096):
        codes = np.arange(start, min(start + 4096, count))
        signs = 1.0 - 2.0 * ((codes[:, None] >> np.arange(n)) & 1)
        largest = _abs_t(signs @ differences, squares, n).max(axis=1)
        reached += (largest[:, None] >= observed * (1 - TOLERANCE)).sum(axis=0)
    return [float(value) for value in reached / count]


def adjust(tables: Sequence[dict[int, float]]) -> tuple[list[float], str]:
    """Adjusted p values for cells given as {seed: difference}, and the name of the method used.

    Joint max-T where all cells share 6 to 20 seeds, Holm elsewhere.
    """
    seeds = sorted({seed for table in tables for seed in table})
    if len(seeds) in JOINT_SEEDS and all(len(table) == len(seeds) for table in tables):
        return max_t(np.array([[table[seed] for table in tables] for seed in seeds])), "joint max-T"
    return holm([sign_flip_p(list(table.values())) for table in tables]), "Holm"


def signed(value: float) -> str:
    """A difference with its sign, three decimals and a true minus; what rounds to zero has a plus."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def _signed_sums(values: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _abs_t(sums: np.ndarray, squares: np.ndarray, n: int) -> np.ndarray:
    """|t| of columns with these sums and sums of squares; infinite where all values are equal, not zero."""
    spread = squares - sums**2 / n
    equal = spread <= TOLERANCE * squares
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(sums) / np.sqrt(n * np.where(equal, 0.0, spread) / (n - 1))
    return np.where(squares == 0, 0.0, t)
