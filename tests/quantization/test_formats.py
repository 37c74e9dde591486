import math

import pytest
import torch
from oracle import ALL, hard_inputs, has_two_zeros, magnitudes, nearest, same

from altgrad.quantization import FORMATS, FloatFormat, get_format, quantize
from altgrad.quantization.formats import OTHERS_NAMES

TABLE = {
    "E0M7": (0, 0.9921875, None, 2**-7),
    "E1M6": (0, 3.96875, 2.0, 2**-5),
    "E2M5": (1, 7.875, 1.0, 2**-5),
    "E3M4": (3, 15.5, 2**-2, 2**-6),
    "E4M3": (7, 448.0, 2**-6, 2**-9),
    "E5M2": (15, 57344.0, 2**-14, 2**-16),
    "E6M1": (31, 6442450944.0, 2**-30, 2**-31),
    "E7M0": (63, 2.0**64, 2**-62, None),
    "FP16": (15, 65504.0, 2**-14, 2**-24),
    "BF16": (127, float(torch.finfo(torch.bfloat16).max), 2**-126, 2**-133),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_formats(name):
    fmt = FORMATS[name]
    assert (fmt.bias, fmt.max, fmt.min_normal, fmt.min_subnormal) == TABLE[name]


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("E1M6/ieee", 1.96875),
        ("E1M6/fn", 3.9375),
        ("E2M5/ieee", 3.9375),
        ("E2M5/fn", 7.75),
        ("E3M4/fn", 30.0),
        ("E3M4/finite", 31.0),
        ("E4M3/ieee", 240.0),
        ("E4M3/finite", 480.0),
        ("E5M2/fn", 98304.0),
        ("E5M2/finite", 114688.0),
        ("E6M1/ieee", 3221225472.0),
        ("E6M1/fn", 4294967296.0),
        ("E7M0/ieee", 2.0**63),
        ("E7M0/fn", 2.0**63),
    ],
)
def test_largest_value_by_variant(name, largest):
    assert get_format(name).max == largest


@pytest.mark.parametrize("name", ALL)
def test_values_are_the_enumeration(name):
    fmt = get_format(name)
    positive = torch.from_numpy(magnitudes(fmt)[:-1]).float()
    assert torch.equal(fmt.values, torch.cat([-positive[1:].flip(0), positive]))
    assert fmt.max_index == len(positive) - 1 and fmt.num_codes == 2**fmt.total_bits


@pytest.mark.parametrize("name", ALL)
def test_scalar_transfer_functions_invert_each_other_on_every_code(name):
    fmt = get_format(name)
    reals = {code: fmt.to_real(code) for code in range(fmt.num_codes) if code != fmt.unused_code}
    finite = {code: value for code, value in reals.items() if math.isfinite(value)}
    assert all(fmt.to_bits(value) == code for code, value in finite.items())
    assert len(finite) == 2 * fmt.max_index + 1 + fmt.has_negative_zero == 2 * fmt.max_index + 1 + has_two_zeros(fmt)
    assert any(map(math.isinf, reals.values())) == fmt.has_inf
    nans = [code for code, value in reals.items() if math.isnan(value)]
    assert bool(nans) == fmt.has_nan
    if nans:
        assert fmt.to_bits(math.nan) in nans and fmt.to_bits(-math.nan) in nans
    assert fmt.to_bits(-0.0) == (fmt.num_codes // 2 if has_two_zeros(fmt) else 0)


@pytest.mark.parametrize(
    "name", ["E0M7", "E1M6", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "BF16", "E4M3/fnuz", "E7M0/p3109", "INT8"]
)
def test_scalar_rounding_agrees_with_tensors(name):
    fmt = get_format(name)
    x = torch.cat([torch.randn(500) * fmt.max / 3, torch.randn(500) * fmt.min_spacing * 4, fmt.values[:300] * 1.0625])
    scalar = [fmt.to_real(fmt.to_bits(value)) for value in x.tolist()]
    assert torch.equal(quantize(x, fmt), torch.tensor(scalar))


def test_scalar_edges():
    e5m2 = FORMATS["E5M2"]
    assert e5m2.to_bits(-0.0) == 0x80 and e5m2.to_bits(math.inf) == 0x7B and math.isnan(e5m2.to_real(0x7E))
    assert math.isnan(e5m2.to_real(e5m2.to_bits(math.nan)))
    with pytest.raises(ValueError, match="E7M0 has no code for NaN"):
        FORMATS["E7M0"].to_bits(math.nan)
    for code in (-1, 256):
        with pytest.raises(ValueError, match="0 to 255"):
            e5m2.to_real(code)


def test_names():
    assert all(get_format(name).name == name for name in ALL if name != "E8M0/ieee")
    assert get_format("E5M10") is get_format("E5M10") and get_format("E5M10") == FORMATS["FP16"]
    assert get_format("e4m3/FN") == FORMATS["E4M3"] and get_format("E4M3/ieee").name == "E4M3/ieee"
    assert get_format(FORMATS["E3M4"]) is FORMATS["E3M4"]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *OTHERS_NAMES.items(),
        ("e4m3FNUZ", "E4M3/fnuz"),
        ("E4M3b11fnuz", "E4M3b11/fnuz"),
        ("e4m3b7/fn", "E4M3"),
        ("E5M2b16/FNUZ", "E5M2/fnuz"),
        ("binary8p3", "E5M2/p3109"),
        ("Binary8p4se", "E4M3/p3109"),
        ("BINARY8P4SF", "E4M3/fnuz"),
        ("binary16p11", "E5M10/p3109"),
        ("p3109_k6p3sf", "E3M2/fnuz"),
        ("int8", "INT8"),
        ("Int5", "INT5"),
        (torch.float8_e4m3fn, "E4M3"),
        (torch.float8_e5m2fnuz, "E5M2/fnuz"),
        (torch.float4_e2m1fn_x2, "E2M1"),
        (torch.float16, "FP16"),
        (torch.bfloat16, "BF16"),
        (torch.int8, "INT8"),
    ],
    ids=str,
)
def test_names_of_others_and_the_one_of_ours(name, ours):
    fmt = get_format(name)
    assert fmt.name == ours and get_format(ours) == fmt
    if isinstance(name, str):
        assert get_format(name.lower()) == get_format(name.upper()) == fmt


@pytest.mark.parametrize("kernel", ["reference", "numba"])
def test_a_variants_bias_is_its_own_where_none_is_named(kernel, monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", kernel)
    assert FloatFormat(4, 3, "fn", 7) == FORMATS["E4M3"] != FloatFormat(4, 3, "fn", 8)
    assert FloatFormat(4, 3, "fn", 11).max == 448.0 / 16 and FloatFormat(4, 3, "fnuz") == FloatFormat(4, 3, "fnuz", 8)
    for name, low, high in (("E4M3", -106, 127), ("E7M0/fnuz", 1, 127), ("E0M7", -111, 126)):
        split = get_format(name)
        for bias in (low, high):
            fmt = FloatFormat(split.exponent_bits, split.mantissa_bits, split.variant, bias)
            assert fmt.min_spacing >= 2.0**-149 and fmt.max < 2.0**127 and get_format(fmt.name) == fmt
            assert same(quantize(hard_inputs(fmt), fmt), nearest(hard_inputs(fmt), fmt))
        for bias in (low - 1, high + 1, 10**6, -(10**6)):
            with pytest.raises(ValueError, match=f"biases of {low} to {high} are possible"):
                FloatFormat(split.exponent_bits, split.mantissa_bits, split.variant, bias)


def test_other_splits_keep_the_variants_of_one_zero():
    fmt = get_format("E4M3b11/fnuz")
    assert [fmt.in_split(e, 7 - e).name for e in (5, 7)] == ["E5M2/fnuz", "E7M0/fnuz"]
    with pytest.raises(ValueError, match="use E0M7/finite"):
        fmt.in_split(0, 7)
    assert get_format("E4M3/finite").in_split(5, 2).name == "E5M2" and get_format("INT8").in_split(1, 6).name == "E1M6"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("E4M33", "4 to 16"),
        ("E5M3x", "nearest: E5M2"),
        ("BF61", "BF16"),
        ("FP32", "FP16"),
        ("E9M6", "at most 8"),
        ("E0M7/ieee", "finite"),
        ("E8M7/finite", "float32"),
        ("E4M3/ocp", "ieee, fn, finite"),
        ("E1M1", "3 bits"),
        ("E8M7/fnuz", "use E8M7/ieee"),
        ("E8M7b100", "use E8M7/ieee"),
        ("E0M7/p3109", "use E0M7/finite"),
        ("E4M3/integer", "INT4 to INT8"),
        ("INT16", "INT4 to INT8"),
        ("binary8p8", "precisions of 1 to 7"),
        ("binary8p3uf", "unsigned"),
        ("float8_e4m3fnz", "nearest: float8_e4m3fnuz"),
        (torch.float8_e8m0fnu, "unknown format"),
        (torch.uint8, "unknown format"),
    ],
)
def test_unknown_and_impossible_formats_say_why(name, reason):
    with pytest.raises(ValueError, match=reason):
        get_format(name)


def test_formats_are_values():
    assert FloatFormat(4, 3, "fn") == FORMATS["E4M3"] and len({FloatFormat(4, 3, "fn"), FORMATS["E4M3"]}) == 1
    with pytest.raises(TypeError, match="a bias is a whole number"):
        FloatFormat(4, 3, "fn", 7.0)
    with pytest.raises(ValueError, match="use E0M7b3"):
        FloatFormat(0, 7, "integer", 3)
    with pytest.raises(AttributeError):
        FORMATS["E4M3"].mantissa_bits = 2
