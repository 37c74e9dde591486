import math

import pytest
import torch

from altgrad.quantization import (
    FORMATS,
    AmaxHistory,
    ScaleRule,
    ScaleTracker,
    block_quantize,
    compute_channel_scale,
    compute_scale,
    format_scale,
    get_block_format,
    get_format,
    quantize,
)

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
    assert quantize(torch.tensor([1.0, 2.0**-100]), "E7M0", compute_scale(torch.ones(3), "E7M0"))[1] == 2.0**-100


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


SMALL_AND_EIGHT_BIT = [*EIGHT_BIT, "E2M1", "E3M2", "E2M3", "E8M0/ieee", "E7M0/ieee", "E6M1/ieee", "E0M3"]


@pytest.mark.parametrize("name", SMALL_AND_EIGHT_BIT)
@pytest.mark.parametrize("exponent", [-149, -140, -126, -100, -63, -40, -20, 0, 20, 63, 100, 120, 127])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_amax_survives_its_scale(name, exponent, power_of_two):
    x = torch.tensor([2.0**exponent, -(2.0**exponent)])
    scale = compute_scale(x, name, power_of_two=power_of_two)
    assert torch.isfinite(scale) and scale > 0
    # Below 2^-126 (the smallest scale) times the format's spacing nothing can be told from zero.
    reachable = 2.0**-126 * get_format(name).min_spacing
    if 2.0**exponent > reachable and get_format(name).max * 2.0**126 >= 2.0**exponent:
        assert quantize(x, name, scale).tolist() == pytest.approx(x.tolist(), rel=0.34)


@pytest.mark.parametrize("name", ["E7M0", "E6M1"])
def test_wide_formats_keep_their_range_below_the_amax(name):
    fmt = get_format(name)
    for amax in (1e-6, 1.0, 1e6):
        scale = compute_scale(torch.tensor([amax]), name)
        smallest = fmt.min_spacing * scale
        assert scale.item() == pytest.approx(amax / fmt.max, rel=1e-6)
        assert quantize(smallest.reshape(1), name, scale).item() == smallest.item() > 0


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_channels_are_scaled_each_by_its_own(name):
    weight = torch.randn(5, 40) * torch.logspace(-20, 15, 5)[:, None]
    scales = compute_channel_scale(weight, name)
    assert scales.shape == (5, 1) and scales.dtype == torch.float32
    for row, scale in zip(weight, scales.flatten(), strict=True):
        assert scale == compute_scale(row, name)
    by_row = torch.stack([quantize(row, name, compute_scale(row, name)) for row in weight])
    assert torch.equal(quantize(weight, name, scales), by_row)
    assert torch.equal(compute_channel_scale(weight.T, name, axis=-1), scales.T)
    power = compute_channel_scale(weight, name, power_of_two=True, headroom=2.0).flatten()
    assert all(
        p == compute_scale(row, name, power_of_two=True, headroom=2.0) for p, row in zip(power, weight, strict=True)
    )


def test_channels_without_a_usable_amax_take_one():
    x = torch.tensor([[0.0, -0.0], [math.nan, 1.0], [-math.inf, 1.0], [448.0, 2.0]])
    assert compute_channel_scale(x, "E4M3").flatten().tolist() == [1.0, 1.0, 1.0, 1.0]
    x[3] *= 4
    assert compute_channel_scale(x, "E4M3").flatten().tolist() == [1.0, 1.0, 1.0, 4.0]


def test_channel_axes():
    x = torch.randn(2, 3, 4)
    assert compute_channel_scale(x, "E4M3", 1).shape == (1, 3, 1)
    torch.testing.assert_close(compute_channel_scale(x, "E4M3", (0, -1)) * 448, x.abs().amax(1, keepdim=True))
    torch.testing.assert_close(compute_channel_scale(x, "E4M3", (0, 1, 2)) * 448, x.abs())
    assert compute_channel_scale(torch.zeros(3, 0), "E4M3").tolist() == [[1.0]] * 3
    assert compute_channel_scale(torch.randn(3, 4).bfloat16(), "E4M3").dtype == torch.float32
    for axis in (3, -4, (0, 3)):
        with pytest.raises(ValueError, match="3 axes"):
            compute_channel_scale(x, "E4M3", axis)


def test_margin_and_powers_of_two_reach_delayed_scales():
    plain, roomy = ScaleTracker("E4M3"), ScaleTracker("E4M3", margin=3)
    power = ScaleTracker("E4M3", power_of_two=True, headroom=1.5)
    for amax in (448.0 * 3, 448.0 * 5, 1.0):
        x = torch.tensor([amax])
        assert roomy.update(x) == 8 * plain.update(x)
        power.update(x)
    assert plain.scale().item() == 5.0 and power.scale().item() == 8.0
    with pytest.raises(ValueError, match="headroom"):
        ScaleTracker("E4M3", headroom=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_where_a_nan_stands_in_a_tensor_or_a_run_changes_no_later_scale(bad):
    for step in range(4):
        for place in range(3):
            tracker = ScaleTracker("E5M2", history=3)
            for now in range(4):
                x = torch.tensor([1.0, 2.0, 3.0]) * 57344 * 2.0**-now
                if now == step:
                    x[place] = bad
                tracker.update(x)
            assert tracker.scale().item() == pytest.approx(1.5 if step != 1 else 0.75, rel=1e-6)


def test_tracker_resumes_exactly():
    tracker, resumed = ScaleTracker("E3M4", 3), ScaleTracker("E3M4", 3)
    for amax in (5.0, 100.0, 1.0, 2.0):
        tracker.update(torch.tensor([amax]))
    resumed.load_state_dict(tracker.state_dict())
    for amax in (0.5, 0.25, 9.0, 1.0):
        x = torch.tensor([amax])
        assert tracker.update(x) == resumed.update(x)


def test_rule_is_current_by_default():
    x = torch.randn(4, 8, 40)
    for name in (*EIGHT_BIT, "BF16"):
        assert torch.equal(ScaleRule().scale(x, name), format_scale(x, name))
        roomy = ScaleRule(margin=1, headroom=1.5, power_of_two=True)
        assert roomy.scale(x, name) == format_scale(x, name, power_of_two=True, headroom=3.0)
        assert ScaleRule().new_state(name) is None


def test_rule_per_channel_takes_the_last_axis_for_a_row():
    x = torch.randn(4, 8, 40)
    rule = ScaleRule(kind="per_channel", headroom=2.0)
    assert rule.scale(x, "E4M3").shape == (4, 8, 1)
    assert torch.equal(rule.scale(x, "E4M3"), compute_channel_scale(x, "E4M3", (0, 1), headroom=2.0))
    assert torch.equal(rule.scale(x[0], "E4M3"), compute_channel_scale(x[0], "E4M3", 0, headroom=2.0))
    assert rule.scale(x[0, 0], "E4M3").shape == (1,) and rule.scale(x[0, 0, 0], "E4M3").shape == ()
    assert rule.scale(x, "FP16").item() == 1.0


def test_rule_by_block_gives_the_numbers_of_the_block_formats():
    x = torch.randn(4, 8, 40)
    rules = {name: ScaleRule(kind="block") for name in ("MXFP8_E4M3", "MXFP4_E2M1", "MXINT8")}
    rules["NVFP4"] = ScaleRule(kind="block", block_scale_format="E4M3")
    for name, rule in rules.items():
        element = get_block_format(name).element
        assert torch.equal(quantize(x, element, rule.scale(x, element)), block_quantize(x, name))
    assert ScaleRule(kind="block").scale(x, "BF16").item() == 1.0
    short = ScaleRule(kind="block", block_size=8).scale(x, "E4M3")
    assert len({tuple(s.tolist()) for s in short.flatten(0, 1)}) > 1
    assert (short.unflatten(-1, (5, 8)) == short.unflatten(-1, (5, 8))[..., :1]).all()


def test_rule_delayed_keeps_a_state_for_each_tensor():
    rule = ScaleRule(kind="delayed", history=2, margin=1, power_of_two=True)
    state, tracker = rule.new_state("E4M3"), ScaleTracker("E4M3", 2, margin=1, power_of_two=True)
    for amax in (3.0, 700.0, 5.0, 0.1):
        x = torch.tensor([amax])
        before = state.state_dict()
        assert rule.scale(x, "E4M3", state, update=False) == tracker.scale_for(x)
        assert str(state.state_dict()) == str(before), "an evaluation changed the history"
        assert rule.scale(x, "E4M3", state) == tracker.update(x)
    assert rule.new_state("E4M3").shared is False
    assert ScaleRule(kind="delayed", shared=True).new_state("E4M3").shared
    with pytest.raises(ValueError, match="got none"):
        rule.scale(x, "E4M3")
    with pytest.raises(ValueError, match="one for E4M3"):
        rule.scale(x, "E5M2", state)


@pytest.mark.parametrize(
    "knobs",
    [
        {"history": 4},
        {"shared": True},
        {"block_size": 16},
        {"kind": "delayed", "block_size": 16},
        {"kind": "per_channel", "block_scale_format": "E4M3"},
        {"kind": "block", "headroom": 2.0},
        {"kind": "block", "power_of_two": True},
        {"kind": "block", "margin": 1},
        {"headroom": 0.0},
        {"headroom": math.inf},
        {"margin": -1},
        {"kind": "tensor"},
        {"windows": 3},
    ],
)
def test_rule_refuses_knobs_that_mean_nothing(knobs):
    with pytest.raises(ValueError, match=list(knobs)[-1]):
        ScaleRule(**knobs)


@pytest.mark.parametrize("kind", ["current", "delayed", "per_channel", "block"])
def test_rule_traces_without_a_break_and_without_recompiling(kind):
    rule = ScaleRule(kind=kind)
    eager, traced = rule.new_state("E4M3"), rule.new_state("E4M3")
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    step = torch.compile(lambda x: rule.scale(x, "E4M3", traced), fullgraph=True, backend=backend)
    for seed in range(6):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(step(x), rule.scale(x, "E4M3", eager))
    assert len(compiles) <= 2, "recompiled for every step"
    torch.compiler.reset()
