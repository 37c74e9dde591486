"""What became of each layer of a model, and what share of its parameters is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import overload


@dataclass(frozen=True)
class ConversionRow:
    """What became of one weight; formats are "" where it was left or has no such role."""

    name: str
    kind: str
    converted: bool
    weight: str
    activation: str
    gradient: str
    parameters: int
    reason: str


class ConversionTable(Sequence[ConversionRow]):
    """Converted and skipped weights in the model's order; prints as an aligned table, at a prompt by itself.

    `quantized`, `convertible`, `total`: numbers of parameters that have a format, that layers known to AltGrad multiply
    by, and that the model has.
    """

    def __init__(self, rows: Sequence[ConversionRow], quantized: int, convertible: int, total: int) -> None:
        self._rows = tuple(rows)
        self.quantized, self.convertible, self.total = quantized, convertible, total

    @property
    def share(self) -> float:
        """Quantized parameters over all of the model's."""
        return self.quantized / self.total if self.total else 0.0

    @property
    def product_share(self) -> float:
        """Quantized parameters over those of matrix products and convolutions."""
        return self.quantized / self.convertible if self.convertible else 0.0

    def summary(self) -> str:
        """The shares, in words."""
        return (
            f"{self.share:.1%} of {self.total} parameters quantized "
            f"({self.product_share:.1%} of those in matrix products and convolutions)"
        )

    @overload
    def __getitem__(self, index: int) -> ConversionRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ConversionRow]: ...
    def __getitem__(self, index: int | slice) -> ConversionRow | Sequence[ConversionRow]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ConversionRow]:
        return iter(self._rows)

    def __str__(self) -> str:
        header = tuple(field.name for field in fields(ConversionRow))
        body = [tuple(_cell(value) for value in astuple(row)) for row in self._rows]
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *body]
        )
        count = f"{sum(row.converted for row in self._rows)} of {len(self._rows)} converted, {self.summary()}"
        return "\n".join([*(line.rstrip() for line in lines), count])

    __repr__ = __str__


def _cell(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
