"""The law of all observers: 0-d results, no wait for the device, inputs left as they are, one result from any layout.

A tensor on the meta device has no values: whatever would fetch one, as waiting for a device does, raises there.
"""

import pytest
import torch
from torch import nn

from altgrad.quantization import (
    AmaxMovingAverage,
    BitStallDetector,
    DeadUnits,
    PartitionRelativeClipper,
    SpectralNormTracker,
    activation_kurtosis,
    codes_in_use,
    compute_stiffness_field,
    detect_bit_stall,
    gradient_statistics,
    gradient_stiffness_correlation,
    grid_alignment_statistics,
    range_statistics,
    ulp_statistics,
    update_statistics,
)
from altgrad.quantization.ranks import spectrum
from altgrad.quantization.tensor_stats import moment_snr


def clipped(w, other):
    parameter = nn.Parameter(w)
    parameter.grad = other.clone()
    return PartitionRelativeClipper().clip({"a": parameter}, {"a": "E4M3"})


def bit_stalls(w, other):
    detector = BitStallDetector()
    detector.update("a", w, other, "E4M3")
    detector.update("a", w, other, "E4M3")
    return tuple(detector.stall_ratios().values())


def searched(w, other):
    tracker = SpectralNormTracker()
    tracker.update("a", w)
    return tuple(vars(tracker.update("a", other)).values())


def averaged(w, other):
    average = AmaxMovingAverage()
    average.update("a", 0, w.abs().amax())
    return average.update("a", 3, other.abs().amax())


def dead(w, other):
    units = DeadUnits()
    units.update("a", 0, w)
    return (units.update("a", 3, other),)


OBSERVERS = {
    "spectrum": lambda w, other: tuple(vars(spectrum(w)).values()),
    "tracker": searched,
    "alignment": lambda w, other: grid_alignment_statistics(w, "E4M3", 0.5),
    "travel": lambda w, other: ulp_statistics(w, other, "E4M3", 0.5),
    "correlation": lambda w, other: gradient_stiffness_correlation(other, w, "E4M3"),
    "codes": lambda w, other: (codes_in_use(w, "E4M3", 0.5),),
    "stall": lambda w, other: detect_bit_stall(w, other, "E4M3", 0.5),
    "stalls": bit_stalls,
    "range": lambda w, other: range_statistics(w, "E4M3", 0.5),
    "kurtosis": lambda w, other: (activation_kurtosis(w),),
    "gradient": lambda w, other: gradient_statistics(w),
    "moments": lambda w, other: (moment_snr(w, other.square()),),
    "update": lambda w, other: update_statistics(w, other),
    "dead": dead,
    "average": averaged,
    "clip": clipped,
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_never_wait_for_the_device(name):
    w, other = torch.empty(12, 20, device="meta"), torch.empty(12, 20, device="meta")
    assert all(value.shape == () and value.device.type == "meta" for value in OBSERVERS[name](w, other))


def test_the_stiffness_field_never_waits_either():
    assert compute_stiffness_field(torch.empty(3, 4, device="meta"), "E4M3").shape == (3, 4)


def test_the_meta_device_catches_a_wait():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, device="meta").max().item()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observers_leave_their_inputs_alone_and_see_through_layouts(name, dtype):
    w, other = torch.randn(20, 12).to(dtype), (torch.randn(20, 12) * 0.1).to(dtype)
    copies = w.clone(), other.clone()
    found = OBSERVERS[name](w, other)
    assert torch.equal(w, copies[0]) and torch.equal(other, copies[1])
    strided = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in (w, other)]
    assert not strided[0].is_contiguous()
    again = OBSERVERS[name](*strided)
    assert all(a.shape == () and not a.requires_grad for a in found)
    assert [a.item() for a in again] == pytest.approx([a.item() for a in found], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "clip"])
def test_observers_of_a_parameter_are_cut_from_its_graph(name):
    found = OBSERVERS[name](nn.Parameter(torch.randn(8, 8)), torch.randn(8, 8, requires_grad=True))
    assert not any(value.requires_grad for value in found)
