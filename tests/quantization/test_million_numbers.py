"""The 8-bit formats against gfloat, ml_dtypes and torch, bit for bit, on over a million numbers each.

Every value, every midpoint and the float32 numbers next to them; every bfloat16 pattern; and a million numbers of
which a part is spread evenly over all float32 exponents, a part over those of the format, and a part is normal noise
of many widths. All of them round as the oracle does, saturating, and to infinity where the format has one.
"""

import dataclasses
import math
from functools import cache

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat.formats import format_info_p3109
from gfloat.types import Domain
from oracle import as_gfloat, magnitudes, nearest, same

from altgrad.quantization import FloatFormat, decode, encode, get_format, quantize
from altgrad.quantization.formats import VARIANTS

MILLION = 1 << 20


def byte_wide():
    for exponent_bits in range(8):
        for variant in VARIANTS[:-1] if exponent_bits else ("finite", "integer"):
            yield FloatFormat(exponent_bits, 7 - exponent_bits, variant)


SPLITS = list(byte_wide())
# gfloat has no format without exponent, and takes 1.984375, no value of E1M6/ieee, for its largest.
KNOWN_TO_GFLOAT = [fmt for fmt in SPLITS if fmt.exponent_bits and fmt.name != "E1M6/ieee"]
CASTS = [
    ("E3M4", ml_dtypes.float8_e3m4),
    ("E4M3/ieee", ml_dtypes.float8_e4m3),
    ("E4M3", ml_dtypes.float8_e4m3fn),
    ("E5M2", ml_dtypes.float8_e5m2),
    ("E4M3", torch.float8_e4m3fn),
    ("E5M2", torch.float8_e5m2),
    ("E4M3/fnuz", ml_dtypes.float8_e4m3fnuz),
    ("E5M2/fnuz", ml_dtypes.float8_e5m2fnuz),
    ("E4M3b11/fnuz", ml_dtypes.float8_e4m3b11fnuz),
    ("E4M3/fnuz", torch.float8_e4m3fnuz),
    ("E5M2/fnuz", torch.float8_e5m2fnuz),
]


def label(value):
    return value.name.replace("/", "-") if isinstance(value, FloatFormat) else str(value).split(".")[-1].rstrip("'>")


@cache
def spread_numbers():
    """3/4 of a million: all exponents alike (random bit patterns), and noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (MILLION // 2,), generator=generator).to(torch.int32)
    widths = torch.tensor([2.0**-13, 1e-3, 0.02, 1.0, 30.0, 1e4, 1e9, 1e-20]).repeat_interleave(MILLION // 32)
    return torch.cat([patterns.view(torch.float32), torch.randn(MILLION // 4, generator=generator) * widths])


@cache
def numbers(fmt):
    """All of the module's, both signs where they are chosen."""
    generator = torch.Generator().manual_seed(fmt.max_index)
    low, high = math.log2(fmt.min_spacing) - 3, math.log2(fmt.max) + 2
    exponents = torch.rand(MILLION // 4, generator=generator, dtype=torch.float64) * (high - low) + low
    near = torch.exp2(exponents).float() * (1 - 2 * torch.randint(0, 2, exponents.shape, generator=generator))
    grid = magnitudes(fmt)
    points = torch.from_numpy(np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])).float()
    infinity = torch.tensor(math.inf)
    exact = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    special = torch.tensor([0.0, infinity, math.nan, 1e-45, 2.0**-126, 3.4028235e38])
    return torch.cat([spread_numbers(), near, exact, -exact, halves, special, -special])


def by_gfloat(fmt, x, *, saturates):
    rounded = gfloat.round_ndarray(as_gfloat(fmt), x.double().numpy(), gfloat.RoundMode.TiesToEven, sat=saturates)
    return torch.from_numpy(rounded).float()


def cast(x, dtype):
    """There and back, and the bits between."""
    if isinstance(dtype, torch.dtype):
        small = x.to(dtype)
        return small.float(), small.view(torch.uint8)
    with np.errstate(invalid="ignore"):
        small = x.numpy().astype(dtype)
    return torch.from_numpy(small.astype(np.float32)), torch.from_numpy(small.view(np.uint8))


def test_the_numbers_are_what_is_promised():
    assert len(torch.bincount((spread_numbers().view(torch.int32) >> 23) & 0xFF).nonzero()) == 256
    for fmt in SPLITS:
        x = numbers(fmt)
        assert len(x) > MILLION and x[-12:].isinf().sum() == x[-12:].isnan().sum() == 2
        assert np.isin(np.concatenate([fmt.values.numpy(), -fmt.values.numpy()]), x[-70_000:]).all()


@pytest.mark.parametrize("fmt", KNOWN_TO_GFLOAT, ids=label)
def test_agrees_with_gfloat(fmt):
    x = numbers(fmt)
    assert same(quantize(x, fmt), by_gfloat(fmt, x, saturates=True))
    if fmt.has_inf:
        assert same(quantize(x, fmt, overflow="inf"), by_gfloat(fmt, x, saturates=False))


@pytest.mark.parametrize("fmt", KNOWN_TO_GFLOAT, ids=label)
def test_every_code_is_gfloats_and_so_are_the_codes_of_all_numbers(fmt):
    theirs, codes = as_gfloat(fmt), torch.arange(256, dtype=torch.uint8)
    values = torch.from_numpy(gfloat.decode_ndarray(theirs, codes.long().numpy())).float()
    assert same(decode(codes, fmt), values)
    x = numbers(fmt)[-70_000:]
    x = x if fmt.has_nan else x[~x.isnan()]
    rounded = gfloat.round_ndarray(theirs, x.double().numpy(), gfloat.RoundMode.TiesToEven, sat=True)
    expected = torch.from_numpy(gfloat.encode_ndarray(theirs, rounded).astype(np.uint8))
    known = ~x.isnan() | (fmt.variant in ("fnuz", "p3109"))
    assert torch.equal(encode(x, fmt)[known], expected[known])


@pytest.mark.parametrize("domain", Domain)
@pytest.mark.parametrize("precision", range(1, 8))
def test_p3109_names_are_gfloats_formats(precision, domain):
    theirs = format_info_p3109(8, precision, domain=domain)
    fmt = get_format(f"binary8p{precision}s{'e' if domain == Domain.Extended else 'f'}")
    assert dataclasses.replace(as_gfloat(fmt), name=theirs.name) == theirs and get_format(theirs.name) == fmt
    assert fmt == FloatFormat(8 - precision, precision - 1, "p3109" if domain == Domain.Extended else "fnuz")


@pytest.mark.parametrize("fmt", [get_format(name) for name in ("E0M7", "E1M6/ieee", "INT8")], ids=label)
def test_what_gfloat_does_not_know_is_the_enumerated_nearest(fmt):
    x = numbers(fmt)
    assert same(quantize(x, fmt), nearest(x, fmt))


@pytest.mark.parametrize("kernel", ["reference", "numba"])
@pytest.mark.parametrize(("name", "dtype"), CASTS, ids=label)
def test_agrees_with_casts_in_values_and_codes(name, dtype, kernel, monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", kernel)
    fmt = get_format(name)
    x = numbers(fmt)
    values, codes = cast(x.clamp(-fmt.max, fmt.max), dtype)
    assert same(quantize(x, fmt), values)
    known = ~x.isnan()
    ours = encode(x, fmt)
    assert torch.equal(ours[known], codes[known])
    assert fmt.has_negative_zero or torch.equal(ours, codes)  # one NaN
    assert cast(x[~known], dtype)[0].isnan().all() and quantize(x[~known], fmt).isnan().all()
    if fmt.has_inf:
        values, codes = cast(x, dtype)
        assert same(quantize(x, fmt, overflow="inf"), values)
        assert torch.equal(encode(x, fmt, overflow="inf")[known], codes[known])


@pytest.mark.parametrize("fmt", SPLITS, ids=label)
def test_bfloat16_input_is_its_float32(fmt):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    assert same(quantize(x, fmt).float(), quantize(x.float(), fmt))
