"""Small floating-point formats and integer grids, as data.

A format is a sign bit, E exponent bits, M mantissa bits, an exponent bias and a convention (its *variant*) for the
codes that are no numbers. With emin = 1 - bias, the magnitude code c in [0, 2^(E+M)) stands for

    c * 2^(emin - M)                                   below 2^M          (subnormals, evenly spaced)
    (2^M + c mod 2^M) * 2^(emin - M + (c >> M) - 1)    from 2^M upwards   (normals, one binade per 2^M codes)

so the spacing at x is 2^(max(floor(log2|x|), emin) - M), and order of codes is order of values. A format
without exponent bits is the same formula with emin = -bias and no normals: value = c * 2^(emin - M). A format without
mantissa bits has no subnormals: code 0 is zero and code 1 is 2^emin.

| variant | bias | no numbers | zeros |
| --- | --- | --- | --- |
| `ieee` | 2^(E-1) - 1 | the top exponent: inf (mantissa 0) and NaN (the rest) | two |
| `fn` | 2^(E-1) - 1 | the all-ones code: NaN | two |
| `finite` | 2^(E-1) - 1; 0 without exponent | none | two |
| `fnuz` | 2^(E-1) | the code of -0: NaN | one |
| `p3109` | 2^(E-1) | the code of -0: NaN; the all-ones code: inf | one |
| `integer` | -M, so that values are whole numbers | -2^M, whose code is refused | one |

Defaults follow what others ship: E5M2 and E3M4 are ieee and E4M3 is fn (OCP 8-bit specification, torch.float8_*,
ml_dtypes), FP16 and BF16 are ieee, as are the other formats wider than 8 bits with two or more exponent bits; every
other format is finite. `fnuz` is that of Noune et al. (arXiv 2206.02915), which ml_dtypes and torch name so. IEEE P3109
(interim report 3.1; gfloat) has BinaryKpPse of K bits and precision P = M + 1, with infinities, here `p3109`, and
BinaryKpPsf without, which is `fnuz`; its unsigned formats are none of these, for all here have a sign.

A bias of its own, as in E4M3b11/fnuz, moves a grid by powers of two.

Integers are in two's complement and keep to the symmetric range, -127 ... 127 of INT8: -x has a code whenever x does,
and a product of two never needs the bit that (-128)² would (Jacob et al., arXiv 1712.05877, restrict weights so).
INT8's grid is E0M7's, scaled by 2^7.

All values must be exact in float32, the carrier of every computation here, and normals must be normal there, for
kernels take them by their bits; hence E <= 8 and emin >= -126.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Variant = Literal["ieee", "fn", "finite", "fnuz", "p3109", "integer"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
ONE_ZERO: tuple[Variant, ...] = ("fnuz", "p3109")
"""What keeps the code of -0 for NaN."""

_ALIASES = {"FP16": "E5M10/ieee", "BF16": "E8M7/ieee"}
OTHERS_NAMES = {
    "float16": "FP16",
    "bfloat16": "BF16",
    "float8_e3m4": "E3M4",
    "float8_e4m3": "E4M3/ieee",
    "float8_e4m3fn": "E4M3",
    "float8_e4m3fnuz": "E4M3/fnuz",
    "float8_e4m3b11fnuz": "E4M3b11/fnuz",
    "float8_e5m2": "E5M2",
    "float8_e5m2fnuz": "E5M2/fnuz",
    "float6_e2m3fn": "E2M3",
    "float6_e3m2fn": "E3M2",
    "float4_e2m1fn": "E2M1",
    "float4_e2m1fn_x2": "E2M1",
    "half": "FP16",
    "F16": "FP16",
    "F8_E4M3": "E4M3",
    "F8_E5M2": "E5M2",
    "FP8_E4M3": "E4M3",
    "FP8_E5M2": "E5M2",
    "I8": "INT8",
    "E4M3FN": "E4M3",
}
"""Names of numpy, ml_dtypes, torch and safetensors, by ours. Of E2M1 and its like their "fn" has no NaN."""

_NAME = re.compile(r"E(\d+)M(\d+)(?:B(-?\d+))?(?:/(\w+)|(FNUZ))?")
_INTEGER = re.compile(r"INT(\d+)")
_P3109 = re.compile(r"(?:BINARY|P3109_K)(\d+)P(\d+)(?:([SU])([EF]))?")


def default_variant(exponent_bits: int, mantissa_bits: int) -> Variant:
    """The variant a bare name such as "E4M3" means."""
    if (exponent_bits, mantissa_bits) == (4, 3):
        return "fn"
    if (exponent_bits, mantissa_bits) in ((3, 4), (5, 2)):
        return "ieee"
    wider_than_byte = 1 + exponent_bits + mantissa_bits > 8
    return "ieee" if wider_than_byte and exponent_bits >= 2 else "finite"


def standard_bias(exponent_bits: int, mantissa_bits: int, variant: Variant) -> int:
    """The exponent bias of a split in a variant, where none is named."""
    if exponent_bits == 0:
        return -mantissa_bits if variant == "integer" else 0
    return (1 << (exponent_bits - 1)) - (variant not in ONE_ZERO)


@dataclass(frozen=True)
class FloatFormat:
    """A format of 4 to 16 bits; equal when its bits, variant and bias are. ValueError where none exists.

    `bias`: the variant's standard one where it is left out.
    """

    exponent_bits: int
    mantissa_bits: int
    variant: Variant
    bias: int = cast(int, None)

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
        if self.variant == "integer" and (self.exponent_bits > 0 or self.total_bits > 8):
            raise ValueError(f"{split}/integer: integers have no exponent and 4 to 8 bits, INT4 to INT8")
        if self.exponent_bits == 0 and self.variant not in ("finite", "integer"):
            raise ValueError(
                f"{split}/{self.variant}: without exponent bits every code is a number, use {split}/finite"
            )
        if self.bias is None:
            object.__setattr__(self, "bias", self._standard_bias)
        if type(self.bias) is not int:
            raise TypeError(f"{split}: a bias is a whole number, not {self.bias!r}")
        self._check_bias(split)

    def _check_bias(self, split: str) -> None:
        """ValueError where a value, or what kernels make of the spacing, is beyond float32's normals."""
        is_standard = self.bias == self._standard_bias
        if self.variant == "integer" and not is_standard:
            raise ValueError(f"INT{self.total_bits} has whole numbers; for another spacing use {split}b{self.bias}")
        has_exponent = self.exponent_bits > 0
        significand, power = self._parts(self.max_index)
        top = significand.bit_length() + power + self.bias  # the largest value is below 2^(top - bias)
        # Steps divide by the top binade, and 2^23 spacings are added to what is rounded below the normals.
        low, high = max(top - 127, has_exponent - self.mantissa_bits - 104), 126 + has_exponent
        if low <= self.bias <= high or (is_standard and self.bias <= high and top - self.bias <= 128):
            return
        if low > high:
            raise ValueError(
                f"{split}/{self.variant} with bias {self.bias} has values outside float32's normals, which carry all "
                f"values here; use {split}/ieee with its bias of 127"
            )
        raise ValueError(
            f"{split}/{self.variant} with bias {self.bias} does not fit float32, which carries all values here; "
            f"biases of {low} to {high} are possible"
        )

    @property
    def name(self) -> str:
        """Shortest name that `get_format` maps back to this format: "E4M3", "E4M3/ieee", "E4M3b11/fnuz", "BF16"."""
        if self.variant == "integer":
            return f"INT{self.total_bits}"
        own = "" if self.bias == self._standard_bias else f"b{self.bias}"
        split = f"E{self.exponent_bits}M{self.mantissa_bits}{own}"
        for alias, full in _ALIASES.items():
            if full == f"{split}/{self.variant}":
                return alias
        is_default = self.variant == default_variant(self.exponent_bits, self.mantissa_bits)
        return split if is_default else f"{split}/{self.variant}"

    def in_split(self, exponent_bits: int, mantissa_bits: int) -> FloatFormat:
        """The format of another split: in this variant if it is `fnuz` or `p3109`, which the split may lack, else the
        split's default.

        A bias of its own stays behind, for it belongs to the range of this split. ValueError where there is none.
        """
        default = default_variant(exponent_bits, mantissa_bits)
        return FloatFormat(exponent_bits, mantissa_bits, self.variant if self.variant in ONE_ZERO else default)

    @property
    def total_bits(self) -> int:
        """Width with the sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def num_codes(self) -> int:
        """Number of bit patterns, 2^total_bits."""
        return 1 << self.total_bits

    @property
    def min_exponent(self) -> int:
        """emin: exponent of the lowest binade; spacing never falls below 2^(emin - M)."""
        return (self.exponent_bits > 0) - self.bias

    @property
    def has_inf(self) -> bool:
        """Whether some code is infinite."""
        return self.variant in ("ieee", "p3109")

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN; an ieee format without mantissa bits spends its one top code on inf."""
        return self.variant in ("fn", *ONE_ZERO) or (self.variant == "ieee" and self.mantissa_bits > 0)

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 has a code of its own."""
        return self.variant in ("ieee", "fn", "finite")

    @property
    def max_index(self) -> int:
        """Magnitude code of the largest finite value."""
        codes = 1 << (self.exponent_bits + self.mantissa_bits)
        reserved = {"ieee": 1 << self.mantissa_bits, "fn": 1, "p3109": 1}.get(self.variant, 0)
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
        """Value of the bit pattern 0 ... num_codes - 1, inf and NaN included.

        ValueError outside, and for `unused_code`.
        """
        if not 0 <= code < self.num_codes:
            raise ValueError(f"{self.name} has the codes 0 to {self.num_codes - 1}, not {code}")
        half = self.num_codes // 2
        if self.variant == "integer" and code > half:
            return float(code - self.num_codes)
        if code == self.unused_code:
            raise ValueError(f"{self.name} has the values {-self.max_index} to {self.max_index}, not {-half}")
        if code == half and not self.has_negative_zero:
            return math.nan
        magnitude, sign = code % half, -1.0 if code >= half else 1.0
        if magnitude <= self.max_index:
            return sign * self._magnitude(magnitude)
        is_inf = self.has_inf and magnitude == self.max_index + 1
        return sign * math.inf if is_inf else math.nan

    def to_bits(self, value: float) -> int:
        """Bit pattern of the nearest value, ties to the even code, beyond the largest value that value's
        code.

        The sign of zero is kept where it has two. NaN gives the NaN code, ValueError where the format has none.
        """
        half = self.num_codes // 2
        sign = half if math.copysign(1.0, value) < 0 else 0
        if math.isnan(value):
            return sign | self.nan_code
        index = self._nearest_index(abs(value))
        if index == 0 and not self.has_negative_zero:
            return 0
        return self.num_codes - index if sign and self.variant == "integer" else sign | index

    @property
    def nan_code(self) -> int:
        """Bit pattern of a quiet NaN, positive where NaN has a sign; ValueError where the format has none."""
        if not self.has_nan:
            raise ValueError(f"{self.name} has no code for NaN")
        if self.variant in ONE_ZERO:
            return self.num_codes // 2
        if self.variant == "fn":
            return self.num_codes // 2 - 1
        return self.max_index + 1 + (1 << (self.mantissa_bits - 1))

    @property
    def unused_code(self) -> int | None:
        """The bit pattern that stands for nothing: of -2^M in an integer format, None in all others.

        Who finds one has data of the whole range, and to saturate it would change a number without a word.
        """
        return self.num_codes // 2 if self.variant == "integer" else None

    @property
    def _standard_bias(self) -> int:
        return standard_bias(self.exponent_bits, self.mantissa_bits, self.variant)

    def _parts(self, index: int) -> tuple[int, int]:
        """The value of a magnitude code as (integer, power of two)."""
        binade = max(index >> self.mantissa_bits, 1)
        significand = index - ((binade - 1) << self.mantissa_bits)
        return significand, self.min_exponent - self.mantissa_bits + binade - 1

    def _magnitude(self, index: int) -> float:
        return math.ldexp(*self._parts(index))

    def _nearest_index(self, magnitude: float) -> int:
        if magnitude >= self.max:
            return self.max_index
        exponent = max(math.frexp(magnitude)[1] - 1, self.min_exponent) if magnitude else self.min_exponent
        steps = math.ldexp(magnitude, self.mantissa_bits - exponent)
        below = math.floor(steps)
        index = ((exponent - self.min_exponent) << self.mantissa_bits) + below
        is_odd = index % 2 == 1
        return index + (steps - below > 0.5 or (steps - below == 0.5 and is_odd))


def unknown_message(what: str, given: object, allowed: tuple[str, ...], also: tuple[str, ...] = ()) -> str:
    """Text of an error over a name that is none of those allowed, with the nearest of them and of `also`."""
    near = difflib.get_close_matches(str(given), (*allowed, *also), n=3, cutoff=0.3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"unknown {what} {given!r}; allowed: {', '.join(allowed)}{hint}"


_BY_UPPER_CASE = _ALIASES | {name.upper(): ours for name, ours in OTHERS_NAMES.items()}


@cache
def _parse(name: str) -> FloatFormat:
    known = name.strip().upper().removeprefix("TORCH.")
    while known in _BY_UPPER_CASE:
        known = _BY_UPPER_CASE[known].upper()
    if match := _INTEGER.fullmatch(known):
        if not 4 <= int(match[1]) <= 8:
            raise ValueError(f"{known}: integers of 4 to 8 bits are possible, INT4 to INT8")
        return FloatFormat(0, int(match[1]) - 1, "integer")
    if match := _P3109.fullmatch(known):
        return _of_p3109(known, int(match[1]), int(match[2]), match[3], match[4])
    match = _NAME.fullmatch(known)
    if match is None:
        others = (*(f"INT{bits}" for bits in (8, 4)), *OTHERS_NAMES, "binary8p3", "binary8p4sf", "E4M3fnuz")
        raise ValueError(
            f"{unknown_message('format', name, _REGISTERED, others)}; any ExMy of 4 to 16 bits takes /ieee, /fn, "
            "/finite, /fnuz, /p3109 and a bias, as in E4M3b11/fnuz"
        )
    exponent_bits, mantissa_bits = int(match[1]), int(match[2])
    variant = (match[4] or match[5] or default_variant(exponent_bits, mantissa_bits)).lower()
    bias = cast(int, None if match[3] is None else int(match[3]))
    return FloatFormat(exponent_bits, mantissa_bits, cast(Variant, variant), bias)


def _of_p3109(name: str, bits: int, precision: int, sign: str | None, domain: str | None) -> FloatFormat:
    """Signed and with infinities where the name does not say."""
    if sign == "U":
        raise ValueError(f"{name} is unsigned, and formats here have a sign; use {name[:-2]}SE or {name[:-2]}SF")
    if not 0 < precision < bits:
        raise ValueError(f"{name}: signed formats of {bits} bits have precisions of 1 to {bits - 1}")
    return FloatFormat(bits - precision, precision - 1, "fnuz" if domain == "F" else "p3109")


def get_format(name: str | FloatFormat | torch.dtype) -> FloatFormat:
    """The format of a name ("E5M2", "E4M3/ieee", "BF16", "INT8", "binary8p3", "float8_e4m3fn"), or of torch's dtype.

    A FloatFormat passes through, else ValueError. Case does not matter.
    """
    if isinstance(name, FloatFormat):
        return name
    if isinstance(name, torch.dtype):
        return _parse(str(name).removeprefix("torch."))
    if not isinstance(name, str):
        raise TypeError(f"a format is a FloatFormat or its name, got {name!r}")
    return _parse(name)


_REGISTERED = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "FP16", "BF16")
FORMATS: dict[str, FloatFormat] = {name: _parse(name) for name in _REGISTERED}
"""All 8-bit splits in their default variants, and the two 16-bit formats in common use."""
