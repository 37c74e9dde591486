"""Stiffness, alignment, travel, correlation, codes and stalls against float64 definitions in numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from oracle import REGISTERED, magnitudes, nearest

from altgrad.quantization import (
    BitStallDetector,
    codes_in_use,
    compute_stiffness_field,
    detect_bit_stall,
    get_format,
    gradient_stiffness_correlation,
    grid_alignment_statistics,
    quantize,
    ulp_statistics,
)
from altgrad.quantization.ops import code_index


def weights(fmt: str, count: int = 3000) -> torch.Tensor:
    """Normals over a few binades, on-grid values, zeros, what is beyond the range and what is not finite."""
    generator = torch.Generator().manual_seed(11)
    top = get_format(fmt).max if get_format(fmt).total_bits == 8 else 1.0
    spread = torch.randn(count, generator=generator) * top / 4
    small = spread[:500] * 2.0 ** torch.randint(-12, 0, (500,), generator=generator)
    on_grid = quantize(spread[:300], fmt)
    special = torch.tensor([0.0, -0.0, top, -top, top * 1.5, math.nan, math.inf, -math.inf])
    return torch.cat([spread, small, on_grid, special])


def spacing(x: np.ndarray, fmt: str) -> np.ndarray:
    """Distance between the two grid points around each |x|, from the enumerated grid."""
    grid = magnitudes(get_format(fmt))
    below = np.clip(np.searchsorted(grid, np.abs(x), side="right") - 1, 0, len(grid) - 2)
    return grid[below + 1] - grid[below]


@pytest.mark.parametrize("bits", [0, 2, 3, 7, 10])
def test_stiffness_is_the_spacing_of_the_unbounded_format(bits):
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (5000,), generator=generator).to(torch.int32).view(torch.float32)
    powers = torch.ldexp(torch.ones(200, dtype=torch.float64), torch.arange(-100, 100)).float()
    w = torch.cat([patterns, powers, powers.nextafter(torch.tensor(0.0)), -powers])
    w = w[w.isfinite() & (w != 0)]
    expected = [math.ldexp(1.0, math.frexp(value)[1] - 1 - bits) for value in w.tolist()]
    found = compute_stiffness_field(w, bits)
    assert found.dtype == torch.float32 and torch.equal(found, torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stiffness_of_special_weights(dtype):
    w = torch.tensor([0.0, -0.0, 1.0, -1.5, 4.0, math.nan, math.inf], dtype=dtype)
    found = compute_stiffness_field(w, "E4M3")
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert found.isnan().tolist() == [True, True, False, False, False, True, False]
    assert found[2:5].tolist() == [0.125, 0.125, 0.5] and found[6] == math.inf
    assert compute_stiffness_field(w, "E0M7")[:5].tolist() == [2.0**-7] * 5
    assert compute_stiffness_field(w, "BF16")[2].item() == 2.0**-7
    with pytest.raises(ValueError, match="-1"):
        compute_stiffness_field(w, -1)
    with pytest.raises(ValueError, match="E4M3"):
        compute_stiffness_field(w, "E4M33")


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("fmt", REGISTERED)
def test_alignment_equals_the_distances_to_the_enumerated_grid(fmt, scale):
    w = weights(fmt) * scale
    x = (w / scale).double().numpy()
    finite = np.isfinite(x)
    grid_point = nearest(w / scale, get_format(fmt)).double().numpy()
    distance = np.abs(x[finite] - grid_point[finite]) / spacing(x[finite], fmt)
    found = grid_alignment_statistics(w, fmt, scale)
    inside = np.abs(x[finite]) <= get_format(fmt).max
    if get_format(fmt).mantissa_bits:  # without a mantissa the spacing beyond the grid's end is another matter
        assert found.mean_distance.item() == pytest.approx(distance.mean(), rel=1e-12)
        assert found.max_distance.item() == pytest.approx(distance.max(), rel=1e-12)
    assert distance[inside].max() <= 0.5
    assert found.share_on_grid.item() == pytest.approx((distance == 0).sum() / len(x))
    assert found.share_beyond.item() == pytest.approx((np.abs(x) > get_format(fmt).max).sum() / len(x))
    assert found.share_nonfinite.item() == pytest.approx(3 / len(x))
    on_grid = grid_alignment_statistics(quantize(torch.randn(500), fmt, scale), fmt, scale)
    assert on_grid.share_on_grid == 1.0 and on_grid.max_distance == 0.0


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("fmt", REGISTERED)
def test_travel_counts_codes(fmt, scale):
    before = weights(fmt) * scale
    after = before + torch.randn_like(before) * before.abs().nan_to_num(0.0, 0.0) * 0.3
    after[5] = math.nan
    old, new = (code_index(w, fmt, scale).double().numpy() for w in (before, after))
    both = np.isfinite(before.numpy()) & np.isfinite(after.numpy())
    travel = (new - old)[both]
    found = ulp_statistics(before, after, fmt, scale)
    assert found.mean.item() == pytest.approx(np.abs(travel).mean())
    assert found.max.item() == np.abs(travel).max() > 0
    assert found.signed_mean.item() == pytest.approx(travel.mean())
    assert found.share_moved.item() == pytest.approx((travel != 0).mean())
    assert found.share_nonfinite.item() == pytest.approx(1 - both.mean())


def test_travel_of_known_steps():
    found = ulp_statistics(torch.tensor([1.0, 2.0, 0.0, -1.0]), torch.tensor([1.125, 2.0, -(2**-9), -1.25]), "E4M3")
    assert [value.item() for value in found] == [1.0, 2.0, -0.5, 0.75, 0.0]
    same = ulp_statistics(torch.tensor([1.0]), torch.tensor([1.0]), "E4M3")
    assert [value.item() for value in same] == [0.0] * 5
    nothing = ulp_statistics(torch.tensor([math.nan]), torch.tensor([1.0]), "E4M3")
    assert all(value.isnan() for value in nothing[:4]) and nothing.share_nonfinite == 1.0


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.5])
def test_correlations_equal_those_of_scipy(strength):
    w = torch.randn(3000) * 2.0 ** torch.randint(-8, 3, (3000,))
    stiffness = compute_stiffness_field(w, "E3M4")
    g = torch.randn(3000) * stiffness**strength
    g[:20], w[10:40], g[50], w[60], g[70] = 0.0, 0.0, math.nan, math.inf, -math.inf
    used = (g != 0) & (w != 0) & g.isfinite() & w.isfinite()
    log_g = np.log(np.abs(g[used].double().numpy()))
    log_s = np.log(compute_stiffness_field(w, "E3M4")[used].double().numpy())
    found = gradient_stiffness_correlation(g.view(30, 100), w.view(30, 100), "E3M4")
    assert found.pearson.item() == pytest.approx(scipy.stats.pearsonr(log_g, log_s).statistic, abs=1e-9)
    assert found.spearman.item() == pytest.approx(scipy.stats.spearmanr(log_g, log_s).statistic, abs=1e-9)


@pytest.mark.parametrize(
    ("g", "w", "fmt"),
    [
        (torch.randn(50), torch.randn(50), "E0M7"),
        *[(torch.full((count,), 0.3), torch.randn(count), "E4M3") for count in range(40, 60)],
        (torch.randn(50), torch.full((50,), 0.3), "E4M3"),
        (torch.zeros(50), torch.randn(50), "E4M3"),
        (torch.randn(1), torch.randn(1), "E4M3"),
    ],
)
def test_no_correlation_where_nothing_varies(g, w, fmt):
    assert all(value.isnan() for value in gradient_stiffness_correlation(g, w, fmt))


@pytest.mark.parametrize("fmt", REGISTERED)
def test_codes_in_use_counts_distinct_values(fmt):
    w = weights(fmt)
    distinct = np.unique(nearest(w[w.isfinite()], get_format(fmt)).numpy() + 0.0)
    found = codes_in_use(w, fmt).item()
    assert found == pytest.approx(len(distinct) / (2 * get_format(fmt).max_index + 1))
    assert codes_in_use(get_format(fmt).values * 0.5, fmt, 0.5) == 1.0
    assert codes_in_use(torch.full((9,), math.nan), fmt) == 0.0


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("fmt", ["E0M7", "E3M4", "E5M2", "E7M0", "BF16"])
def test_stalls_equal_the_definition(fmt, scale):
    w = torch.randn(4000) * 0.2
    update = torch.randn(4000) * w.abs() * 2.0 ** torch.randint(-12, 2, (4000,))
    update[:100] = 0.0
    base = quantize(w, fmt, scale)
    expected = (quantize(base + update, fmt, scale) == base) & (update != 0)
    stalled, updates = detect_bit_stall(w, update, fmt, scale)
    assert (stalled.item(), updates.item()) == (expected.sum().item(), 3900)
    assert 0 < stalled < updates


def test_stalls_of_known_updates():
    w = torch.tensor([1.0, 1.0, 1.0, 448.0, 1.0, math.nan, 0.0])
    update = torch.tensor([0.06, 0.07, 0.0, 100.0, math.nan, 1.0, 1e-4])
    assert [count.item() for count in detect_bit_stall(w, update, "E4M3")] == [3, 4]


def test_the_detector_adds_up_steps_and_names_the_stalled_layer():
    detector, w = BitStallDetector(), torch.full((10,), 1.0)
    assert detector.check() == {}
    for _ in range(3):
        detector.update("frozen", w, torch.full((10,), 1e-3), "E4M3")
        detector.update("moving", w, torch.full((10,), 0.2), "E4M3")
        detector.update("still", w, torch.zeros(10), "E4M3")
        detector.update("half", w, torch.cat([torch.full((5,), 1e-3), torch.full((5,), 0.2)]), "E4M3")
    ratios = {name: ratio.item() for name, ratio in detector.stall_ratios().items()}
    assert ratios == {"frozen": 1.0, "moving": 0.0, "still": 0.0, "half": 0.5}
    assert detector.check() == {"frozen": 1.0}
    resumed = BitStallDetector()
    resumed.load_state_dict(detector.state_dict())
    for each in (detector, resumed):
        each.update("moving", w, torch.full((10,), 1e-3), "E4M3")
        assert each.stall_ratios()["moving"] == 0.25
    detector.reset()
    assert detector.check() == {}
    with pytest.raises(ValueError, match="threshold"):
        BitStallDetector(1.0)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(3, dtype=torch.int32)])
def test_without_numbers_there_is_an_error(bad):
    calls = [
        lambda: grid_alignment_statistics(bad, "E4M3"),
        lambda: ulp_statistics(bad, bad, "E4M3"),
        lambda: gradient_stiffness_correlation(bad, bad, "E4M3"),
        lambda: codes_in_use(bad, "E4M3"),
        lambda: detect_bit_stall(bad, bad, "E4M3"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="floating-point elements"):
            call()


def test_shapes_must_agree():
    for call in (ulp_statistics, detect_bit_stall, gradient_stiffness_correlation):
        with pytest.raises(ValueError, match="shape"):
            call(torch.ones(3), torch.ones(4), "E4M3")
