"""Clipping against its formula in plain floats, its planted spikes; ladders that end for every format."""

import json
import math
import random

import pytest
import torch
from torch import nn

from altgrad.quantization import FORMATS, EmergencyMantissaShift, FloatFormat, PartitionRelativeClipper, get_format
from altgrad.quantization.formats import VARIANTS
from altgrad.quantization.stability import format_allowance

REASONS = ("overflow", "nonfinite", "stall")


def every_format() -> list[FloatFormat]:
    found = []
    for exponent_bits in range(9):
        for mantissa_bits in range(16 - exponent_bits):
            for variant in VARIANTS:
                try:
                    found.append(FloatFormat(exponent_bits, mantissa_bits, variant))
                except ValueError:
                    continue
    return found


def parameter(values: torch.Tensor, grad: torch.Tensor) -> nn.Parameter:
    p = nn.Parameter(values.clone())
    p.grad = grad.clone()
    return p


def test_clipping_equals_its_formula():
    generator = random.Random(0)
    clipper = PartitionRelativeClipper(factor=3.0, decay=0.9, warmup=5, floor=1e-3)
    weight, direction = torch.randn(6, 7), torch.randn(6, 7)
    mean, limited = 0.0, 0
    for step in range(60):
        size = math.exp(generator.gauss(0, 0.7)) * (50 if step in (20, 40) else 1)
        p = parameter(weight, direction * size)
        report = clipper.clip({"a": p}, {"a": "E5M2"})
        rms_w, rms_g = (math.sqrt(x.double().square().mean().item()) for x in (weight, direction * size))
        ratio, limit = rms_g / rms_w, 3.0 * 1.125 * mean if step >= 5 else math.inf
        kept = min(1.0, limit / ratio)
        mean += max(0.1, 1 / (step + 1)) * (min(ratio, limit) - mean)
        assert report.smallest.item() == pytest.approx(kept, rel=1e-5)
        assert report.clipped.item() == (kept < 1) and report.nonfinite.item() == 0
        assert torch.allclose(p.grad, direction * size * kept, rtol=1e-5)
        limited += kept < 1
    assert 2 <= limited < 15


def warm(clipper: PartitionRelativeClipper, steps: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    weight, grad = torch.randn(8, 8), torch.randn(8, 8)
    for _ in range(steps):
        assert clipper.clip({"a": parameter(weight, grad)}).clipped == 0
    return weight, grad


@pytest.mark.parametrize("fmt", [*FORMATS, None, "FP32"])
@pytest.mark.parametrize("loss_scale", [1e-12, 1.0, 1e12])
def test_every_format_clips_a_planted_spike_and_nothing_else(fmt, loss_scale):
    clipper = PartitionRelativeClipper()
    names = {"a": fmt, "b": fmt}
    weights = [torch.randn(9, 5), torch.randn(30) * 100]
    for step in range(30):
        grads = [torch.randn_like(w) * loss_scale for w in weights]
        grads[0] *= 100 if step == 25 else 1
        p = [parameter(w, g) for w, g in zip(weights, grads, strict=True)]
        report = clipper.clip({"a": p[0], "b": p[1]}, names)
        assert report.clipped == (step == 25)
        assert torch.equal(p[1].grad, grads[1])
        assert torch.equal(p[0].grad, grads[0]) == (step != 25)
    assert 1.0 <= format_allowance(fmt) <= 1.5
    assert clipper.relative_limit(fmt) == pytest.approx(4 * format_allowance(fmt))


def test_allowances_are_bounded_and_tighten_with_precision():
    assert all(1.0 < format_allowance(fmt) <= 1.5 for fmt in every_format())
    by_bits = [format_allowance(f"E{7 - m}M{m}") for m in range(8)]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[0] == 1.5 and by_bits[3] == 1.0625


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_moves_no_mean(bad):
    clipper = PartitionRelativeClipper()
    weight, grad = warm(clipper)
    before = clipper.state_dict()
    broken = grad.clone()
    broken[0, 0] = bad
    p = parameter(weight, broken)
    report = clipper.clip({"a": p})
    assert torch.equal(p.grad.view(torch.int32), broken.view(torch.int32))
    assert (report.clipped, report.nonfinite, report.smallest) == (0, 1, 1.0)
    assert clipper.state_dict() == before
    assert clipper.clip({"a": parameter(weight, grad * 100)}).clipped == 1


def test_a_broken_first_gradient_and_zero_ones_do_no_harm():
    clipper, weight = PartitionRelativeClipper(warmup=2), torch.zeros(4)
    for grad in (torch.full((4,), math.nan), torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.ones(4)):
        p = parameter(weight, grad)
        assert clipper.clip({"a": p}).clipped == 0
        assert torch.equal(p.grad.isnan(), grad.isnan()) and torch.equal(p.grad.nan_to_num(), grad.nan_to_num())


def test_a_zero_weight_is_measured_against_the_floor():
    clipper, weight = PartitionRelativeClipper(floor=0.01), torch.zeros(5)
    for step in range(15):
        report = clipper.clip({"a": parameter(weight, torch.ones(5) * (100 if step == 14 else 1))})
        assert (report.nonfinite, report.clipped) == (0, step == 14)
    assert clipper.clip({"a": parameter(weight + 0.005, torch.ones(5) * 3)}).clipped == 0


def test_a_spike_raises_the_next_limit_little_and_a_new_level_is_followed():
    clipper = PartitionRelativeClipper(factor=4.0, decay=0.97)
    weight, grad = warm(clipper)
    before = clipper.state_dict()["mean"]["a"].item()
    clipper.clip({"a": parameter(weight, grad * 1e6)})
    assert clipper.state_dict()["mean"]["a"].item() <= before * (1 + 0.05 * 3) * 1.001
    kept = [clipper.clip({"a": parameter(weight, grad * 50)}).smallest.item() for _ in range(100)]
    assert kept[0] < 0.2 and kept[-1] == 1.0


def test_clipping_resumes_bitwise_and_takes_parameters_without_gradients():
    first, second = PartitionRelativeClipper(), PartitionRelativeClipper()
    weight, grad = warm(first)
    second.load_state_dict(first.state_dict())
    results = [parameter(weight, grad * 30) for _ in range(2)]
    for clipper, p in zip((first, second), results, strict=True):
        clipper.clip({"a": p})
    assert torch.equal(results[0].grad, results[1].grad)
    report = first.clip({"a": nn.Parameter(weight)})
    assert (report.clipped, report.nonfinite, report.smallest) == (0, 0, 1.0)


@pytest.mark.parametrize("bad", [{"factor": 1.0}, {"factor": math.inf}, {"decay": 1.0}, {"warmup": 0}, {"floor": 0.0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        PartitionRelativeClipper(**bad)


NEIGHBOURS = [
    ("E4M3", "overflow", "E5M2"),
    ("E4M3", "nonfinite", "E5M2"),
    ("E4M3", "stall", "E3M4"),
    ("E5M2", "overflow", "E6M1"),
    ("E7M0", "overflow", "BF16"),
    ("E7M0", "stall", "E6M1"),
    ("E0M7", "stall", "BF16"),
    ("E0M7", "overflow", "E1M6"),
    ("FP16", "overflow", "BF16"),
    ("FP16", "stall", "FP32"),
    ("BF16", "overflow", "FP32"),
    ("BF16", "stall", "FP32"),
    ("E4M3/ieee", "stall", "E3M4"),
    ("E4M3/finite", "overflow", "E5M2"),
    ("E4M3/fnuz", "overflow", "E5M2/fnuz"),
    ("E4M3b11/fnuz", "stall", "E3M4/fnuz"),
    ("E4M3/p3109", "overflow", "E5M2/p3109"),
    ("E1M6/p3109", "stall", "BF16"),
    ("E7M0/p3109", "overflow", "BF16"),
    ("INT8", "overflow", "E1M6"),
    ("INT8", "stall", "BF16"),
    ("FP32", "overflow", None),
    ("FP32", "stall", None),
]


@pytest.mark.parametrize(("fmt", "reason", "expected"), NEIGHBOURS)
def test_next_formats(fmt, reason, expected):
    assert EmergencyMantissaShift().next_format(fmt, reason) == expected


def test_next_formats_leave_out_those_visited():
    shifts = EmergencyMantissaShift()
    assert shifts.next_format("E4M3", "overflow", ("E5M2",)) == "BF16"
    assert shifts.next_format("E4M3", "overflow", ("E5M2", "BF16")) == "FP32"


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.name)
def test_a_shift_goes_the_way_its_reason_asks(fmt):
    for reason in REASONS:
        after = EmergencyMantissaShift().next_format(fmt, reason)
        if after == "FP32" or after == "BF16":
            continue
        after = get_format(after)
        step = -1 if reason == "stall" else 1
        assert after.total_bits == fmt.total_bits
        assert after.exponent_bits - fmt.exponent_bits == step == fmt.mantissa_bits - after.mantissa_bits


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.name)
def test_every_ladder_ends_in_float32_whatever_the_reasons(fmt):
    sequences = [[reason] * 40 for reason in REASONS] + [["overflow", "stall"] * 20, ["stall", "overflow"] * 20]
    sequences += [random.Random(seed).choices(REASONS, k=40) for seed in range(5)]
    for reasons in sequences:
        shifts, current, seen = EmergencyMantissaShift(), fmt.name, [fmt.name]
        for step, reason in enumerate(reasons):
            event = shifts.shift("a", current, reason, step)
            if event is None:
                break
            assert event.label == f"{current}->{event.after}"
            current = event.after
            seen.append(current)
        assert current == "FP32" and len(seen) == len(set(seen)) <= 11


def test_shifts_are_per_layer_and_resume():
    shifts = EmergencyMantissaShift()
    assert shifts.shift("a", "E4M3", "overflow", 5).after == "E5M2"
    assert shifts.shift("b", "E5M2", "stall", 6).after == "E4M3"
    resumed = EmergencyMantissaShift()
    resumed.load_state_dict(json.loads(json.dumps(shifts.state_dict())))
    assert resumed.events == shifts.events
    for each in (shifts, resumed):
        assert each.shift("a", "E5M2", "stall", 7).after == "BF16"
    with pytest.raises(ValueError, match=r"reason 'overflows'.*nearest: overflow"):
        shifts.next_format("E4M3", "overflows")
    with pytest.raises(ValueError, match="E4M3"):
        shifts.next_format("E4M33", "stall")
