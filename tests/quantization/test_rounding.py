import math

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ALL, NEW, REGISTERED, as_gfloat, hard_inputs, has_two_zeros, nearest, same

from altgrad.quantization import compute_scale, decode, encode, get_format, quantize, ulp
from altgrad.quantization.ops import code_index, index_to_value

KERNELS = ["reference", "numba"]
# gfloat has no format without exponent, and takes 1.984375, no value of E1M6/ieee, for its largest.
WITH_EXPONENT = [name for name in ALL if get_format(name).exponent_bits and name != "E1M6/ieee"]


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", request.param)


@pytest.mark.parametrize("name", ALL)
def test_nearest_is_the_enumerated_nearest(name, kernel):
    x = hard_inputs(name)
    assert same(quantize(x, name), nearest(x, get_format(name)))


@pytest.mark.parametrize("name", WITH_EXPONENT)
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_agrees_with_gfloat(name, rounding, kernel):
    fmt, x = get_format(name), hard_inputs(name, random=1000)
    mode = gfloat.RoundMode.TiesToEven if rounding == "nearest" else gfloat.RoundMode.TowardZero
    for overflow in ("saturate", "inf") if fmt.has_inf else ("saturate",):
        expected = gfloat.round_ndarray(as_gfloat(fmt), x.double().numpy(), mode, sat=overflow == "saturate")
        ours = quantize(x, fmt, rounding=rounding, overflow=overflow)
        assert same(ours, torch.from_numpy(expected).float())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("E3M4", ml_dtypes.float8_e3m4),
        ("E4M3/ieee", ml_dtypes.float8_e4m3),
        ("E4M3", ml_dtypes.float8_e4m3fn),
        ("E5M2", ml_dtypes.float8_e5m2),
        ("E4M3/fnuz", ml_dtypes.float8_e4m3fnuz),
        ("E5M2/fnuz", ml_dtypes.float8_e5m2fnuz),
        ("E4M3b11/fnuz", ml_dtypes.float8_e4m3b11fnuz),
        ("E2M3", ml_dtypes.float6_e2m3fn),
        ("E3M2", ml_dtypes.float6_e3m2fn),
        ("E2M1", ml_dtypes.float4_e2m1fn),
        ("BF16", ml_dtypes.bfloat16),
        ("FP16", np.float16),
    ],
)
def test_agrees_with_ml_dtypes_in_values_and_in_codes(name, dtype, kernel):
    fmt, x = get_format(name), hard_inputs(name)
    x = x[x.abs() <= fmt.max]
    cast = x.numpy().astype(dtype)
    assert same(quantize(x, fmt), torch.from_numpy(cast.astype(np.float32)))
    bits = torch.from_numpy(cast.view(np.uint8) if fmt.total_bits <= 8 else cast.view(np.int16))
    assert torch.equal(encode(x, fmt), bits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("E5M2", torch.float8_e5m2),
        ("E4M3", torch.float8_e4m3fn),
        ("E4M3/fnuz", torch.float8_e4m3fnuz),
        ("E5M2/fnuz", torch.float8_e5m2fnuz),
        ("BF16", torch.bfloat16),
        ("FP16", torch.float16),
    ],
)
def test_agrees_with_torch_casts(name, dtype, kernel):
    fmt, x = get_format(dtype), hard_inputs(name)
    assert fmt.name == name
    inside = x[x.abs() <= fmt.max]
    assert same(quantize(inside, fmt), inside.to(dtype).float())
    if fmt.has_inf:
        assert same(quantize(x, fmt, overflow="inf"), x.to(dtype).float())
    codes = torch.arange(fmt.num_codes).to(torch.uint8 if fmt.total_bits == 8 else torch.int16)
    assert same(decode(codes, fmt), codes.view(dtype).float())


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("E5M2", 5.340576171875e-05, 6.103515625e-05),
        ("E4M3", 0.0146484375, 0.015625),
        ("E1M6", 1.984375, 2.0),
        ("E2M5", 0.984375, 1.0),
        ("E3M4", 0.2421875, 0.25),
        ("E6M1", 6.984919309616089e-10, 9.313225746154785e-10),
        ("E7M0", 1.5, 2.0),
        ("E7M0", 3.0, 2.0),
        ("E7M0", 6.0, 8.0),
        ("E7M0", 2.0**-63, 0.0),
        ("E7M0", 2.0**-63 * 1.01, 2.0**-62),
        ("E4M3", 1e9, 448.0),
        ("E4M3", -math.inf, -448.0),
    ],
)
def test_inputs_that_were_once_wrong(name, x, expected, kernel):
    assert quantize(torch.tensor([x]), name).item() == expected


@pytest.mark.parametrize("name", ALL)
def test_nan_and_the_sign_of_zero_survive(name, kernel):
    result = quantize(torch.tensor([math.nan, -0.0, 0.0, -1e-44]), name)
    is_kept = has_two_zeros(get_format(name))
    assert result[0].isnan() and torch.signbit(result).tolist()[1:] == [is_kept, False, is_kept]


@pytest.mark.parametrize("name", ALL)
def test_kernels_agree_bit_for_bit(name, monkeypatch):
    fmt, x = get_format(name), hard_inputs(name)
    results = []
    for kernel in KERNELS:
        monkeypatch.setenv("ALTGRAD_KERNEL", kernel)
        found = []
        for scale in (1.0, 0.37, 2.0**-9, torch.tensor(5.4e-20)):
            index = code_index(x, fmt, scale)
            found += [
                quantize(x, fmt, scale, rounding=mode, seed=7) for mode in ("nearest", "stochastic", "toward_zero")
            ]
            found += [index.view(torch.float32), index_to_value(index, fmt, scale), ulp(x, fmt, scale)]
            if fmt.has_inf:
                modes = ("nearest", "stochastic", "toward_zero")
                found += [quantize(x, fmt, scale, rounding=mode, seed=7, overflow="inf") for mode in modes]
        results.append(found)
    assert all(same(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", REGISTERED + NEW)
def test_encode_and_decode_invert_each_other(name):
    fmt = get_format(name)
    codes = torch.arange(fmt.num_codes).to(torch.uint8 if fmt.total_bits <= 8 else torch.int16)
    codes = codes[codes != fmt.unused_code] if fmt.unused_code is not None else codes
    values = decode(codes, fmt)
    finite = values.isfinite()
    assert torch.equal(encode(values[finite], fmt), codes[finite])
    x = hard_inputs(fmt)
    x = x[~x.isnan()]
    assert same(decode(encode(x, fmt, 0.3), fmt, 0.3), quantize(x, fmt, 0.3))


def test_encode_refuses_nan_where_there_is_no_code():
    with pytest.raises(ValueError, match="E7M0 has no code for NaN"):
        encode(torch.tensor([1.0, math.nan]), "E7M0")
    assert decode(encode(torch.tensor([math.nan]), "E4M3"), "E4M3").isnan().all()
    assert encode(torch.tensor([math.inf, -math.inf]), "E5M2", overflow="inf").tolist() == [0x7C, 0xFC]
    assert encode(torch.tensor([math.nan, -math.nan, -0.0, -1e-9]), "E4M3/fnuz").tolist() == [0x80, 0x80, 0, 0]
    assert encode(torch.tensor([math.inf, -math.inf]), "binary8p3", overflow="inf").tolist() == [0x7F, 0xFF]
    with pytest.raises(ValueError, match="0 to 63"):
        decode(torch.tensor([64], dtype=torch.uint8), "E2M3")


@pytest.mark.parametrize("name", ["INT8", "INT4"])
def test_integers_are_numpys_in_values_and_codes(name, kernel):
    fmt, x = get_format(name), hard_inputs(name)
    x = x[~x.isnan()]
    whole = np.rint(x.numpy().clip(-fmt.max, fmt.max)).astype(np.int8)
    assert torch.equal(quantize(x, name), torch.from_numpy(whole).float())
    codes = encode(x, name)
    assert torch.equal(codes, torch.from_numpy(whole.view(np.uint8) & (fmt.num_codes - 1)))
    assert torch.equal(decode(codes, name), torch.from_numpy(whole).float())
    assert [fmt.to_real(code) for code in range(fmt.num_codes) if code != fmt.unused_code] == [
        *map(float, range(fmt.max_index + 1)),
        *map(float, range(-fmt.max_index, 0)),
    ]
    if name == "INT8":
        assert torch.equal(decode(torch.from_numpy(whole), name), torch.from_numpy(whole).float())
    for read in (fmt.to_real, lambda code: decode(torch.tensor([code]), name)):
        with pytest.raises(ValueError, match=f"{name} has the values -{fmt.max_index} to {fmt.max_index}"):
            read(fmt.num_codes // 2)
    with pytest.raises(ValueError, match=f"{name} has no code for NaN"):
        encode(torch.tensor([math.nan]), name)


@pytest.mark.parametrize("name", ALL)
def test_index_counts_grid_steps(name, kernel):
    fmt = get_format(name)
    values = fmt.values
    index = torch.arange(-fmt.max_index, fmt.max_index + 1, dtype=torch.int32)
    assert torch.equal(code_index(values, fmt), index)
    assert torch.equal(index_to_value(index, fmt), values)
    beyond = torch.tensor([-(2**30), 2**30], dtype=torch.int32)
    assert index_to_value(beyond, fmt).tolist() == [-fmt.max, fmt.max]
    assert code_index(torch.tensor([math.nan, -0.0, math.inf]), fmt).tolist() == [0, 0, fmt.max_index]


@pytest.mark.parametrize("name", ALL)
def test_ulp_is_the_distance_to_the_next_value(name, kernel):
    fmt = get_format(name)
    positive = fmt.values[fmt.max_index :]
    gaps = positive.diff()
    inside = positive[:-1] + gaps / 4
    assert torch.equal(ulp(positive[:-1], fmt), gaps) and torch.equal(ulp(-inside, fmt), gaps)
    top = ulp(torch.tensor([fmt.max, math.inf, math.nan]), fmt)
    assert top[0] == top[1] and top[2].isnan() and top[0] >= gaps[-1]
    assert torch.equal(ulp(positive[:-1] * 0.25, fmt, 0.25), gaps * 0.25)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
def test_int8_e0m7_and_e1m6_are_one_grid(rounding, kernel):
    x = torch.cat([torch.randn(20000), torch.randn(2000) * 1e-5, torch.tensor([1.0, -1.0, 9.0, math.inf, math.nan])])
    fine = quantize(x, "E0M7", 0.5, rounding=rounding, seed=3)
    coarse = quantize(x, "E1M6", 0.125, rounding=rounding, seed=3)
    whole = quantize(x, "INT8", 0.5 * 2.0**-7, rounding=rounding, seed=3)
    assert same(fine, coarse) and same(whole, fine + 0.0)
    scale = compute_scale(x[:-5], "E0M7")
    assert torch.equal(compute_scale(x[:-5], "INT8"), scale * 2.0**-7)
    found = [
        quantize(x, name, own, rounding=rounding, seed=3) for name, own in (("E0M7", scale), ("INT8", scale / 128))
    ]
    assert same(found[0] + 0.0, found[1])
    assert same(ulp(x, "E0M7", 0.5)[:-5], ulp(x, "E1M6", 0.125)[:-5])


@pytest.mark.parametrize("name", ["E0M7", "E1M6", "E3M4", "E5M2", "E7M0", "BF16"])
def test_stochastic_rounding_is_unbiased(name, kernel):
    fmt, n = get_format(name), 1 << 18
    unit = 2.0 ** (fmt.min_exponent + 1) if fmt.exponent_bits > 1 else 0.25
    for value in (unit * 1.3, unit * 0.77, fmt.min_spacing * 0.3, -unit * 1.1):
        rounded = quantize(torch.full((n,), value), fmt, rounding="stochastic", seed=11).double()
        neighbours = rounded.unique()
        assert len(neighbours) <= 2
        error = (rounded.mean() - torch.tensor(value).double()).abs().item()
        gap = (neighbours.max() - neighbours.min()).item()
        assert error <= 4.5 * 0.5 * gap / math.sqrt(n)


@pytest.mark.parametrize("name", ALL)
def test_stochastic_rounding_leaves_the_grid_alone_and_saturates(name, kernel):
    fmt = get_format(name)
    values = fmt.values.repeat(3)
    assert same(quantize(values, fmt, rounding="stochastic", seed=5), values)
    near_top = torch.full((1000,), fmt.max).nextafter(torch.tensor(math.inf))
    near_top = torch.cat([near_top, torch.full((1000,), fmt.max * 0.9999)])
    assert quantize(near_top, fmt, rounding="stochastic", seed=5).max() <= fmt.max


def test_stochastic_draws_depend_on_the_seed_and_the_place_alone():
    x = torch.rand(10000)
    first = quantize(x, "E4M3", rounding="stochastic", seed=1)
    assert torch.equal(first, quantize(x.clone().view(100, 100), "E4M3", rounding="stochastic", seed=1).view(-1))
    assert torch.equal(first[:77], quantize(x[:77], "E4M3", rounding="stochastic", seed=1))
    for other in (2, 1 + 2**32, 1 + 2**63, -1):
        assert not torch.equal(first, quantize(x, "E4M3", rounding="stochastic", seed=other))


def test_draws_of_neighbouring_seeds_and_places_are_uncorrelated():
    from altgrad.quantization.ops import hash_uniform, mix_seed

    n = 1 << 16
    draws = torch.stack([hash_uniform((n,), seed) for seed in [0, 1, 2, mix_seed(0, 1), mix_seed(1, 0)]]).double()
    assert draws.min() >= 0.0 and draws.max() < 1.0
    bound = 4.5 / math.sqrt(n)
    centred = draws - 0.5
    correlations = torch.corrcoef(torch.cat([centred, centred.roll(1, 1)])).fill_diagonal_(0)
    assert correlations.abs().max() < bound and (draws.mean(1) - 0.5).abs().max() < bound * 0.2887
    counts = torch.histc(draws[0], 256, 0, 1)
    assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 255 + 4.5 * math.sqrt(510)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALL),
    st.floats(2.0**-40, 2.0**40, width=32),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=30),
)
def test_rounding_is_monotone_odd_and_idempotent(name, power, numbers):
    scale = 2.0 ** round(math.log2(power))
    x = torch.tensor(sorted(numbers), dtype=torch.float32)
    rounded = quantize(x, name, scale)
    assert (rounded.diff() >= 0).all()
    mirrored = -rounded if has_two_zeros(get_format(name)) else 0.0 - rounded
    assert same(quantize(-x, name, scale), mirrored)
    assert same(quantize(rounded, name, scale), rounded) or (rounded.abs() < 2.0**-126).any()
    toward = quantize(x, name, scale, rounding="toward_zero")
    assert (toward.abs() <= x.abs()).all()
