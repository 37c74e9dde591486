import math

import pytest
import torch
from oracle import ALL, magnitudes

from altgrad.quantization import FORMATS, FloatFormat, get_format, quantize

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
    reals = [fmt.to_real(code) for code in range(fmt.num_codes)]
    finite = {code: value for code, value in enumerate(reals) if math.isfinite(value)}
    assert all(fmt.to_bits(value) == code for code, value in finite.items())
    assert len(finite) == 2 * (fmt.max_index + 1)
    assert any(map(math.isinf, reals)) == fmt.has_inf and any(map(math.isnan, reals)) == fmt.has_nan


@pytest.mark.parametrize("name", ["E0M7", "E1M6", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "BF16"])
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
    ],
)
def test_unknown_and_impossible_formats_say_why(name, reason):
    with pytest.raises(ValueError, match=reason):
        get_format(name)


def test_formats_are_values():
    assert FloatFormat(4, 3, "fn") == FORMATS["E4M3"] and len({FloatFormat(4, 3, "fn"), FORMATS["E4M3"]}) == 1
    with pytest.raises(AttributeError):
        FORMATS["E4M3"].mantissa_bits = 2
