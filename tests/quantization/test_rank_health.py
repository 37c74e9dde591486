import json
import math

import pytest
from torch import nn

from altgrad.quantization import RankHealthMonitor, RankTrendDetector, ReferenceRatioDetector, compute_stable_rank


def test_thresholds_are_stricter_for_heads_and_projections():
    monitor = RankHealthMonitor()
    assert monitor.get_threshold_for_layer("lm_head.weight") == 0.15
    assert monitor.get_threshold_for_layer("transformer.h.0.mlp.c_proj.weight") == 0.15
    assert monitor.get_threshold_for_layer("classifier") == 0.15
    assert monitor.get_threshold_for_layer("transformer.h.0.mlp.c_fc.weight") == 0.3
    assert monitor.get_threshold_for_layer("transformer.wte.weight") == 0.3


def test_a_head_is_critical_under_any_name_by_its_role():
    monitor = RankHealthMonitor(critical={"transformer.wte.weight", "labels"})
    assert monitor.get_threshold_for_layer("transformer.wte.weight") == 0.15
    assert monitor.get_threshold_for_layer("transformer.wte") == 0.15
    assert monitor.get_threshold_for_layer("labels.weight") == 0.15
    assert monitor.get_threshold_for_layer("other.labels.weight") == 0.3
    for bad in ({"log_interval": 0}, {"warn_threshold": 1.0}, {"critical_threshold_multiplier": 0.0}):
        with pytest.raises(ValueError, match="warn_threshold"):
            RankHealthMonitor(**bad)


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


def test_a_zero_start_is_no_loss_and_a_fall_to_zero_is_a_whole_one():
    monitor = RankHealthMonitor()
    assert [monitor.check_warnings({"a": rank}) for rank in (0.0, 5.0, 6.0, 4.0)] == [[]] * 4
    assert [w.value for w in monitor.check_warnings({"a": 0.0})] == [1.0]
    trend = RankTrendDetector(window=100, smoothing=10)
    assert not any(trend.update("a", step, rank) for step, rank in ((0, 0.0), (1, 5.0), (2, 5.0), (90, 5.0)))
    assert trend.update("a", 110, 0.0).kind == "falling"
    ratio = ReferenceRatioDetector(checks=1)
    assert ratio.update("a", 0.0, 0.0) is None
    assert ratio.update("a", 0.0, 3.0).kind == "below_reference"
    assert ratio.update("a", 3.0, 0.0).kind == "above_reference"
    with pytest.raises(ValueError, match="never negative"):
        ratio.update("a", -1.0, 3.0)


def test_checks_further_apart_than_the_window_are_still_compared():
    trend = RankTrendDetector(window=100, smoothing=10)
    assert trend.update("a", 0, 10.0) is None
    assert trend.update("a", 500, 5.0).kind == "falling"


def test_detectors_resume_where_they_were():
    pairs = [
        (RankHealthMonitor(), RankHealthMonitor()),
        (RankTrendDetector(), RankTrendDetector()),
        (ReferenceRatioDetector(), ReferenceRatioDetector()),
    ]
    ranks = [10.0, math.nan, 4.0, 3.0, 2.0]

    def see(detector, step):
        if isinstance(detector, RankHealthMonitor):
            return detector.check_warnings({"a": ranks[step]})
        if isinstance(detector, RankTrendDetector):
            return detector.update("a", 100 * step, ranks[step])
        return detector.update("a", ranks[step], 10.0)

    for whole, resumed in pairs:
        for step in range(4):
            see(whole, step)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        expected = see(whole, 4)
        assert expected and see(resumed, 4) == expected


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
