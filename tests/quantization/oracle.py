"""An independent answer: enumerate a format's values in float64 from its definition and search among them."""

import math
import re

import gfloat
import numpy as np
import torch
from gfloat.types import Domain

from altgrad.quantization import FORMATS, FloatFormat, get_format

REGISTERED = list(FORMATS)
VARIANTS = ["E1M6/ieee", "E2M5/fn", "E3M4/finite", "E4M3/ieee", "E4M3/finite"]
VARIANTS += ["E5M2/fn", "E6M1/ieee", "E7M0/ieee"]
OTHERS = ["E2M1", "E3M0", "E2M3", "E3M2", "E0M3", "E8M0/ieee", "E6M9", "E1M14", "E0M15"]
P3109 = [f"E{8 - p}M{p - 1}/p3109" for p in range(1, 8)]
ONE_ZERO = ["E4M3/fnuz", "E5M2/fnuz", "E4M3b11/fnuz", "E7M0/fnuz", *P3109]
NEW = [*ONE_ZERO, "INT8", "INT4", "E4M3b11", "E2M5b127", "E7M0b40", "E5M2b-3", "E0M7b9"]
ALL = REGISTERED + VARIANTS + OTHERS + NEW


def magnitudes(fmt: FloatFormat) -> np.ndarray:
    """Every finite magnitude, by code, from the definition alone; one more value past the end."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    bias = 2 ** (e - 1) - has_two_zeros(fmt) if e else 0
    if own := re.search(r"b(-?\d+)", fmt.name):
        bias = int(own[1])
    unit = 1.0 if fmt.name.startswith("INT") else math.ldexp(1.0, -bias - m)
    found = []
    for code in range(2 ** (e + m) + 1):
        exponent, fraction = code >> m, code & (2**m - 1)
        if e == 0:
            found.append(code * unit)
        elif exponent == 0:
            found.append(math.ldexp(fraction, 1 - bias - m))
        else:
            found.append(math.ldexp(2**m + fraction, exponent - bias - m))
    without = {"ieee": 2**m, "fn": 1, "p3109": 1, "finite": 0, "fnuz": 0, "integer": 0}[fmt.variant]
    last = 2 ** (e + m) - without - 1
    return np.array(found[: last + 2])


def nearest(x: torch.Tensor, fmt: FloatFormat, overflow: str = "saturate") -> torch.Tensor:
    """The nearest value, ties to the even code, with numpy's search and float64 midpoints."""
    grid = magnitudes(fmt)
    values = x.double().numpy()
    size = np.abs(np.where(np.isfinite(values), values, 0.0))
    below = np.clip(np.searchsorted(grid, size, side="right") - 1, 0, len(grid) - 2)
    middle = (grid[below] + grid[below + 1]) / 2
    up = (size > middle) | ((size == middle) & (below % 2 == 1))
    code = below + up
    result = np.where(code == len(grid) - 1, math.inf if overflow == "inf" else grid[-2], grid[code])
    result = np.where(np.isinf(values), math.inf if overflow == "inf" else grid[-2], result)
    signed = np.copysign(result, values) if has_two_zeros(fmt) else np.copysign(result, values) + 0.0
    return torch.from_numpy(np.where(np.isnan(values), np.nan, signed)).float()


def has_two_zeros(fmt: FloatFormat) -> bool:
    return fmt.variant in ("ieee", "fn", "finite")


def as_gfloat(fmt: FloatFormat) -> gfloat.FormatInfo:
    """gfloat's description of a format with exponent bits."""
    return gfloat.FormatInfo(
        fmt.name,
        fmt.total_bits,
        fmt.mantissa_bits + 1,
        bias=fmt.bias,
        is_signed=True,
        has_nz=has_two_zeros(fmt),
        domain=Domain.Extended if fmt.has_inf else Domain.Finite,
        num_high_nans={"ieee": 2**fmt.mantissa_bits - 1, "fn": 1}.get(fmt.variant, 0),
        has_subnormals=True,
        is_twos_complement=False,
    )


def hard_inputs(fmt: FloatFormat | str, random: int = 4000) -> torch.Tensor:
    """Values, midpoints, their float32 neighbours, ends, specials, subnormals and randoms; both signs."""
    fmt = get_format(fmt)
    grid = magnitudes(fmt)
    if len(grid) > 2048:
        grid = np.concatenate([grid[:700], grid[700:-700:97], grid[-700:]])
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    exact = torch.from_numpy(points[points < 3.5e38]).float()
    infinity = torch.full_like(exact, math.inf)
    generator = torch.Generator().manual_seed(fmt.exponent_bits * 100 + fmt.mantissa_bits)
    spread = torch.randn(random, generator=generator) * torch.exp2(
        torch.randint(-80, 80, (random,), generator=generator).float()
    )
    around = torch.randn(random, generator=generator) * fmt.max / 2
    small = torch.randn(random, generator=generator) * fmt.min_spacing * 3
    patterns = torch.randint(-(2**31), 2**31, (random,), generator=generator).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, math.inf, math.nan, 1e-45, 1e-40, 2.0**-126, 3.4028235e38, fmt.max, fmt.max * 1.01])
    x = torch.cat(
        [exact, exact.nextafter(infinity), exact.nextafter(-infinity), spread, around, small, patterns, special]
    )
    return torch.cat([x, -x])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, any NaN equal to any."""
    nan = a.isnan() & b.isnan()
    return bool((nan | (a.view(torch.int32) == b.view(torch.int32))).all())
