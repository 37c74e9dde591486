"""Simultaneous intervals for differences between cells, from few paired seeds.

Two runs with the same seed see the same initial weights and the same batches, so what is compared are the differences
d_1 … d_n of one seed each. With 3 to 10 seeds a difference's own variance is hardly known, and with dozens of
differences the least of the variances makes false findings. So the variances of one family of differences are
moderated: each is drawn towards what the others show, by half as much as an empirical-Bayes fit (Smyth 2004, "limma")
would draw it, because spreads differ between formats more than that model has it. And no interval is shorter than the
plain 95 % t interval of its own seeds: no difference is found by borrowed certainty alone.

    interval = mean ± max(t_ν(level) · s̃ / √n, t_{n-1}(gate) · s / √n)
    s̃² = (w s₀² + (n - 1) s²) / (w + n - 1),  w = min(d₀ / 2, 10 (n - 1)),  ν = min(w + n - 1, κ (n - 1))

s₀² and d₀ are the prior variance and its degrees of freedom; κ = (tr Σ)² / tr Σ² counts how many independent
variances the family holds (Box 1954), for its differences share cells: 8 × 3 interactions count as 7.5. `level`
comes from Šidák (1967), which needs no estimate of a correlation, at .03 for a family of 5 %: where spreads differ by
format or are heavy-tailed the realised error then stays below .05 (docs/bench/decisions.md).

Differences skewed in one direction break this as they break every other rule for so few seeds: rare bad seeds of one
arm alone look like a difference in the mean. The median is shown beside the mean for that reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]

ALPHA = 0.05
BORROWED_ALPHA = 0.03
"""What Šidák is given for a family of ALPHA whose variances are moderated; see the module."""
LEAST_TO_BORROW = 6
"""Of fewer differences each has its own variance only."""
POWER = 0.8
MOST_SEEDS = 60
MOST_PAIRED = 64
"""Candidates whose differences borrow from each other."""
LEAST_JOINT, MOST_EXACT = 6, 16
"""Seeds from which flips of signs can reach .05, and up to which all of them are looked at."""
FLIPS = 20_000
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Intervals:
    """Of m differences: `mean` ± `half` over `n` seeds each, `spread` s̃ on `df`; an infinite half where n < 2."""

    mean: Array
    half: Array
    n: NDArray[np.int64]
    spread: Array
    df: Array
    level: float


_COLUMNS = ("mean", "half", "n", "spread", "df")


def family_level(m: int, share: float = 1.0) -> float:
    """The two-sided level of each of m differences of which, 19 times in 20, none is found by chance.

    `share`: the part of that error which is theirs.
    """
    return float(1 - (1 - share * (ALPHA if m < LEAST_TO_BORROW else BORROWED_ALPHA)) ** (1 / max(m, 1)))


def intervals(
    differences: Array,
    weights: Array,
    level: float | None = None,
    *,
    gate: float = ALPHA,
    floor: float | Array = 0.0,
    counts: tuple[float, float] | None = None,
) -> Intervals:
    """Intervals of a family of differences: [seeds, m], NaN where a seed is lost.

    `weights` [m, cells]: each difference as a sum of cells, from which their correlation follows. `level`: two-sided,
    of each; None: `family_level(m)`. `floor`: the least standard deviations, for differences at float noise.
    `counts`: `independent(weights)`, where it is known.
    """
    values = np.asarray(differences, dtype=float)
    known = np.isfinite(values)
    n = known.sum(0)
    usable = n >= 2
    m = int(usable.sum())
    level = family_level(m) if level is None else level
    mean = np.divide(np.where(known, values, 0.0).sum(0), n, out=np.full(len(n), np.nan), where=n > 0)
    half, spread, df = (np.full(len(n), fill) for fill in (np.inf, np.nan, np.nan))
    if m:
        own_df = (n[usable] - 1).astype(float)
        squares = np.where(known, (values - mean) ** 2, 0.0).sum(0)[usable]
        least = np.maximum(np.broadcast_to(floor, len(n))[usable], 1e-150) ** 2
        own = np.maximum(squares / own_df, least)
        # The same in every seed, as scores of few documents may be by chance: that says nothing of the spread.
        constant = own <= least
        fitted = ~constant if not constant.all() else constant
        if counts is None or m < len(n) or not fitted.all():
            counts = independent(np.asarray(weights, dtype=float)[usable][fitted])
        weight, prior, total = _prior(own, own_df, fitted, counts)
        moderated = (weight * prior + own_df * own) / (weight + own_df)
        if not constant.all():
            moderated[constant] = (own * own_df)[~constant].sum() / own_df[~constant].sum()
        root = np.sqrt(n[usable])
        borrowed = special.stdtrit(total, 1 - level / 2) * np.sqrt(moderated) / root
        half[usable] = np.maximum(borrowed, special.stdtrit(own_df, 1 - gate / 2) * np.sqrt(own) / root)
        spread[usable], df[usable] = np.sqrt(moderated), total
    return Intervals(mean, half, n, spread, df, level)


def _prior(
    own: Array, own_df: Array, fitted: NDArray[np.bool_], counts: tuple[float, float]
) -> tuple[float, float, Array]:
    """The weight of the prior variance, that variance, and the degrees of freedom of each moderated one.

    `fitted`: the differences that the prior is fitted to; `counts`: `independent` of their weights.
    """
    all_df, (kappa, shared) = own_df, counts
    own, own_df = own[fitted], own_df[fitted]
    if len(own) < LEAST_TO_BORROW:
        return 0.0, 0.0, all_df
    logs = np.log(own) - special.digamma(own_df / 2) + np.log(own_df / 2)
    excess = float(logs.var(ddof=1) - (1 - shared) * special.polygamma(1, own_df / 2).mean())
    if excess > 1e-3:
        prior_df = 2 * float(optimize.brentq(lambda t: float(special.polygamma(1, t)) - excess, 1e-6, 1e6))
        prior = math.exp(float(logs.mean()) + float(special.digamma(prior_df / 2)) - math.log(prior_df / 2))
    else:
        prior_df, prior = math.inf, float((own * own_df).sum() / own_df.sum())
    weight = min(prior_df / 2, 10 * float(own_df.mean()))
    return weight, prior, np.minimum(weight + all_df, kappa * own_df.mean())


def independent(weights: Array) -> tuple[float, float]:
    """How many independent variances the differences count as (κ), and their mean squared correlation."""
    m = len(weights)
    products = weights @ weights.T
    lengths = np.sqrt(np.diag(products))
    squares = (products / np.outer(lengths, lengths)) ** 2
    return m**2 / float(squares.sum()), (float(squares.sum()) - m) / max(m * (m - 1), 1)


def best_set(gains: Array, weights: Array, *, floors: Array | None = None, alpha: float = ALPHA) -> list[bool]:
    """Of k candidates, which may be the best: gains [seeds, k], `weights` [k, cells], `floors` [k] of float noise.

    The truly best is among them but for `alpha`, once in 20 times (Gupta 1965; Hsu 1984): one leaves only where
    another is above it by more than their difference's interval. Of these comparisons only those of the true best can
    err, k - 1 of them. A candidate without a pair in common with the others stays.
    """
    k = gains.shape[1]
    stays = [True] * k
    pairs = [(a, b) for a in range(k) for b in range(a + 1, k)]
    if not pairs:
        return stays
    first, second = (list(side) for side in zip(*pairs, strict=True))
    # The correlations of thousands of pairs are not worth their gigabytes: each has its own variance then.
    contrasts = weights[first] - weights[second] if k <= MOST_PAIRED else None
    noise = np.zeros(k) if floors is None else floors
    floor = np.maximum(noise[first], noise[second])
    found = _without_ties(gains[:, first] - gains[:, second], contrasts, 2 * alpha / (k - 1), floor)
    for (a, b), mean, half in zip(pairs, found.mean, found.half, strict=True):
        if abs(mean) > half:
            stays[b if mean > 0 else a] = False
    return stays


def _without_ties(differences: Array, weights: Array | None, level: float, floor: Array) -> Intervals:
    """`intervals`, with differences that are tied in every seed as 0 ± 0: their variance would wreck the prior.

    Without `weights` no variance is borrowed.
    """
    known = np.isfinite(differences)
    tied = known.any(0) & np.where(known, np.abs(differences) <= floor, True).all(0)
    masked = np.where(tied, np.nan, differences)
    if weights is None:
        pairs = zip(masked.T, floor, strict=True)
        apart = [intervals(column[:, None], np.ones((1, 1)), level, floor=least) for column, least in pairs]
        joined = {name: np.concatenate([getattr(one, name) for one in apart]) for name in _COLUMNS}
        found = Intervals(**joined, level=level)
    else:
        found = intervals(masked, weights, level, floor=floor)
    found.mean[tied], found.half[tied] = 0.0, 0.0
    return found


def stop_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of "a and b stop and end alike": exact over all relabellings up to 8 seeds each, else by 20 000.

    Scores: infinite for a stopped run, else its loss minus the reference's at that seed. More stops are worse; with
    equal stops the ranks of the finished decide (Fisher's test with ties broken; worst ranks: Lachin 1999).
    """
    scores = np.array([*a, *b], dtype=float)
    stopped = np.isinf(scores)
    keys = np.where(stopped, 1e4, 0.0)
    keys[~stopped] = stats.rankdata(scores[~stopped]) - ((~stopped).sum() + 1) / 2
    if min(len(a), len(b)) < 2:
        return 1.0
    # Rounded: sums in another order must not be told apart.
    found = stats.permutation_test(
        (keys[: len(a)], keys[len(a) :]),
        lambda x, y, axis: np.round(x.sum(axis=axis), 6),
        permutation_type="independent",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)) if len(p) else p
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def max_t(differences: Array) -> Array:
    """Adjusted p of a family [seeds, m] by flipping the signs of whole seeds in all differences at once.

    Distribution-free but for symmetry about 0, whatever the variances (Westfall & Young 1993): over all 2^n flips up to
    16 seeds, over 20 000 drawn ones beyond. Lost seeds are NaN; a difference with fewer than 3 seeds has p NaN.
    ValueError for fewer than LEAST_JOINT seeds.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n < LEAST_JOINT:
        raise ValueError(f"n={n} seeds: the joint test takes {LEAST_JOINT} or more")
    known = np.isfinite(values)
    counts = known.sum(0)
    usable = counts >= 3
    found = np.full(values.shape[1], np.nan)
    if not usable.any():
        return found
    kept, counts = np.where(known, values, 0.0)[:, usable], counts[usable]
    squares = (kept**2).sum(0)
    observed = _abs_t(kept.sum(0)[None], squares, counts)[0]
    reached = np.zeros(len(counts))
    # |t| is the same for a flip and its opposite: the first seed's sign may stay.
    flips = 2 ** (n - 1) if n <= MOST_EXACT else FLIPS
    draw = np.random.default_rng(0)
    for start in range(0, flips, 4096):
        count = min(4096, flips - start)
        codes = start + np.arange(count)[:, None]
        bits = (codes >> np.arange(n)) & 1 if n <= MOST_EXACT else draw.integers(0, 2, (count, n))
        largest = _abs_t(np.asarray((1.0 - 2.0 * bits) @ kept, dtype=float), squares, counts).max(axis=1)
        reached += (largest[:, None] >= observed * (1 - TOLERANCE)).sum(axis=0)
    found[usable] = reached / flips if n <= MOST_EXACT else (reached + 1) / (flips + 1)
    return found


def _abs_t(sums: Array, squares: Array, n: Array) -> Array:
    """|t| of columns with these sums and sums of squares; infinite where all values are equal, not zero."""
    spread = squares - sums**2 / n
    equal = spread <= TOLERANCE * squares
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(sums) / np.sqrt(n * np.where(equal, 0.0, spread) / (n - 1))
    return np.asarray(np.where(squares == 0, 0.0, t), dtype=float)


def t_interval(values: Sequence[float] | Array, level: float = 1 - ALPHA) -> tuple[float, float]:
    """The plain two-sided t interval of one mean; (NaN, NaN) for fewer than two values."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return math.nan, math.nan
    half = float(special.stdtrit(len(sample) - 1, (1 + level) / 2)) * float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return float(sample.mean()) - half, float(sample.mean()) + half


def detectable(weights: Array, seeds: int) -> float:
    """The difference, in standard deviations, that a family of these weights decides with a power of .8.

    By simulating `intervals` itself on normal noise; infinite for one seed. The same for the same arguments.
    """
    plain = np.ascontiguousarray(weights, dtype=float)
    return _detectable(plain.tobytes(), plain.shape, seeds, max(200, min(1000, 40_000 // len(plain))))


@lru_cache(maxsize=256)
def _detectable(data: bytes, shape: tuple[int, int], seeds: int, studies: int) -> float:
    if seeds < 2:
        return math.inf
    weights = np.frombuffer(data).reshape(shape)
    unit = weights / np.sqrt((weights**2).sum(1, keepdims=True))
    draw = np.random.default_rng(0)
    needed, counts = [], independent(unit)
    for _ in range(studies):
        found = intervals(draw.standard_normal((seeds, shape[1])) @ unit.T, unit, counts=counts)
        # A true difference δ is decided, on its own side, where mean + δ > half.
        needed.append(found.half - found.mean)
    return float(np.quantile(np.concatenate(needed), POWER))


def more_seeds(distance: float, spread: float, n: int, level: float, kappa: float, gate: float = ALPHA) -> int | None:
    """How many seeds more decide, with a power of .8, whether a mean lies `distance` > 0 off a limit; None: over 60.

    Half a standard error is taken off the distance first: what was seen is by chance often too large. `kappa`: the
    family's number of independent variances, 1 without borrowing.
    """
    effect = distance / spread - 0.5 / math.sqrt(n)
    if not effect > 0:
        return None
    for total in range(n + 1, MOST_SEEDS + 1):
        own = total - 1
        powers = (_power(effect, total, level, max(1.0, min(kappa, 11.0)) * own), _power(effect, total, gate, own))
        if min(powers) >= POWER:
            return total - n
    return None


def _power(effect: float, n: int, level: float, df: float) -> float:
    limit = float(special.stdtrit(df, 1 - level / 2))
    shift = effect * math.sqrt(n)
    # Far out scipy's noncentral t is NaN, and the answer is 1.
    return 1.0 if shift > limit + 12 else float(stats.nct.sf(limit, df, shift))
