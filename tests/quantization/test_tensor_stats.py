"""Ranges, tails, gradients, updates and silent units against float64 definitions in numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from oracle import ALL, magnitudes, nearest

from altgrad.quantization import (
    AmaxMovingAverage,
    DeadUnits,
    activation_kurtosis,
    compute_scale,
    count_nonfinite,
    get_format,
    gradient_statistics,
    overflow_share,
    range_statistics,
    update_statistics,
)
from altgrad.quantization.tensor_stats import moment_snr


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("fmt", ALL)
def test_ranges_equal_the_enumerated_grid(fmt, scale):
    grid = magnitudes(get_format(fmt))
    top, small = grid[-2], grid[1]
    factors = [0.0, -0.0, 0.3, -0.3, 0.7, 1.0, -1.0, 3.0]
    x = np.concatenate(
        [
            np.array(factors) * small,
            np.array([0.5, 1.0, -1.0, 1.01, 1.9, -1.9]) * top,
            np.random.default_rng(0).normal(size=500) * top / 2,
        ]
    )
    edge = (top + grid[-1]) / 2
    x = np.concatenate([x, [edge, edge * (1 + 1e-6)]])
    x = x[np.abs(x) < 3.4e38]
    tensor = torch.from_numpy(np.concatenate([x, [math.nan, math.inf]])).float() * scale
    x = (tensor / scale).double().numpy()[:-2]
    rounded, count = nearest(torch.from_numpy(x).float(), get_format(fmt)).double().numpy(), len(x) + 2
    found = range_statistics(tensor, fmt, scale)
    assert found.amax.isnan()
    assert found.overflow.item() == pytest.approx(((np.abs(x) > edge).sum() + 1) / count)
    assert found.underflow.item() == pytest.approx(((x != 0) & (rounded == 0)).sum() / count)
    assert found.saturation.item() == pytest.approx(((np.abs(rounded) == top).sum() + 1) / count)
    assert found.nonfinite.item() == pytest.approx(2 / count)
    noise = np.square((x - rounded) * scale).sum()
    assert found.sqnr_db.item() == pytest.approx(10 * math.log10(np.square(x * scale).sum() / noise), rel=1e-9)


def test_known_ranges():
    x = torch.tensor([1e-9, -1e-9, 0.0, 1.0, 448.0, 460.0, 500.0, -math.inf])
    found = range_statistics(x, "E4M3")
    assert [found.overflow, found.underflow, found.saturation, found.nonfinite] == [2 / 8, 2 / 8, 4 / 8, 1 / 8]
    assert found.amax == math.inf
    exact = range_statistics(torch.tensor([1.0, -2.0]), "E4M3")
    assert exact.sqnr_db == math.inf and exact.amax == 2.0
    assert range_statistics(torch.zeros(3), "E4M3").sqnr_db.isnan()


@pytest.mark.parametrize("fmt", ["E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"])
def test_an_amax_mapped_onto_the_largest_value_is_no_overflow(fmt):
    for seed in range(50):
        x = torch.randn(400, generator=torch.Generator().manual_seed(seed))
        assert range_statistics(x, fmt, compute_scale(x, fmt)).overflow == 0.0


def test_a_uniform_tensor_has_the_textbook_sqnr():
    x = torch.linspace(-1, 1, 100_001) * 127.5 / 128
    # 8 bits: 6.02 dB each, for a full-range uniform signal.
    assert range_statistics(x, "E0M7").sqnr_db.item() == pytest.approx(20 * math.log10(2**8), abs=0.1)


def test_ranges_take_a_scale_per_channel():
    x, scale = torch.tensor([[500.0, 1.0], [500.0, 1.0]]), torch.tensor([[1.0], [2.0]])
    assert range_statistics(x, "E4M3", scale).overflow == 0.25


@pytest.mark.parametrize("draw", [np.random.default_rng(1).normal, np.random.default_rng(1).laplace])
def test_kurtosis_equals_that_of_scipy(draw):
    x = draw(size=(40, 50)).astype(np.float32) + 100.0
    expected = scipy.stats.kurtosis(x.astype(np.float64).ravel(), fisher=False)
    assert activation_kurtosis(torch.from_numpy(x)).item() == pytest.approx(expected, rel=1e-9)
    assert all(activation_kurtosis(torch.full((count,), 0.1)).isnan() for count in range(1, 60))
    assert activation_kurtosis(torch.tensor([1.0, math.inf])).isnan()


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e25])
def test_gradient_statistics_equal_numpy(size):
    g = torch.randn(30, 40) * size + 0.1 * size
    g[:3] = 0.0
    exact = g.double().numpy()
    found = gradient_statistics(g)
    assert found.l2.item() == pytest.approx(np.linalg.norm(exact), rel=1e-12)
    assert found.linf.item() == np.abs(exact).max()
    assert found.snr.item() == pytest.approx(abs(exact.mean()) / exact.std(), rel=1e-9)
    assert (found.zero, found.nonfinite) == (0.1, 0.0)


def test_a_broken_gradient_shows():
    found = gradient_statistics(torch.tensor([1.0, 0.0, math.nan, math.inf]))
    assert found.l2.isnan() and found.linf.isnan() and found.snr.isnan()
    assert (found.zero, found.nonfinite) == (0.25, 0.5)


def test_snr_over_steps_tells_a_steady_gradient_from_noise():
    steps = torch.randn(64, 200) * 0.5 + torch.randn(200)
    mean, square = steps.mean(0), steps.square().mean(0)
    exact = steps.double().numpy()
    expected = np.linalg.norm(exact.mean(0)) / np.sqrt(exact.var(0).sum())
    assert moment_snr(mean, square).item() == pytest.approx(expected, rel=1e-5)
    assert moment_snr(torch.ones(3), torch.ones(3)) == math.inf
    assert moment_snr(torch.zeros(3), torch.zeros(3)).isnan()


def test_update_statistics():
    w, update = torch.randn(50, 20), torch.randn(50, 20) * 1e-3
    update[:10] = 0.0
    found = update_statistics(w, update)
    expected = np.sqrt(np.square(update.double().numpy()).mean() / np.square(w.double().numpy()).mean())
    assert found.zero == 0.2 and found.rms_ratio.item() == pytest.approx(expected, rel=1e-12)
    assert update_statistics(torch.zeros(3), torch.ones(3)).rms_ratio == math.inf
    assert update_statistics(torch.zeros(3), torch.zeros(3)).rms_ratio.isnan()


@pytest.mark.parametrize("interval", [1, 7])
def test_dead_units_count_training_steps(interval):
    units, grad = DeadUnits(), torch.ones(4, 5)
    grad[1], grad[2, :4] = 1e-9, 0.0
    for step in range(interval, 301, interval):
        dead = units.update("a", step, grad)
        silent = step - interval + 1  # the first call stands for one step
        assert dead.item() == (0.25 if silent >= 100 else 0.0), step
    assert units.update("a", 302, torch.ones(4, 5)) == 0.0


def test_dead_units_of_vectors_and_after_a_nan():
    units = DeadUnits(steps=3)
    silent = torch.tensor([0.0, 1.0])
    for step in (1, 2):
        assert units.update("a", step, silent) == 0.0
    units.update("a", 3, torch.tensor([math.nan, 1.0]))
    resumed = DeadUnits(steps=3)
    resumed.load_state_dict(units.state_dict())
    for each in (units, resumed):
        assert each.update("a", 4, silent) == 0.5
        with pytest.raises(ValueError, match="ascend: 4 after 4 for 'a'"):
            each.update("a", 4, silent)
    with pytest.raises(ValueError, match="threshold"):
        DeadUnits(0.0)


@pytest.mark.parametrize("interval", [1, 5, 20])
def test_the_moving_average_decays_by_steps_not_by_calls(interval):
    average = AmaxMovingAverage(smoothing=50)
    average.update("a", 0, torch.tensor(10.0))
    for step in range(interval, 101, interval):
        found = average.update("a", step, torch.tensor(2.0))
    assert found.mean.item() == pytest.approx(2.0 + 8.0 * math.exp(-2), rel=1e-12)


def test_a_nan_never_poisons_the_average():
    whole, disturbed = AmaxMovingAverage(), AmaxMovingAverage()
    for step in range(0, 60, 10):
        value = torch.tensor(5.0 + step)
        if step not in (0, 20, 30):
            whole.update("a", step, value)
            last = disturbed.update("a", step, value)
        else:
            broken = disturbed.update("a", step, torch.tensor(math.nan if step != 30 else math.inf))
            assert not broken.jump.isfinite()
    assert last.mean == whole.update("b", 0, last.mean).mean == whole._mean["a"]
    resumed = AmaxMovingAverage()
    resumed.load_state_dict(disturbed.state_dict())
    following = [each.update("a", 70, torch.tensor(200.0)) for each in (disturbed, resumed)]
    assert following[0] == following[1]
    assert following[0].jump.item() == pytest.approx(200.0 / last.mean.item())
    with pytest.raises(ValueError, match="ascend"):
        resumed.update("a", 70, torch.tensor(1.0))
    with pytest.raises(ValueError, match="smoothing"):
        AmaxMovingAverage(0)


def test_averages_taken_together_are_those_taken_one_by_one():
    together, alone = AmaxMovingAverage(smoothing=20), AmaxMovingAverage(smoothing=20)
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2, 5, 30):
        names = ["a", "b", "broken"] + (["late"] if step > 2 else [])
        amaxes = dict(zip(names, torch.rand(len(names), generator=generator).unbind(), strict=True))
        amaxes["broken"] = torch.tensor(math.nan if step == 2 else 3.0)
        found = together.update_all(step, amaxes)
        for name, amax in amaxes.items():
            for both in zip(found[name], alone.update(name, step, amax), strict=True):
                assert both[0].item() == pytest.approx(both[1].item(), rel=1e-12, nan_ok=True)
    assert together.update_all(31, {}) == {}
    with pytest.raises(ValueError, match="steps must ascend"):
        together.update_all(30, {"a": torch.tensor(1.0)})


@pytest.mark.parametrize(("values", "count"), [([1.0, 0.0], 0), ([math.nan, 1.0, -math.inf], 2), ([3e38], 0), ([], 0)])
def test_what_is_not_finite_is_counted(values, count):
    x = torch.tensor(values)
    assert count_nonfinite(x).item() == count and (not values or count_nonfinite(x, x.abs().max()).item() == count)


def test_a_known_amax_changes_nothing():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 300
    statistics = (range_statistics(x, "E4M3", 0.5, amax) for amax in (x.abs().max(), None))
    assert all(map(torch.equal, *statistics))
    assert overflow_share(x, "E4M3", 0.5, x.abs().max()) == overflow_share(x, "E4M3", 0.5) > 0
