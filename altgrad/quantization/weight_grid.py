"""The grid a weight lives on: one value for the layer that multiplies by it and the optimizer that moves it.

An optimizer that keeps weights on a format's grid owns their scale; the layer must round under that very scale, or it
would move the weights again. So both hold the same `WeightGrid`: the layer as its own attribute, which copying and
pickling a model carries along, and the optimizer through the Parameter (`parameter.grid`). Whoever comes second must
agree on the format.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from altgrad.quantization.formats import FloatFormat


class WeightGrid:
    """`fmt`: the weight's format, None while nobody said; `scale`: 0-d, None while no optimizer owns it."""

    def __init__(self) -> None:
        self.fmt: FloatFormat | None = None
        self.scale: Tensor | None = None

    def join(self, fmt: FloatFormat) -> WeightGrid:
        """This grid, once it is known to have that format; ValueError where the other side has another."""
        if self.fmt not in (None, fmt):
            assert self.fmt is not None
            raise ValueError(
                f"format={fmt.name!r} for a weight that already takes {self.fmt.name}: the layers that "
                "share a weight and its optimizer must agree; give the optimizer a group per format, or "
                "use build_optimizer"
            )
        self.fmt = fmt
        return self


def weight_grid(weight: Any) -> WeightGrid:
    """The weight's grid; a new one, attached to it, where it has none."""
    grid = getattr(weight, "grid", None)
    if grid is None:
        grid = weight.grid = WeightGrid()
    assert isinstance(grid, WeightGrid)
    return grid
