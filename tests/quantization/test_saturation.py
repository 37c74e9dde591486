"""Saturation stops at the last value that is finite in the tensor's own dtype."""

import math

import numpy as np
import pytest
import torch
from oracle import magnitudes

from altgrad.quantization import decode, encode, get_format, quantize
from altgrad.quantization.kernels import finite_bound, fitting, grid_of, last_finite
from altgrad.quantization.ops import code_index

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WIDE = ["E6M1", "E6M1/ieee", "E7M0", "E7M0/fn", "E8M7", "E6M9", "E5M2/finite", "E5M2/fn", "E5M10/finite", "E8M0/ieee"]
NARROW = ["E4M3", "E0M7", "E5M2"]
SCALES = [1.0, 0.37, 3.0, 2.0**-9, 2.0**14, 300.0, 2.0**70, 1e30, 3e38]
ROUNDINGS = ["nearest", "stochastic", "toward_zero"]


def inputs(dtype):
    """Patterns of the dtype up to its ends: for the half widths every tenth, and all of the top binades."""
    if dtype == torch.float32:
        patterns = torch.randint(-(2**31), 2**31, (4000,)).to(torch.int32).view(dtype)
        top = torch.finfo(dtype).max * torch.linspace(0.2, 1, 2000)
        special = torch.tensor([math.inf, math.nan, 3.4028235e38, 0.0])
        x = torch.cat([patterns, top, special])
    else:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = torch.cat([every[::10], every[every.abs() > torch.finfo(dtype).max / 8]])
    return torch.cat([x, -x])


def last_value(fmt, dtype, scale):
    """Largest product of a value with the scale that is finite in the dtype, by trying all of them."""
    scaled = torch.from_numpy(magnitudes(fmt)[:-1] * float(np.float32(scale))).float().to(dtype)
    return scaled[scaled.isfinite()].max()


def unlimited(x, fmt, scale, rounding):
    """What the rule says before the dtype's end is felt, with infinity where it lies beyond."""
    wide = quantize((x.float() / scale), fmt, rounding=rounding, seed=5)
    return (wide * scale).to(x.dtype)


@pytest.mark.parametrize("kernel", ["reference", "numba"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WIDE + NARROW)
def test_finite_stays_finite_and_all_else_is_as_it_was(name, dtype, kernel, monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", kernel)
    fmt, x = get_format(name), inputs(dtype)
    for scale in SCALES:
        one = torch.tensor(scale)
        largest = last_value(fmt, dtype, scale)
        for rounding in ROUNDINGS:
            expected = unlimited(x, fmt, one, rounding)
            expected = torch.where(expected.isinf(), torch.copysign(largest, x), expected)
            ways = [scale, one, one.expand(x.shape).contiguous()]
            for found in (quantize(x, fmt, way, rounding=rounding, seed=5) for way in ways):
                assert found.isfinite().logical_or(x.isnan()).all()
                assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), (scale, rounding)
                assert torch.equal(torch.signbit(found)[~x.isnan()], torch.signbit(expected)[~x.isnan()])
            into = torch.empty_like(x)
            assert torch.equal(quantize(x, fmt, scale, rounding=rounding, seed=5, out=into).isnan(), x.isnan())
            assert torch.equal(into.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_what_once_became_infinite():
    top = torch.tensor([65504.0, -65504.0, math.inf], dtype=torch.float16)
    assert quantize(top, "E6M1").tolist() == [49152.0, -49152.0, 49152.0]
    assert quantize(top, "E7M0").tolist() == [32768.0, -32768.0, 32768.0]
    assert quantize(top, "E8M7", 1.0).tolist() == [65280.0, -65280.0, 65280.0]
    assert quantize(top, "E8M7", overflow="inf").tolist() == [math.inf, -math.inf, math.inf]
    assert quantize(torch.tensor([math.inf]), "E7M0", 1e30).isfinite().all()
    assert quantize(top[:1].float(), "E6M1").item() == 65536.0


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_clipped_gradient_stops_where_saturation_does(as_tensor):
    x = torch.tensor([40000.0, 49152.0, 49184.0, 65504.0], dtype=torch.float16, requires_grad=True)
    scale = torch.ones(4) if as_tensor else 1.0
    quantize(x, "E6M1", scale, ste="clipped").sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    wide = x.detach().float().requires_grad_()
    quantize(wide, "E6M1", scale, ste="clipped").sum().backward()
    assert wide.grad.tolist() == [1.0] * 4


def test_codes_do_not_depend_on_the_dtype():
    x = torch.tensor([65504.0, math.inf], dtype=torch.float16)
    fmt = get_format("E6M1")
    assert torch.equal(encode(x, fmt), encode(x.float(), fmt))
    assert code_index(x, fmt).tolist() == code_index(x.float(), fmt).tolist()
    assert decode(encode(x, fmt), fmt).tolist() == [65536.0, fmt.max]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_ends_of_a_dtype(dtype):
    last = torch.tensor(last_finite(dtype))
    beyond = last.nextafter(torch.tensor(math.inf))
    assert float(last) == last_finite(dtype) < finite_bound(dtype)
    assert last.to(dtype).isfinite() and not (beyond.to(dtype).isfinite())
    assert torch.tensor(finite_bound(dtype), dtype=torch.float64).float().to(dtype).isinf()
    below = np.nextafter(finite_bound(dtype), 0.0)
    assert torch.tensor(below, dtype=torch.float64).float().to(dtype).isfinite()


def test_a_grid_that_fits_is_left_alone():
    grid = grid_of(get_format("E6M1"))
    assert fitting(grid, torch.float32, 1.0) is grid and fitting(grid, torch.bfloat16, 1e20) is grid
    assert fitting(grid, torch.float16, 1.0).max_value == 49152.0
