import math

import pytest
import torch

from altgrad.quantization import FORMATS, AmaxHistory, ScaleTracker, compute_scale, format_scale, quantize

EIGHT_BIT = [name for name, fmt in FORMATS.items() if fmt.total_bits == 8]


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_the_largest_magnitude_lands_on_the_largest_value(name):
    x = torch.randn(1000)
    scale = compute_scale(x, name)
    assert scale.shape == () and scale.dtype == torch.float32
    assert scale.item() == pytest.approx(x.abs().max().item() / FORMATS[name].max, rel=1e-6)
    assert quantize(x, name, scale).abs().max().item() == pytest.approx(x.abs().max().item(), rel=1e-6)


def test_tiny_scales_are_not_floored():
    assert compute_scale(torch.ones(3), "E7M0").item() == 2.0**-64
    assert (
        quantize(torch.tensor([1.0, 2.0**-100]), "E7M0", compute_scale(torch.ones(3), "E7M0"))[1] == 2.0**-100
    )


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_powers_of_two_are_the_least_that_suffice(name):
    for amax in [1.0, FORMATS[name].max, FORMATS[name].max * 1.0001, 3e-5, 0.9999999, 2.0**-20, 1e15]:
        exact = compute_scale(torch.tensor([amax]), name).item()
        power = compute_scale(torch.tensor([amax]), name, power_of_two=True).item()
        assert math.frexp(power)[0] == 0.5 and exact <= power < 2 * exact
    doubled = compute_scale(torch.ones(1), name, power_of_two=True, headroom=2.0)
    assert doubled == 2 * compute_scale(torch.ones(1), name, power_of_two=True)


@pytest.mark.parametrize("bad", [[0.0, -0.0], [math.nan, 3.0], [math.inf, 1.0], [-math.inf], []])
def test_scale_is_one_where_amax_says_nothing(bad):
    for power_of_two in (False, True):
        assert compute_scale(torch.tensor(bad), "E4M3", power_of_two=power_of_two).item() == 1.0


def test_scale_stays_a_normal_float32():
    assert compute_scale(torch.tensor([1e-44]), "E7M0").item() == 2.0**-126
    assert compute_scale(torch.tensor([1e38]), "E0M7", headroom=2.0).item() == 2.0**126
    with pytest.raises(ValueError, match="headroom"):
        compute_scale(torch.ones(1), "E4M3", headroom=-1.0)


def test_sixteen_bit_formats_take_scale_one():
    assert format_scale(torch.randn(4) * 100, "BF16").item() == 1.0
    assert format_scale(torch.randn(4), "E4M3") != 1.0


def test_history_forgets_after_its_length_and_ignores_what_is_not_finite():
    for position in range(4):
        history = AmaxHistory(length=4)
        values = [1.0, 5.0, 2.0, 3.0]
        values.insert(position, math.nan)
        for value in values[-4:]:
            history.push(torch.tensor(value))
        assert history.amax().item() == max(v for v in values[-4:] if math.isfinite(v))
    for value in (0.5, math.inf, 0.25, 0.125):
        history.push(value)
    assert history.amax().item() == 0.5
    assert AmaxHistory().amax().item() == 0.0


def test_delayed_scale_comes_from_earlier_steps():
    tracker = ScaleTracker("E4M3", history=2)
    first = tracker.update(torch.tensor([448.0]))
    assert first.item() == 1.0
    assert tracker.update(torch.tensor([4480.0])).item() == 1.0
    assert tracker.update(torch.tensor([math.nan])).item() == pytest.approx(10.0)
    assert tracker.update(torch.tensor([1.0])).item() == pytest.approx(10.0)
    assert ScaleTracker("BF16").update(torch.tensor([9.0])).item() == 1.0


def test_history_resumes_exactly():
    history, resumed = AmaxHistory(3), AmaxHistory(3)
    for value in (3.0, 1.0):
        history.push(value)
    resumed.load_state_dict(history.state_dict())
    for value in (0.5, 0.25):
        history.push(value)
        resumed.push(value)
        assert history.amax() == resumed.amax()
    with pytest.raises(ValueError, match="3 steps"):
        AmaxHistory(3).load_state_dict(AmaxHistory(4).state_dict() | {"window": torch.zeros(4)})
