"""Sweeps against independent answers: every format of 4 to 10 bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import hard_inputs, nearest, same

from altgrad.quantization import FloatFormat, decode, encode, get_format, quantize, ulp
from altgrad.quantization.formats import VARIANTS

WIDTHS = range(4, 11)


def formats_of(width):
    for exponent_bits in range(min(width - 1, 8) + 1):
        for variant in VARIANTS:
            try:
                yield FloatFormat(exponent_bits, width - 1 - exponent_bits, variant)
            except ValueError:
                continue  # no such variant, or beyond float32: test_formats holds which


SMALL = [fmt for width in WIDTHS for fmt in formats_of(width)]


def test_no_format_of_4_to_10_bits_is_left_out():
    splits = {(fmt.exponent_bits, fmt.mantissa_bits) for fmt in SMALL}
    assert splits == {(e, width - 1 - e) for width in WIDTHS for e in range(min(width - 1, 8) + 1)}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kernel", ["reference", "numba"])
def test_every_format_is_the_enumerated_nearest(width, kernel, monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", kernel)
    for fmt in formats_of(width):
        x = hard_inputs(fmt, random=300)
        assert same(quantize(x, fmt), nearest(x, fmt)), fmt
        if fmt.has_inf:
            assert same(quantize(x, fmt, overflow="inf"), nearest(x, fmt, "inf")), fmt
        narrow = x.to(torch.bfloat16)
        assert same(quantize(narrow, fmt).float(), nearest(narrow.float(), fmt).bfloat16().float()), fmt


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SMALL),
    st.integers(-20, 20),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.integers(0, 2**64 - 1),
)
def test_errors_codes_powers_and_neighbours(fmt, power, numbers, seed):
    x = torch.tensor(numbers, dtype=torch.float32)
    x = torch.cat([x, (x.sign() * fmt.min_spacing * (1 + x.abs().log1p())).clamp(-fmt.max, fmt.max)])
    rounded = quantize(x, fmt)
    inside = x.abs() <= fmt.max
    gap = ulp(x, fmt).double()
    assert ((rounded.double() - x.double()).abs()[inside] <= gap[inside] / 2).all()
    assert torch.equal(decode(encode(x, fmt), fmt), rounded)
    scale = math.ldexp(1.0, power)
    scaled = x * scale
    exact = scaled.isfinite() & (scaled.abs() >= 2.0**-100) & (rounded * scale).isfinite()
    exact &= (rounded == 0) | ((rounded * scale).abs() >= 2.0**-126)
    assert same(quantize(scaled, fmt, scale)[exact], (rounded * scale)[exact])
    drawn = quantize(x, fmt, rounding="stochastic", seed=seed)
    below = quantize(x, fmt, rounding="toward_zero")
    above = torch.copysign((below.abs() + ulp(below, fmt)).clamp(max=fmt.max), x)
    assert ((drawn == below) | (drawn == above)).all()


def test_the_named_splits_are_among_those_swept():
    named = ("E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
    assert {get_format(name) for name in named} <= set(SMALL)
