"""An independent answer: enumerate a format's values in float64 from its definition and search among them."""

import math

import numpy as np
import torch

from altgrad.quantization import FORMATS, FloatFormat, get_format

REGISTERED = list(FORMATS)
VARIANTS = ["E1M6/ieee", "E2M5/fn", "E3M4/finite", "E4M3/ieee", "E4M3/finite"]
VARIANTS += ["E5M2/fn", "E6M1/ieee", "E7M0/ieee"]
OTHERS = ["E2M1", "E3M0", "E2M3", "E3M2", "E0M3", "E8M0/ieee", "E6M9", "E1M14", "E0M15"]
ALL = REGISTERED + VARIANTS + OTHERS


def magnitudes(fmt: FloatFormat) -> np.ndarray:
    """Every finite magnitude, by code, from the definition alone; one more value past the end."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    bias = 2 ** (e - 1) - 1 if e else 0
    found = []
    for code in range(2 ** (e + m) + 1):
        exponent, fraction = code >> m, code & (2**m - 1)
        if e == 0:
            found.append(code * 2.0**-m)
        elif exponent == 0:
            found.append(math.ldexp(fraction, 1 - bias - m))
        else:
            found.append(math.ldexp(2**m + fraction, exponent - bias - m))
    last = {"ieee": 2 ** (e + m) - 2**m - 1, "fn": 2 ** (e + m) - 2, "finite": 2 ** (e + m) - 1}[fmt.variant]
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
    return torch.from_numpy(np.where(np.isnan(values), np.nan, np.copysign(result, values))).float()


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
