"""The statistics against scipy, enumeration by brute force, and their own limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from altgrad.analysis.inference import (
    ALPHA,
    best_set,
    detectable,
    family_level,
    holm,
    independent,
    intervals,
    max_t,
    more_seeds,
    stop_test,
    t_interval,
)


def apart(m: int) -> np.ndarray:
    """m differences that share no cell."""
    return np.kron(np.eye(m), [1.0, -1.0])


def noise(seeds: int, m: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).normal(0.1, np.linspace(1, 2, m), (seeds, m))


@pytest.mark.parametrize("n", [2, 3, 6, 20])
def test_t_interval_equals_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    oracle = scipy_stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy_stats.sem(values))
    assert t_interval(values) == pytest.approx(oracle)
    assert all(map(math.isnan, t_interval([1.0])))


def test_few_differences_have_their_own_t_intervals_at_sidaks_level() -> None:
    values = noise(4, 5)
    found = intervals(values, apart(5))
    for column in range(5):
        low, high = t_interval(values[:, column], 0.95 ** (1 / 5))
        assert found.half[column] == pytest.approx((high - low) / 2)
    assert found.level == pytest.approx(1 - 0.95 ** (1 / 5))


@pytest.mark.parametrize(("n", "m"), [(3, 24), (6, 8), (10, 6)])
def test_no_interval_is_shorter_than_the_plain_one(n: int, m: int) -> None:
    values = noise(n, m)
    found = intervals(values, apart(m))
    plain = [(high - low) / 2 for low, high in map(t_interval, values.T)]
    assert (found.half >= np.array(plain) - 1e-12).all()
    assert (found.half < [12 * half for half in plain]).all()


def test_equal_variances_are_pooled_and_unequal_ones_are_not() -> None:
    draw = np.random.default_rng(1)
    values = draw.normal(size=(4, 30))
    same = intervals(values, apart(30))
    assert same.spread.std() < 0.7 * values.std(0, ddof=1).std(), "all noise: the spreads of 4 seeds are drawn together"
    assert (same.df > 4).all()
    far = draw.normal(size=(4, 30)) * np.geomspace(1e-3, 1e3, 30)
    own = far.std(0, ddof=1)
    assert np.abs(np.log(intervals(far, apart(30)).spread / own)).mean() < 0.3, "a thousandfold apart, each is its own"


def test_differences_that_share_cells_count_as_fewer() -> None:
    assert independent(apart(8))[0] == pytest.approx(8)
    shared = np.hstack([np.eye(8), -np.ones((8, 1))])
    assert independent(shared)[0] == pytest.approx(64 / (8 + 56 * 0.25))


def test_a_lost_seed_costs_its_difference_a_seed_and_no_other() -> None:
    values = noise(4, 5)
    values[2, 1] = np.nan
    found = intervals(values, apart(5))
    whole = intervals(noise(4, 5), apart(5))
    assert found.n.tolist() == [4, 3, 4, 4, 4]
    kept = [0, 2, 3, 4]
    assert found.half[kept] == pytest.approx(whole.half[kept]) and found.mean[kept] == pytest.approx(whole.mean[kept])
    low, high = t_interval(np.delete(values[:, 1], 2), 0.95 ** (1 / 5))
    assert found.half[1] == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("m", [4, 12])
def test_a_difference_that_is_the_same_in_every_seed_takes_the_spread_of_the_others(m: int) -> None:
    values = noise(4, m)
    values[:, 0] = 0.01
    found, without = intervals(values, apart(m)), intervals(values[:, 1:], apart(m - 1), family_level(m))
    assert found.half[0] > 0.5 * found.half[1:].min(), "three equal scores of few documents are no certainty"
    assert found.half[1:] == pytest.approx(without.half), "and take nothing from the others"
    constant = intervals(np.full((4, m), 0.01), apart(m), floor=1e-6)
    assert (constant.half < 1e-4).all()


def test_fewer_than_two_seeds_say_nothing() -> None:
    values = noise(3, 7)
    values[1:, 0] = np.nan
    found = intervals(values, apart(7))
    assert math.isinf(found.half[0]) and np.isfinite(found.half[1:]).all()
    assert found.level == pytest.approx(family_level(6)), "what can't be tested takes no share of the error"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_its_definition(p_values: list[float]) -> None:
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    by_definition = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        by_definition[i] = min(1.0, largest)
    assert holm(p_values) == pytest.approx(by_definition)


def brute_max_t(table: np.ndarray) -> list[float]:
    counts = np.isfinite(table).sum(0)

    def t_of(signs: tuple[int, ...]) -> np.ndarray:
        flipped = np.array(signs)[:, None] * table
        mean, spread = np.nanmean(flipped, 0), np.nanstd(flipped, 0, ddof=1)
        return np.abs(mean) / (spread / np.sqrt(counts))

    observed = t_of((1,) * len(table))
    largest = [t_of(signs).max() for signs in itertools.product((1, -1), repeat=len(table))]
    return [float(np.mean([value >= t * (1 - 1e-9) for value in largest])) for t in observed]


@pytest.mark.parametrize("lost", [(), ((0, 1), (3, 2))])
def test_max_t_equals_enumeration(lost: tuple[tuple[int, int], ...]) -> None:
    table = np.random.default_rng(3).normal(0.5, 1, (7, 4))
    for place in lost:
        table[place] = np.nan
    assert max_t(table) == pytest.approx(brute_max_t(table))


def test_max_t_at_its_limits() -> None:
    with pytest.raises(ValueError, match="6 or more"):
        max_t(np.ones((5, 2)))
    table = np.zeros((6, 2))
    table[:, 0] = 1.0
    assert max_t(table) == pytest.approx([2 / 2**6, 1.0]), "equal differences and none are told apart"
    values = np.random.default_rng(0).normal(0.8, 1, 12)
    oracle = scipy_stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert max_t(values[:, None]) == pytest.approx([oracle.pvalue])
    many = np.random.default_rng(1).normal(0.4, 1, (20, 3))
    assert max_t(many) == pytest.approx(max_t(many)), "drawn flips are the same each time"
    lone = np.full((6, 2), np.nan)
    lone[:2, 0], lone[:, 1] = 1.0, 1.0
    assert math.isnan(max_t(lone)[0])


def brute_stop_test(a: list[float], b: list[float]) -> float:
    both = [*a, *b]

    def worse(group: tuple[int, ...]) -> tuple[int, float]:
        finished = sorted(value for value in both if value < math.inf)
        ranks = [scipy_stats.rankdata(finished)[finished.index(both[i])] for i in group if both[i] < math.inf]
        return sum(both[i] == math.inf for i in group), sum(ranks) - len(ranks) * (len(finished) + 1) / 2

    keys = [worse(pick) for pick in itertools.combinations(range(len(both)), len(a))]
    seen = keys[0]
    above = np.mean([key[0] > seen[0] or (key[0] == seen[0] and key[1] >= seen[1] - 1e-9) for key in keys])
    below = np.mean([key[0] < seen[0] or (key[0] == seen[0] and key[1] <= seen[1] + 1e-9) for key in keys])
    return min(1.0, 2 * min(float(above), float(below)))


@pytest.mark.parametrize("stopped", [(5, 0), (6, 0), (4, 1), (0, 0), (3, 3), (1, 0)])
def test_stop_test_equals_enumeration(stopped: tuple[int, int]) -> None:
    draw = np.random.default_rng(stopped[0])
    a, b = ([math.inf] * count + list(draw.normal(size=6 - count)) for count in stopped)
    assert stop_test(a, b) == pytest.approx(brute_stop_test(a, b))
    assert stop_test(b, a) == pytest.approx(stop_test(a, b))


def test_stop_test_breaks_ties_by_the_losses_of_the_finished() -> None:
    finished = [0.1, 0.0, 0.2, 0.15, 0.3, 0.25]
    assert stop_test([math.inf] * 5 + [0.5], finished) == pytest.approx(2 / math.comb(12, 6))
    assert stop_test([math.inf] * 5 + [-1.0], finished) == pytest.approx(14 / math.comb(12, 6))
    assert stop_test([], finished) == 1.0 and stop_test([math.inf] * 3, [math.inf] * 3) == 1.0


def test_stops_are_never_found_where_there_is_no_difference() -> None:
    draw = np.random.default_rng(0)
    found = [
        stop_test(*(np.where(draw.random(6) < 0.3, math.inf, draw.normal(size=6)) for _ in range(2))) <= ALPHA
        for _ in range(300)
    ]
    assert np.mean(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_the_best_stay_and_the_beaten_leave() -> None:
    draw = np.random.default_rng(0)
    gains = draw.normal(0, 0.01, (4, 8)) + np.array([1.0, 1.0, 0, 0, 0, 0, 0, 0])
    assert best_set(gains, np.eye(8)) == [True, True] + [False] * 6
    assert best_set(gains[:, :1], np.eye(1)) == [True]
    diverged = gains.copy()
    diverged[0, 7] = 3e5
    noise = np.array([1e-6] * 7 + [0.3])
    assert best_set(diverged, np.eye(8), floors=noise) == [True, True] + [False] * 5 + [True]
    tied = np.repeat(gains[:, :1], 3, axis=1)
    assert best_set(tied, np.eye(3)) == [True] * 3


# Interactions of 8 formats with 3 arms, that share the two cells of BF16 each.
def interactions(formats: int = 8) -> np.ndarray:
    rows = []
    for fmt, (plain, arm) in itertools.product(range(formats), ((0, 2), (1, 3), (1, 4))):
        row = np.zeros((formats + 1, 5))
        row[fmt, plain], row[fmt, arm], row[formats, plain], row[formats, arm] = 1, -1, -1, 1
        rows.append(row.ravel())
    return np.array(rows)


@pytest.mark.parametrize(("n", "expected"), [(3, 4.05), (4, 2.70), (6, 1.90), (10, 1.40)])
def test_what_seeds_can_show_is_as_simulated_elsewhere(n: int, expected: float) -> None:
    assert detectable(interactions(), n) == pytest.approx(expected, rel=0.05)


def test_more_seeds_follow_the_distance() -> None:
    weights = interactions()
    kappa, level = independent(weights)[0], family_level(24)
    needed = [more_seeds(distance, 1.0, 3, level, kappa) for distance in (4.0, 2.0, 1.0)]
    assert all(value is not None for value in needed) and needed == sorted(needed)  # type: ignore[type-var]
    assert 1 <= needed[0] <= 3 and 4 <= needed[1] <= 8  # type: ignore[operator]
    assert more_seeds(0.1, 1.0, 3, level, kappa) is None, "beyond 60 seeds"
    assert more_seeds(0.0, 1.0, 6, level, kappa) is None
