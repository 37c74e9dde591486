import math

import pytest
import torch

from altgrad.quantization import (
    WeightFlipTracker,
    compute_flip_rate,
    compute_scale,
    compute_stall_ratio,
    flip_yield,
    quantize,
    ulp,
)
from altgrad.quantization.flip_metrics import count_flips, expected_flips
from altgrad.quantization.ops import code_index


def test_the_literal_ratios():
    assert compute_stall_ratio(10, 100) == 0.9 and compute_stall_ratio(0, 0) == 0.0
    assert compute_flip_rate(5, 50) == 0.1 and compute_flip_rate(0, 0) == 0.0
    assert flip_yield(3, 6.0) == 0.5 and math.isnan(flip_yield(0, 0.0))


@pytest.mark.parametrize("name", ["E0M7", "E3M4", "E5M2", "E7M0"])
def test_stochastic_rounding_yields_the_flips_expected(name):
    raw = torch.randn(200000)
    scale = compute_scale(raw, name, headroom=2.0)
    weight = quantize(raw, name, scale)
    # Away from zero the next value is one ulp off, so that the expectation is exact.
    delta = torch.randn(200000).abs() * 0.002 * torch.where(weight < 0, -1.0, 1.0)
    expected = expected_flips(delta, ulp(weight, name, scale))
    after = quantize(weight + delta, name, scale, rounding="stochastic", seed=1)
    flips = count_flips(code_index(weight, name, scale), code_index(after, name, scale))
    assert flip_yield(float(flips), float(expected)) == pytest.approx(1.0, abs=4.5 / float(expected) ** 0.5)
    nearest = quantize(weight + delta, name, scale)
    lost = count_flips(code_index(weight, name, scale), code_index(nearest, name, scale))
    assert flip_yield(float(lost), float(expected)) < 0.9


def test_expected_flips_saturate_at_one_per_weight():
    assert expected_flips(torch.tensor([0.0, 0.5, -9.0]), torch.ones(3)).item() == 1.5


def test_tracker_counts_per_layer_until_reset():
    tracker = WeightFlipTracker()
    weight = torch.tensor([1.0, 2.0, 4.0, -1.0])
    for _ in range(2):
        tracker.snapshot_pre_step("a", weight, "E3M4", 1.0, grad=torch.tensor([1.0, 1e-11, 0.0, -1.0]))
        assert tracker.compute_flips_post_step("a", weight * torch.tensor([1.5, 1.0, 1.0, 1.0]), "E3M4", 1.0) == 1
    assert tracker.update_counts == {"a": 4} and tracker.flip_counts == {"a": 2}
    assert tracker.get_stall_ratios() == {"a": 0.5} and tracker.get_flip_rates() == {"a": 0.25}
    tracker.snapshot_pre_step("b", weight, "E3M4", 1.0)
    applied = torch.tensor([True, True, True, False])
    assert tracker.compute_flips_post_step("b", -weight, "E3M4", 1.0, applied=applied) == 4
    assert tracker.update_counts["b"] == 3
    tracker.reset()
    assert tracker.update_counts == tracker.flip_counts == {} and tracker.get_stall_ratios() == {}


def test_a_drifting_scale_flips_nothing():
    tracker, weight = WeightFlipTracker(), torch.randn(1000)
    scale = torch.tensor(0.01)
    tracker.snapshot_pre_step("w", weight, "E4M3", scale)
    scale.mul_(1.7)  # in place: the snapshot keeps its own
    assert tracker.compute_flips_post_step("w", weight, "E4M3", scale) == 0


def test_a_step_without_a_snapshot_is_refused():
    tracker = WeightFlipTracker()
    with pytest.raises(ValueError, match="no snapshot of 'w'"):
        tracker.compute_flips_post_step("w", torch.ones(1), "E4M3")
    tracker.snapshot_pre_step("w", torch.ones(1), "E4M3")
    with pytest.raises(ValueError, match="E5M2"):
        tracker.compute_flips_post_step("w", torch.ones(1), "E5M2")
