"""Block formats against gfloat, torchao (where installed) and a numpy reference, and their own laws."""

import math

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from altgrad.quantization import (
    BLOCK_FORMATS,
    BlockFormat,
    block_decode,
    block_encode,
    block_quantize,
    block_scale,
    get_block_format,
    get_format,
    quantize,
)
from altgrad.quantization.block_scaling import BlockCodes

ALL = list(BLOCK_FORMATS)
MX_FLOAT = ["MXFP8_E4M3", "MXFP8_E5M2", "MXFP6_E3M2", "MXFP6_E2M3", "MXFP4_E2M1"]
FLOAT32_MAX = float(torch.finfo(torch.float32).max)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor):
    """Equal numbers with equal signs of zero; NaN for NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    differs = torch.where(torch.isnan(expected), ~torch.isnan(found), (found != expected))
    differs |= (expected == 0) & (torch.signbit(found) != torch.signbit(expected))
    assert not differs.any(), (found[differs][:5], expected[differs][:5])


def hard_blocks(name: str, size: int = 32, random: int = 60) -> torch.Tensor:
    """Blocks [n, size], all finite: random over many magnitudes, on values and midpoints, at range ends."""
    generator = torch.Generator().manual_seed(5)
    element = get_block_format(name).element
    blocks = [
        torch.randn(size, generator=generator) * 2.0 ** float(torch.randint(-120, 120, (), generator=generator))
        for _ in range(random)
    ]
    values = element.values[element.values >= 0].double()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    near = torch.cat([points, torch.nextafter(points, torch.tensor(math.inf)), points.nextafter(torch.tensor(0.0))])
    top = 2.0 ** math.floor(math.log2(element.max))
    for exponent in (-100, -7, 0, 60):
        for start in range(0, len(near), size - 1):
            block = torch.full((size,), top)
            part = near[start : start + size - 1]
            block[1 : 1 + len(part)] = part * (-1.0) ** torch.arange(len(part))
            blocks.append(block * 2.0**exponent)
    for largest in (
        1.0,
        0.99999994,
        1.9999999,
        448.0,
        464.0,
        480.0,
        6.0,
        7.0,
        7.9999995,
        FLOAT32_MAX,
        2.0**127,
        2.0**-126,
        2.0**-127,
        2.0**-130,
        2.0**-149,
        3 * 2.0**-149,
    ):
        for sign in (1.0, -1.0):
            block = torch.linspace(-0.97, 0.97, size) * largest
            block[3] = sign * largest
            block[4:6] = torch.tensor([0.0, -0.0])
            blocks.append(block)
    lonely = torch.full((size,), 2.0**-60)
    lonely[7] = -1.5
    return torch.stack([*blocks, lonely, torch.zeros(size), -torch.zeros(size), torch.full((size,), -7.25)])


def by_gfloat(name: str, blocks: torch.Tensor) -> torch.Tensor:
    fmt = getattr(gfloat.formats, f"format_info_{name.lower()}")
    rows = [gfloat.quantize_block(fmt, row, gfloat.compute_scale_amax) for row in blocks.double().numpy()]
    return torch.from_numpy(np.stack(rows)).float()


def by_numpy_nvfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Values, E4M3 scales and tensor scale of x [n, 16 * k] float32, from the recipe, by ml_dtypes' casts."""
    blocks = x.reshape(len(x), -1, 16)
    whole = np.abs(x).max()
    tensor = np.maximum(whole / np.float32(2688), np.float32(2**-126)) if whole > 0 else np.float32(1)
    wanted = np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / tensor
    scales = np.clip(wanted, np.float32(2**-9), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    total = scales.astype(np.float32) * tensor
    elements = np.clip(blocks / total, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (elements * total).reshape(x.shape), scales[..., 0].astype(np.float32), tensor


@pytest.mark.parametrize("name", MX_FLOAT)
def test_mx_agrees_with_gfloat_bit_for_bit(name):
    blocks = hard_blocks(name)
    assert_same_bits(block_quantize(blocks, name), by_gfloat(name, blocks))


@pytest.mark.parametrize("name", MX_FLOAT)
def test_stored_scales_are_those_of_gfloat(name):
    blocks = hard_blocks(name, random=300)
    fmt = getattr(gfloat.formats, f"format_info_{name.lower()}")
    rows = blocks.double().numpy()
    expected = [gfloat.encode_float(fmt.stype, gfloat.compute_scale_amax(fmt.etype.emax, row)) for row in rows]
    assert block_encode(blocks, name).scales.flatten().tolist() == expected


def test_mxint8_is_the_int8_grid_without_its_lowest_code():
    blocks = hard_blocks("MXINT8")
    blocks = blocks[(blocks == 0).all(-1) | ((blocks.abs().amax(-1) >= 2.0**-126) & (blocks.abs().amax(-1) < 2.0**127))]
    scale = block_scale(blocks, "MXINT8")
    expected = by_gfloat("MXINT8", blocks)
    assert (expected == -scale).any(), "no element takes the lowest code"
    symmetric = torch.maximum(expected, -scale * 127 / 128)
    assert torch.equal(block_quantize(blocks, "MXINT8"), symmetric)
    top = torch.tensor([FLOAT32_MAX] + [0.0] * 31)
    assert block_quantize(top, "MXINT8")[0] == 2.0**127 * 127 / 128


@pytest.mark.parametrize("name", [*MX_FLOAT, "MXINT8"])
def test_scale_follows_the_rule_of_the_specification(name):
    blocks = hard_blocks(name, random=400)
    emax = {"MXFP8_E4M3": 8, "MXFP8_E5M2": 15, "MXFP6_E3M2": 4, "MXFP6_E2M3": 2, "MXFP4_E2M1": 2, "MXINT8": -1}
    for stored, block in zip(block_encode(blocks, name).scales.flatten().tolist(), blocks, strict=True):
        largest = block.abs().max().item()
        exponent = math.frexp(largest)[1] - 1 - emax[name] if largest else -127
        assert stored == min(max(exponent, -127), 127) + 127


def test_nvfp4_agrees_with_numpy_bit_for_bit():
    generator = torch.Generator().manual_seed(3)
    spread = torch.exp2(torch.randint(-9, 9, (80, 4, 1), generator=generator).float())
    random = (torch.randn(80, 4, 16, generator=generator) * spread).flatten(1)
    hard = hard_blocks("NVFP4", 16)
    for x in [random, random * 2.0**-130, random * 2.0**100, *hard.split(1), hard[:60], random * 1e-4]:
        expected, scales, tensor_scale = by_numpy_nvfp4(x.numpy())
        stored = block_encode(x, "NVFP4")
        assert_same_bits(block_quantize(x, "NVFP4"), torch.from_numpy(expected))
        assert stored.tensor_scale.item() == tensor_scale
        assert torch.equal(stored.scales.view(torch.float8_e4m3fn).float(), torch.from_numpy(scales))


def test_nvfp4_scales_near_a_tie_agree_with_numpy():
    """Block amaxes whose E4M3 scale is a tie but for roundings: the order of the two divisions decides."""
    ties = (torch.arange(8, 16) + 0.5) * 2.0 ** torch.arange(-3, 5)[:, None]
    for whole in (64.059204, *np.random.default_rng(0).uniform(1, 100, 30)):
        near = (ties.flatten() * (whole / 2688 * 6)).float()
        near = torch.cat([near * (1 + k * 2.0**-23) for k in (-1, 0, 1)])
        x = torch.zeros(1 + len(near), 16)
        x[0, 0], x[1:, 3] = whole, near.clamp(max=whole)
        _, scales, _ = by_numpy_nvfp4(x.numpy())
        stored = block_encode(x, "NVFP4").scales.view(torch.float8_e4m3fn).float()
        assert torch.equal(stored, torch.from_numpy(scales))


def test_nvfp4_recipe_on_a_worked_example():
    x = torch.zeros(2, 16)
    x[0, :4] = torch.tensor([2688.0, -1400.0, 1000.0, 100.0])
    x[1, :4] = torch.tensor([6.0, 5.0, 4.9, -0.2])
    stored = block_encode(x, "NVFP4")
    assert stored.tensor_scale == 1.0
    assert stored.scales.view(torch.float8_e4m3fn).float().tolist() == [[448.0], [1.0]]
    expected = [[2688.0, -1344.0, 896.0, 0.0], [6.0, 4.0, 4.0, -0.0]]
    assert block_quantize(x, "NVFP4")[:, :4].tolist() == expected


@pytest.mark.parametrize("name", MX_FLOAT)
def test_mx_agrees_with_torchao(name):
    """But for scale code 0: torchao divides by 2^-126 there and stores 2^-127 (it avoids float32 subnormals)."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    blocks = hard_blocks(name, random=400)
    dtype = {
        "MXFP8_E4M3": torch.float8_e4m3fn,
        "MXFP8_E5M2": torch.float8_e5m2,
        "MXFP6_E3M2": "fp6_e3m2",
        "MXFP6_E2M3": "fp6_e2m3",
        "MXFP4_E2M1": torch.float4_e2m1fn_x2,
    }[name]
    scales, data = mx.to_mx(blocks, dtype, 32)
    expected = mx.to_dtype(data, scales, dtype, 32, torch.float32)
    stored = block_encode(blocks, name)
    assert torch.equal(stored.scales, scales.view(torch.uint8).reshape(stored.scales.shape))
    is_same = (stored.scales.flatten() > 0) | (blocks == 0).all(-1)
    assert_same_bits(block_quantize(blocks, name)[is_same], expected[is_same])


def test_nvfp4_agrees_with_torchao():
    """Its blocks have normal scales only, and its elements a reciprocal's rounding: equal away from ties."""
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(400, 64, generator=generator)
    stored = block_encode(x, "NVFP4")
    scales, packed = nv.nvfp4_quantize(x, 16, nv.per_tensor_amax_to_scale(x.abs().max()))
    assert torch.equal(stored.scales, scales.view(torch.uint8).reshape(stored.scales.shape))
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    assert torch.equal(codes, stored.codes)


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize("name", ALL)
@given(x=arrays(np.float32, st.tuples(st.integers(0, 2), st.integers(0, 50)), elements=FLOATS))
@settings(max_examples=60, deadline=None)
def test_quantize_is_decode_of_encode(name, x):
    x = torch.from_numpy(x)
    stored = block_encode(x, name)
    assert stored.codes.shape == x.shape and stored.codes.dtype == stored.scales.dtype == torch.uint8
    assert_same_bits(block_quantize(x, name), block_decode(stored, name))


@pytest.mark.parametrize("name", ALL)
@given(
    x=arrays(np.float32, st.tuples(st.just(2), st.integers(1, 50)), elements=st.floats(-1e4, 1e4, width=32)),
    power=st.integers(-20, 20),
)
@settings(max_examples=60, deadline=None)
def test_laws_on_finite_blocks(name, x, power):
    fmt, x = get_block_format(name), torch.from_numpy(x)
    x = torch.where(x.abs() < 1e-20, 0.0, x)
    q, scale = block_quantize(x, fmt), block_scale(x, fmt)
    assert_same_bits(block_quantize(-x, fmt), -q)
    assert_same_bits(q, quantize(x, fmt.element, scale))
    if fmt.scale == "E8M0":
        assert_same_bits(block_quantize(q, fmt), q)
    if x.abs().max() > 1e-10:
        assert_same_bits(block_quantize(x * 2.0**power, fmt) * 2.0**-power, q)
    within = x.double().abs().clamp(max=fmt.element.max * scale.double())
    top_step = (fmt.element.values[-1] - fmt.element.values[-2]).item()
    assert ((q.double().abs() - within).abs() <= scale.double() * top_step * 0.5000001).all()


@pytest.mark.parametrize("name", ALL)
def test_a_nan_takes_its_block_and_no_other(name):
    size = get_block_format(name).size
    x = torch.randn(2, 3 * size + 5)
    x[0, 1] = 9.0
    clean = block_quantize(x, name)
    for place in (0, size, 3 * size + 4):
        spoiled = x.clone()
        spoiled[1, place] = math.nan
        q = block_quantize(spoiled, name)
        block = slice(place // size * size, place // size * size + size)
        assert torch.isnan(q[1, block]).all()
        assert int(torch.isnan(q).sum()) == q[1, block].numel()
        assert torch.equal(q[~torch.isnan(q)], clean[~torch.isnan(q)])
    assert torch.isnan(block_quantize(torch.full((size,), math.nan), name)).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_infinity_saturates_at_a_number_that_shows(name, dtype):
    x = torch.randn(3, 64).to(dtype)
    x[1, 5], x[1, 6] = -math.inf, 1.0
    q = block_quantize(x, name)
    assert torch.isfinite(q).all() and q.dtype == dtype
    power = 2.0**15 if dtype == torch.float16 else 2.0**127
    assert -2 * power < q[1, 5].item() <= -0.99 * power
    if name != "NVFP4":
        assert torch.equal(q[0], block_quantize(x[0], name)), "the blocks beside it change"


@pytest.mark.parametrize("name", ALL)
def test_blocks_of_zeros_keep_their_signs_beside_others(name):
    x = torch.zeros(4, 64)
    x[1] = -0.0
    assert_same_bits(block_quantize(x, name), x)
    x[3] = torch.randn(64)
    q = block_quantize(x, name)
    assert_same_bits(q[:3], x[:3])
    assert (q[3] != 0).any()


@pytest.mark.parametrize("name", ALL)
def test_tiny_and_huge_blocks_keep_their_digits(name):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    reference = block_quantize(x, name)
    for power in (-100, 100):
        assert_same_bits(block_quantize(x * 2.0**power, name) * 2.0**-power, reference)
    for largest in (FLOAT32_MAX, 2.0**-126, 2.0**-149):
        q = block_quantize(torch.tensor([largest, -largest] * 16), name)
        assert torch.isfinite(q).all() and 0.4 * largest <= q[0] <= largest * 1.0625 and q[1] == -q[0]


@pytest.mark.parametrize("name", ["NVFP4"])
def test_a_block_far_below_the_others_is_not_divided_by_zero(name):
    x = torch.zeros(2, 16)
    x[0], x[1] = 1.0, 2.0**-40
    q = block_quantize(x, name)
    assert torch.equal(q[1], torch.zeros(16)) and torch.isfinite(q).all()
    x[1] = 6 * 2.0**-9 / 2688
    assert block_quantize(x, name)[1] == pytest.approx(x[1], rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_short_last_block_is_scaled_by_what_it_holds(name):
    size = get_block_format(name).size
    x = torch.randn(3, size + 7)
    x[:, size:] *= 2.0**-5
    filled = torch.nn.functional.pad(x, (0, size - 7))
    assert_same_bits(block_quantize(x, name), block_quantize(filled, name)[:, : size + 7])
    assert block_encode(x, name).scales.shape == (3, 2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0,), (5, 0), (0, 5), (1,), (2, 3, 33)])
def test_every_shape(name, shape):
    x = torch.randn(shape)
    assert block_quantize(x, name).shape == shape
    blocks = -(-shape[-1] // get_block_format(name).size)
    assert block_encode(x, name).scales.shape == (*shape[:-1], blocks)


@pytest.mark.parametrize("name", ALL)
def test_layout_and_dtype_change_nothing(name):
    x = torch.randn(48, 64)
    assert_same_bits(block_quantize(x.T, name), block_quantize(x.T.contiguous(), name))
    half = x.to(torch.bfloat16)
    q = block_quantize(half, name)
    assert q.dtype == torch.bfloat16
    assert_same_bits(q, block_quantize(half.float(), name).to(torch.bfloat16))


@pytest.mark.parametrize("name", ALL)
def test_rounding_modes_reach_the_elements(name):
    fmt = get_block_format(name)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(8))
    scale = block_scale(x, name)
    toward_zero = block_quantize(x, name, rounding="toward_zero")
    assert (toward_zero.abs() <= x.abs() * (1 + 1e-6)).all()
    drawn = torch.stack([block_quantize(x, name, rounding="stochastic", seed=s).double() for s in range(200)])
    again = block_quantize(x, name, rounding="stochastic", seed=7)
    assert torch.equal(drawn[7].float(), again)
    inside = x.abs() <= fmt.element.max * scale
    # The mean of 200 draws of an element: within 5.5 standard deviations for all 4096 (chance below 2e-4).
    step = scale.double() * (fmt.element.values[-1] - fmt.element.values[-2])
    assert ((drawn.mean(0) - x).abs()[inside] <= (5.5 * step / 2 / math.sqrt(200))[inside]).all()
    with pytest.raises(ValueError, match="seed"):
        block_quantize(x, name, rounding="stochastic")


def test_gradient_goes_straight_through_and_is_clipped_where_asked():
    x = torch.tensor([[7.9, 1.0, 0.3, -7.5] + [0.0] * 28], requires_grad=True)
    upstream = torch.randn(1, 32)
    block_quantize(x, "MXFP4_E2M1").backward(upstream)
    assert torch.equal(x.grad, upstream)
    x.grad = None
    block_quantize(x, "MXFP4_E2M1", ste="clipped").backward(upstream)
    expected = upstream.clone()
    expected[0, [0, 3]] = 0.0
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("name", ["E5M2", "E6M1", "E7M0", "E1M6", "E0M3", "E3M0"])
@pytest.mark.parametrize("scale", ["E8M0", "E4M3"])
def test_any_small_format_can_be_an_element(name, scale):
    fmt = BlockFormat(get_format(name), scale, 8)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(2))
    for factor in (1.0, 2.0**-110, 2.0**90):
        q = block_quantize(x * factor, fmt)
        assert_same_bits(q, block_decode(block_encode(x * factor, fmt), fmt))
        largest = x.abs().view(6, 3, 8).amax(-1)
        assert (q.abs().view(6, 3, 8).amax(-1) >= 0.49 * factor * largest).all()


def test_storage():
    bits = {name: BLOCK_FORMATS[name].bits_per_element for name in ALL}
    assert bits["MXFP8_E4M3"] == 8.25 and bits["MXFP4_E2M1"] == 4.25 and bits["NVFP4"] == 4.5
    assert block_encode(torch.randn(40), "MXFP4_E2M1").codes.max() < 16


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="MXFP8_E4M3"):
        block_quantize(torch.randn(32), "MXFP8_E3M4")
    with pytest.raises(ValueError, match="0-d"):
        block_quantize(torch.tensor(1.0), "NVFP4")
    with pytest.raises(ValueError, match="int64"):
        block_encode(torch.arange(32), "NVFP4")
    with pytest.raises(ValueError, match="BF16"):
        BlockFormat(get_format("BF16"))
    with pytest.raises(ValueError, match="-4"):
        BlockFormat(get_format("E4M3"), size=-4)
    with pytest.raises(ValueError, match="E8M0"):
        BlockFormat(get_format("E4M3"), "E8M1")
    stored = block_encode(torch.randn(2, 64), "MXFP8_E4M3")
    with pytest.raises(ValueError, match="do not fit"):
        block_decode(BlockCodes(stored.codes, stored.scales[:, :1], stored.tensor_scale), "MXFP8_E4M3")
    assert get_block_format(" nvfp4 ") is BLOCK_FORMATS["NVFP4"]
