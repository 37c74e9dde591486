"""float64 is rounded once: against an enumeration in exact arithmetic, where rounding to float32 first is wrong."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from altgrad.quantization import FORMATS, encode, get_format, quantize, quantize_model, ulp
from altgrad.quantization.ops import code_index
from altgrad.training import RoundedAdamW

NAMES = ["E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "BF16", "FP16", "E4M3/ieee", "E5M2/finite"]


def close_to_midpoints(name: str) -> torch.Tensor:
    """Every midpoint and every value, and what lies a few float64 steps to either side of them."""
    values = get_format(name).values.double()
    if len(values) > 4096:
        values = values[torch.linspace(0, len(values) - 1, 4096, dtype=torch.float64).long()].unique()
        values = torch.cat([values, torch.tensor(get_format(name).values[-3:].tolist(), dtype=torch.float64)]).unique()
    places = torch.cat([values, (values[1:] + values[:-1]) / 2])
    up, down = torch.tensor(torch.inf, dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64)
    near = [places]
    for end in (up, down):
        moved = places
        for _ in range(2):
            moved = moved.nextafter(end)
            near.append(moved)
    return torch.cat(near)


def nearest_index(x: torch.Tensor, name: str) -> torch.Tensor:
    """Place on the grid by float64 search, ties to the even code; midpoints of 16-bit formats are exact in float64."""
    fmt = get_format(name)
    magnitudes = np.unique(np.abs(fmt.values.double().numpy()))
    size = np.abs(x.numpy())
    above = np.clip(np.searchsorted(magnitudes, size), 1, len(magnitudes) - 1)
    low, high = magnitudes[above - 1], magnitudes[above]
    middle = (low + high) / 2
    takes_high = (size > middle) | ((size == middle) & (above % 2 == 0))
    index = np.where(size >= magnitudes[-1], len(magnitudes) - 1, np.where(takes_high, above, above - 1))
    return torch.from_numpy(np.where(np.signbit(x.numpy()), -index, index)).to(torch.int32)


@pytest.mark.parametrize("name", NAMES)
def test_codes_near_every_midpoint(name):
    x = close_to_midpoints(name)
    expected = nearest_index(x, name)
    assert torch.equal(code_index(x, name), expected)
    fmt = get_format(name)
    magnitudes = np.unique(np.abs(fmt.values.double().numpy()))
    values = torch.from_numpy(magnitudes)[expected.abs().long()].copysign(x)
    assert torch.equal(quantize(x, name), values)
    if fmt.total_bits <= 8:
        codes = encode(x, name).long()
        assert torch.equal(codes % (fmt.num_codes // 2), expected.abs().long())
    # The double rounding that this replaces is wrong on many of these.
    assert not torch.equal(quantize(x.float(), name).double(), values)


@pytest.mark.parametrize("name", NAMES)
def test_toward_zero_never_grows(name):
    x = close_to_midpoints(name)
    found = quantize(x, name, rounding="toward_zero")
    assert bool((found.abs() <= x.abs()).all())
    assert bool(((x - found).abs() < ulp(x, name).double()).all() or get_format(name).max < x.abs().max())


@pytest.mark.parametrize("scale", [0.3, 2.0**-9])
def test_a_scale_divides_and_multiplies_in_float64(scale):
    scale = float(np.float32(scale))
    x = torch.randn(2000, dtype=torch.float64)
    found = quantize(x, "E4M3", scale)
    assert torch.equal(found, quantize(x / scale, "E4M3") * scale)
    assert torch.equal(quantize(found, "E4M3", scale), found)
    assert torch.equal(quantize(x, "E4M3", torch.full((2000,), scale)), found)


def test_stochastic_rounding_takes_the_exact_fraction():
    """Where a float32 would have no fraction left, the draws still find it."""
    size, fraction = 1 << 16, Fraction(3, 1 << 13)
    x = torch.full((size,), float(1 + fraction / 128), dtype=torch.float64)
    for name, spacing in (("BF16", 2.0**-7), ("E4M3", 2.0**-3)):
        up = (quantize(x, name, rounding="stochastic", seed=5) > 1).double().mean().item()
        chance = float(fraction / 128) / spacing
        assert abs(up - chance) < 5 * (chance / size) ** 0.5 + 1e-9
    y = torch.randn(4000)
    for name in ("E3M4", "E7M0"):
        drawn = [quantize(t, name, 0.25, rounding="stochastic", seed=9).double() for t in (y, y.double())]
        assert torch.equal(*drawn)


def test_edges():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e300, -1e-300, 5e-324], dtype=torch.float64)
    for name in ("E4M3", "E5M2", "E7M0"):
        fmt = get_format(name)
        found = quantize(x, name)
        assert found[0] == fmt.max and found[4] == fmt.max and found[2].isnan() and found.dtype == torch.float64
        assert bool(torch.signbit(found[3])) and bool(torch.signbit(found[5])) and found[6] == 0
    assert quantize(x, "E5M2", overflow="inf")[4] == torch.inf


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"got torch\..*; allowed: float32, bfloat16, float16, float64"):
        quantize(torch.zeros(3).to(dtype), "E4M3")


def test_a_double_layer_rounds_its_operands_once():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8)).double()
    quantize_model(model, format="E3M4", policy="uniform_act")
    model[0].grid.scale = torch.ones(())
    x = close_to_midpoints("E3M4")[:160].reshape(10, 16)
    operand = model[0].activation_quantizer.operand(x, advance=False, own_scale=torch.ones(()))
    assert torch.equal(operand.values.double(), quantize(x, "E3M4"))
    with pytest.raises(ValueError, match="has dtype float64"):
        RoundedAdamW(model.parameters(), format="E3M4")


def test_every_registered_format_is_covered_here_or_has_its_kind():
    kinds = {(get_format(name).exponent_bits, get_format(name).variant) for name in NAMES}
    assert {FORMATS[name].exponent_bits for name in FORMATS if FORMATS[name].total_bits <= 8} <= {e for e, _ in kinds}
