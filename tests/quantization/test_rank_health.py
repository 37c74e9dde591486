import math

import pytest
import torch
from torch import nn

from altgrad.quantization import (
    RankHealthMonitor,
    RankTrendDetector,
    ReferenceRatioDetector,
    compute_effective_rank,
    compute_stable_rank,
    variance_rank,
)

RANKS = [compute_stable_rank, compute_effective_rank, variance_rank]


@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (30, 30), (8, 3, 5)])
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e18])
def test_ranks_equal_those_from_singular_values(shape, size):
    weight = torch.randn(shape) * size
    s = torch.linalg.svdvals(weight.flatten(1).double())
    share = s / s.sum()
    energy = s.square().cumsum(0) / s.square().sum()
    assert compute_stable_rank(weight).item() == pytest.approx(
        (s.square().sum() / s[0] ** 2).item(), rel=1e-7
    )
    entropy = -(share * share.log()).sum()
    assert compute_effective_rank(weight).item() == pytest.approx(entropy.exp().item(), rel=1e-6)
    assert variance_rank(weight, 0.9).item() == int((energy < 0.9).sum()) + 1


@pytest.mark.parametrize("rank", RANKS)
def test_ranks_of_known_matrices(rank):
    assert rank(torch.eye(12)).item() == pytest.approx(12)
    assert rank(torch.outer(torch.randn(9), torch.randn(20))).item() == pytest.approx(1, abs=1e-4)
    assert rank(torch.zeros(5, 6)).item() == 0.0
    assert (
        rank(torch.full((4, 4), math.nan)).isnan()
        and rank(torch.tensor([[1.0, math.inf], [0.0, 1.0]])).isnan()
    )
    with pytest.raises(ValueError, match="matrix"):
        rank(torch.ones(3))


def test_thresholds_are_stricter_for_heads_and_projections():
    monitor = RankHealthMonitor()
    assert monitor.get_threshold_for_layer("lm_head.weight") == 0.15
    assert monitor.get_threshold_for_layer("transformer.h.0.mlp.c_proj.weight") == 0.15
    assert monitor.get_threshold_for_layer("classifier") == 0.15
    assert monitor.get_threshold_for_layer("transformer.h.0.mlp.c_fc.weight") == 0.3
    assert monitor.get_threshold_for_layer("transformer.wte.weight") == 0.3


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.wte.weight


def test_a_tied_head_is_watched_as_a_head():
    model = Tied()
    ranks = RankHealthMonitor().compute_layer_ranks(model)
    assert list(ranks) == ["lm_head.weight"]
    assert ranks["lm_head.weight"] == compute_stable_rank(model.wte.weight).item()


def test_monitor_warns_of_a_planted_drop_alone():
    monitor = RankHealthMonitor()
    assert monitor.check_warnings({"a": 10.0, "h.c_proj": 10.0}) == []
    assert monitor.check_warnings({"a": 7.5, "h.c_proj": 9.0}) == []
    (warning,) = monitor.check_warnings({"a": 7.5, "h.c_proj": 8.0})
    assert (warning.layer, warning.kind, warning.limit) == ("h.c_proj", "drop", 0.15)
    assert [w.kind for w in monitor.check_warnings({"a": math.nan})] == ["nonfinite"]
    assert monitor.check_warnings({"a": 9.0}) == []
    assert monitor.is_due(200) and not monitor.is_due(201)


def test_trend_counts_training_steps_and_a_nan_leaves_it_alone():
    for interval in (1, 10, 50):
        detector = RankTrendDetector(window=1000, threshold=0.3, smoothing=50)
        steps = range(0, 2000, interval)
        kinds = [w.kind for step in steps if (w := detector.update("a", step, 10.0 * 0.9995**step))]
        assert kinds and set(kinds) == {"falling"}
        healthy = [detector.update("b", step, 10.0 + math.sin(step)) for step in steps]
        assert not any(healthy)
    assert detector.update("b", 2000, math.nan).kind == "nonfinite"
    assert detector.update("b", 2001, 10.0) is None
    with pytest.raises(ValueError, match="ascend"):
        detector.update("b", 2001, 10.0)


@pytest.mark.parametrize(("rank", "kind"), [(3.0, "below_reference"), (30.0, "above_reference")])
def test_reference_ratio_fires_both_ways_and_only_when_sustained(rank, kind):
    detector = ReferenceRatioDetector(checks=3)
    assert [detector.update("a", r, 10.0) for r in (rank, rank, 9.0, rank, rank)] == [None] * 5
    assert detector.update("a", math.nan, 10.0).kind == "nonfinite"
    assert detector.update("a", rank, 10.0).kind == kind
    # A drop that the reference shares is healthy.
    assert all(detector.update("b", r, r * 1.1) is None for r in (25.0, 12.0, 6.0, 3.0))
