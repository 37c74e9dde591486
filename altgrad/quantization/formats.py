"""Small floating-point formats, as data.

A format is a sign bit, E exponent bits, M mantissa bits and a convention (its *variant*) for the top codes.
With bias = 2^(E-1) - 1 and emin = 1 - bias, the magnitude code c in [0, 2^(E+M)) stands for

    c * 2^(emin - M)                                   below 2^M          (subnormals, evenly spaced)
    (2^M + c mod 2^M) * 2^(emin - M + (c >> M) - 1)    from 2^M upwards   (normals, one binade per 2^M codes)

so the spacing at x is 2^(max(floor(log2|x|), emin) - M), and order of codes is order of values. A format
without exponent bits is the same formula with emin = 0 and no normals: value = c * 2^-M. A format without
mantissa bits has no subnormals: code 0 is zero and code 1 is 2^emin.

Variants: `ieee` keeps the top exponent for inf (mantissa 0) and NaN (the rest); `fn` keeps only the all-ones
code, for NaN; `finite` uses every code for a number. Defaults follow what others ship: E5M2 and E3M4 are ieee
and E4M3 is fn (OCP 8-bit specification, torch.float8_*, ml_dtypes), FP16 and BF16 are ieee, as are the other
formats wider than 8 bits with two or more exponent bits; every other format is finite.

All values must be exact in float32, the carrier of every computation here; hence E <= 8.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor

Variant = Literal["ieee", "fn", "finite"]
VARIANTS: tuple[Variant, ...] = ("ieee", "fn", "finite")

_FLOAT32_MAX = float(torch.finfo(torch.float32).max)
_ALIASES = {"FP16": "E5M10/ieee", "BF16": "E8M7/ieee"}
_NAME = re.compile(r"E(\d+)M(\d+)(?:/(\w+))?")


def default_variant(exponent_bits: int, mantissa_bits: int) -> Variant:
    """The variant a bare name such as "E4M3" means."""
    if (exponent_bits, mantissa_bits) == (4, 3):
        return "fn"
    if (exponent_bits, mantissa_bits) in ((3, 4), (5, 2)):
        return "ieee"
    wider_than_byte = 1 + exponent_bits + mantissa_bits > 8
    return "ieee" if wider_than_byte and exponent_bits >= 2 else "finite"


@dataclass(frozen=True)
class FloatFormat:
    """A format of 4 to 16 bits; equal when its bits and variant are equal. ValueError where none exists."""

    exponent_bits: int
    mantissa_bits: int
    variant: Variant

    def __post_init__(self) -> None:
        split = f"E{self.exponent_bits}M{self.mantissa_bits}"
        if not (type(self.exponent_bits) is type(self.mantissa_bits) is int):
            raise TypeError(f"{split}: bits are counted in whole numbers")
        if self.exponent_bits > 8:
            raise ValueError(
                f"{split}: {self.exponent_bits} exponent bits reach beyond float32, the carrier here; "
                "at most 8 are possible"
            )
        if self.exponent_bits < 0 or self.mantissa_bits < 0 or not 4 <= self.total_bits <= 16:
            raise ValueError(f"{split} has {self.total_bits} bits; formats of 4 to 16 bits are possible")
        if self.variant not in VARIANTS:
            raise ValueError(unknown_message("variant", self.variant, VARIANTS))
        if self.exponent_bits == 0 and self.variant != "finite":
            raise ValueError(
                f"{split}/{self.variant}: without exponent bits every code is a number, use {split}/finite"
            )
        if self.max > _FLOAT32_MAX:
            raise ValueError(
                f"{split}/{self.variant} has values above float32's largest, which carries all values here; "
                f"use {split}/ieee"
            )

    @property
    def name(self) -> str:
        """Shortest name that `get_format` maps back to this format: "E4M3", "E4M3/ieee", "BF16"."""
        split = f"E{self.exponent_bits}M{self.mantissa_bits}"
        for alias, full in _ALIASES.items():
            if full == f"{split}/{self.variant}":
                return alias
        is_default = self.variant == default_variant(self.exponent_bits, self.mantissa_bits)
        return split if is_default else f"{split}/{self.variant}"

    @property
    def total_bits(self) -> int:
        """Width with the sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def num_codes(self) -> int:
        """Number of bit patterns, 2^total_bits."""
        return 1 << self.total_bits

    @property
    def bias(self) -> int:
        """Exponent bias, 2^(E-1) - 1; 0 where there are no exponent bits."""
        return (1 << (self.exponent_bits - 1)) - 1 if self.exponent_bits else 0

    @property
    def min_exponent(self) -> int:
        """emin: exponent of the lowest binade; spacing never falls below 2^(emin - M)."""
        return 1 - self.bias if self.exponent_bits else 0

    @property
    def has_inf(self) -> bool:
        """Whether some code is infinite."""
        return self.variant == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN; an ieee format without mantissa bits spends its one top code on inf."""
        return self.variant == "fn" or (self.variant == "ieee" and self.mantissa_bits > 0)

    @property
    def max_index(self) -> int:
        """Magnitude code of the largest finite value."""
        codes = 1 << (self.exponent_bits + self.mantissa_bits)
        reserved = {"ieee": 1 << self.mantissa_bits, "fn": 1, "finite": 0}[self.variant]
        return codes - reserved - 1

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self._magnitude(self.max_index)

    @property
    def min_spacing(self) -> float:
        """Spacing of the grid around zero, 2^(emin - M): also the smallest positive value."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @property
    def min_normal(self) -> float | None:
        """Smallest normal value, 2^emin; None without exponent bits."""
        return math.ldexp(1.0, self.min_exponent) if self.exponent_bits else None

    @property
    def min_subnormal(self) -> float | None:
        """Smallest positive subnormal value, 2^(emin - M); None without mantissa bits."""
        return self.min_spacing if self.mantissa_bits else None

    @property
    def values(self) -> Tensor:
        """All finite values in ascending order, float32 of shape [2 * max_index + 1]; zero stands once."""
        code = torch.arange(self.max_index + 1)
        binade = (code >> self.mantissa_bits).clamp(min=1)
        significand = code - ((binade - 1) << self.mantissa_bits)
        lowest = self.min_exponent - self.mantissa_bits
        powers = [math.ldexp(1.0, lowest + i) for i in range(max(1, 1 << self.exponent_bits))]
        positive = significand * torch.tensor(powers, dtype=torch.float64)[binade - 1]
        return torch.cat([-positive[1:].flip(0), positive]).to(torch.float32)

    def to_real(self, code: int) -> float:
        """Value of the bit pattern 0 ... num_codes - 1, inf and NaN included; ValueError outside."""
        if not 0 <= code < self.num_codes:
            raise ValueError(f"{self.name} has the codes 0 to {self.num_codes - 1}, not {code}")
        magnitude = code & (self.num_codes // 2 - 1)
        sign = -1.0 if code >= self.num_codes // 2 else 1.0
        if magnitude <= self.max_index:
            return sign * self._magnitude(magnitude)
        is_inf = self.has_inf and magnitude == self.max_index + 1
        return sign * math.inf if is_inf else math.nan

    def to_bits(self, value: float) -> int:
        """Bit pattern of the nearest value, ties to the even code, beyond the largest value that value's
        code.

        The sign of zero is kept. NaN gives the NaN code, ValueError where the format has none.
        """
        sign = self.num_codes // 2 if math.copysign(1.0, value) < 0 else 0
        if math.isnan(value):
            return sign | self.nan_code
        return sign | self._nearest_index(abs(value))

    @property
    def nan_code(self) -> int:
        """Magnitude code of a quiet NaN; ValueError where the format has none."""
        if not self.has_nan:
            raise ValueError(f"{self.name} has no code for NaN")
        if self.variant == "fn":
            return self.num_codes // 2 - 1
        return self.max_index + 1 + (1 << (self.mantissa_bits - 1))

    def _magnitude(self, index: int) -> float:
        binade = max(index >> self.mantissa_bits, 1)
        significand = index - ((binade - 1) << self.mantissa_bits)
        return math.ldexp(significand, self.min_exponent - self.mantissa_bits + binade - 1)

    def _nearest_index(self, magnitude: float) -> int:
        if magnitude >= self.max:
            return self.max_index
        exponent = max(math.frexp(magnitude)[1] - 1, self.min_exponent) if magnitude else self.min_exponent
        steps = math.ldexp(magnitude, self.mantissa_bits - exponent)
        below = math.floor(steps)
        index = ((exponent - self.min_exponent) << self.mantissa_bits) + below
        is_odd = index % 2 == 1
        return index + (steps - below > 0.5 or (steps - below == 0.5 and is_odd))


def unknown_message(what: str, given: object, allowed: tuple[str, ...]) -> str:
    """Text of an error over a name that is none of those allowed, with the nearest of them."""
    near = difflib.get_close_matches(str(given), allowed, n=3, cutoff=0.3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"unknown {what} {given!r}; allowed: {', '.join(allowed)}{hint}"


@cache
def _parse(name: str) -> FloatFormat:
    canonical = name.strip().upper()
    match = _NAME.fullmatch(_ALIASES.get(canonical, canonical).upper())
    if match is None:
        known = _REGISTERED
        raise ValueError(
            f"{unknown_message('format', name, known)}; any ExMy of 4 to 16 bits takes /ieee, /fn, /finite"
        )
    exponent_bits, mantissa_bits = int(match[1]), int(match[2])
    variant = match[3].lower() if match[3] else default_variant(exponent_bits, mantissa_bits)
    return FloatFormat(exponent_bits, mantissa_bits, cast(Variant, variant))


def get_format(name: str | FloatFormat) -> FloatFormat:
    """The format of a name ("E5M2", "E4M3/ieee", "BF16"); a FloatFormat passes through, else ValueError."""
    if isinstance(name, FloatFormat):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a format is a FloatFormat or its name, got {name!r}")
    return _parse(name)


_REGISTERED = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "FP16", "BF16")
FORMATS: dict[str, FloatFormat] = {name: _parse(name) for name in _REGISTERED}
"""All 8-bit splits in their default variants, and the two 16-bit formats in common use."""
