"""The statistics against scipy and against enumeration by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from altgrad.analysis.stats import adjust, holm, max_t, p_floor, paired, sign_flip_p, signed, t_interval

VALUES = st.lists(st.integers(-50, 50).map(lambda value: value / 10), min_size=1, max_size=9)


def brute_sign_flip(values: list[float]) -> float:
    observed = abs(sum(values))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(total >= observed - 1e-9 for total in sums) / len(sums)


@given(VALUES)
def test_sign_flip_equals_enumeration(values: list[float]) -> None:
    assert sign_flip_p(values) == pytest.approx(brute_sign_flip(values), abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 8, 11])
def test_sign_flip_equals_scipys_exact_permutation_test(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 1, n)
    oracle = scipy_stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(values) == pytest.approx(oracle.pvalue, abs=1e-12)


@pytest.mark.parametrize("n", range(1, 13))
def test_p_floor_is_reached_by_equal_signs_and_never_passed(n: int) -> None:
    assert sign_flip_p(np.arange(1, n + 1)) == pytest.approx(p_floor(n)) == pytest.approx(2 / 2**n)


def test_sign_flip_is_exact_for_twenty_seeds_and_close_beyond_forty() -> None:
    assert sign_flip_p(np.ones(20)) == pytest.approx(2 / 2**20)
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.2, 0.5):
        values = generator.normal(shift, 1.0, size=60)
        signs = generator.choice((-1.0, 1.0), size=(200_000, 60))
        sampled = (np.abs(signs @ values) >= abs(values.sum())).mean()
        assert sign_flip_p(values) == pytest.approx(sampled, abs=4 * math.sqrt(0.25 / 200_000) + 2e-3)
    assert sign_flip_p(np.zeros(50)) == 1.0


@pytest.mark.parametrize("n", [2, 3, 6, 20])
def test_t_interval_equals_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    oracle = scipy_stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy_stats.sem(values))
    assert t_interval(values) == pytest.approx(oracle)


def test_one_seed_has_no_interval_and_decides_nothing() -> None:
    result = paired([0.4])
    assert (result.n, result.mean, result.p, result.p_floor) == (1, 0.4, 1.0, 1.0)
    assert math.isnan(result.low) and math.isnan(result.high)


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_a_censored_value_is_never_averaged(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired(values)


@given(st.lists(st.floats(0.001, 1), max_size=8))
def test_holm_equals_its_definition(p_values: list[float]) -> None:
    ranked = sorted(p_values)
    steps = [((len(ranked) - rank) * value, value) for rank, value in enumerate(ranked)]
    by_definition = [min(1.0, max(step for step, value in steps if value <= own)) for own in p_values]
    assert holm(p_values) == pytest.approx(by_definition)


def test_max_t_equals_enumeration() -> None:
    table = np.random.default_rng(3).normal([0.0, 0.5, 2.0], 1, (6, 3))

    def largest(signs: tuple[int, ...]) -> np.ndarray:
        flipped = np.array(signs)[:, None] * table
        return np.abs(scipy_stats.ttest_1samp(flipped, 0).statistic)

    observed = largest((1,) * 6)
    reached = [largest(signs).max() >= observed - 1e-9 for signs in itertools.product((1, -1), repeat=6)]
    assert max_t(table) == pytest.approx(np.mean(reached, axis=0))


@pytest.mark.parametrize("n", [6, 9])
def test_max_t_of_one_cell_is_the_sign_flip_test(n: int) -> None:
    values = np.random.default_rng(n).normal(0.4, 1, n)
    assert max_t(values[:, None])[0] == pytest.approx(sign_flip_p(values))


@pytest.mark.parametrize("n", [5, 21])
def test_max_t_refuses_what_it_cannot_decide_or_enumerate(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n} seeds"):
        max_t(np.ones((n, 2)))


def test_max_t_keeps_equal_and_zero_differences_apart() -> None:
    table = np.column_stack([np.full(6, -0.25), np.zeros(6)])
    assert max_t(table) == pytest.approx([2 / 2**6, 1.0])


def test_max_t_does_not_lose_to_holm_on_correlated_cells() -> None:
    shared = np.random.default_rng(0).normal(1.0, 0.2, 6)
    table = [{seed: float(value) + 0.01 * cell * seed for seed, value in enumerate(shared)} for cell in range(8)]
    p_values, method = adjust(table)
    assert method == "joint max-T" and max(p_values) <= 0.05
    assert min(holm([sign_flip_p(list(cell.values())) for cell in table])) > 0.05


def test_adjust_takes_holm_where_cells_do_not_share_enough_seeds() -> None:
    unequal = [{seed: 1.0 + seed for seed in range(6)}, {seed: 1.0 + seed for seed in range(5)}]
    assert adjust(unequal) == (pytest.approx([0.0625, 0.0625]), "Holm")
    assert adjust([{0: 1.0, 1: 2.0}])[1] == "Holm"
    assert adjust([]) == ([], "Holm")


def test_family_wise_error_of_the_joint_test_is_kept() -> None:
    generator = np.random.default_rng(11)
    false_alarms = sum(min(max_t(generator.normal(size=(6, 5)))) <= 0.05 for _ in range(400))
    assert false_alarms / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize(("value", "text"), [(-0.0121, "−0.012"), (0.5, "+0.500"), (-0.0001, "+0.000")])
def test_signed(value: float, text: str) -> None:
    assert signed(value) == text
