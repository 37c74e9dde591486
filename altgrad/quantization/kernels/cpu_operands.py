"""The compiled operands on the CPU: a role's numbers as the kernels take them, and tensors as addresses.

Every tensor here has passed `dispatch.operand_kernels`. Large ones are cut into one piece per thread torch may use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.kernels import Rounding, finite_bound, grid_of
from altgrad.quantization.kernels.cpu import THREADED_FROM, _constants, _in_pieces
from altgrad.quantization.kernels.operands import (
    Source,
    finish,
    finish_with_bias,
    largest_of,
    rounder,
    scale_of_bits,
    to_bfloat16,
)

BOUND = finite_bound(torch.float32)
SOURCES = {
    "current": Source.TENSOR,
    "delayed": Source.DELAYED,
    "per_channel": Source.ROWS,
    "E8M0": Source.E8M0,
    "E4M3": Source.E4M3,
}
"""By a rule's kind, or the format of its blocks' scales."""


class OperandRounder:
    """Rounds contiguous float32 tensors under scales from one source, whose infinities stay where asked.

    `block`: its size, the elements' top exponent, and what E4M3 scales reach.
    """

    def __init__(
        self,
        fmt: FloatFormat,
        source: Source,
        rounding: Rounding,
        *,
        keeps_infinities: bool,
        headroom: float = 1.0,
        power_of_two: bool = False,
        block: tuple[int, int, float] = (0, 0, 1.0),
        key: int = 0,
    ) -> None:
        self._kernel = rounder(int(source), rounding, keeps_infinities)
        self._source, self._power_of_two = source, power_of_two
        self._per_max, self._end = headroom / fmt.max, grid_of(fmt).max_value
        size, emax, beyond = block
        scales = _constants(grid_of(get_format("E4M3")), "nearest", "saturate")
        constants = _constants(grid_of(fmt), rounding, "saturate")
        numbers = (constants, self._per_max, power_of_two, self._end, BOUND, size, emax, scales, beyond)
        self._numbers, self._key = numbers, key if key < 1 << 63 else key - (1 << 64)
        self._given = (
            OperandRounder(fmt, Source.GIVEN, rounding, keeps_infinities=keeps_infinities, key=key)
            if source == Source.TENSOR
            else self
        )

    def __call__(
        self,
        x: Tensor,
        out: Tensor,
        *,
        draws: Tensor | None = None,
        scale: Tensor | None = None,
        history: Tensor | None = None,
        gathered: Tensor | None = None,
        opening: Tensor | None = None,
        advance: bool = False,
        shared: bool = False,
    ) -> bool:
        """x rounded into `out`, of its size; False where only torch's operators can, and `out` then says nothing.

        `draws`: number of the draw; `scale`: the given one, 1 without; the rest is a `ScaleTracker`'s.
        """
        given = (scale, history, gathered, opening, draws)
        cell, window, total, start, number = (0 if t is None else t.data_ptr() for t in given)
        length = 0 if history is None else history.numel()
        columns = x.shape[-1] if x.dim() else 1
        more = cell, window, length, total, start, advance, shared, self._key, number
        rows, here, there = x.numel() // columns, x.data_ptr(), out.data_ptr()
        if x.numel() < THREADED_FROM or torch.get_num_threads() == 1 or self._source in (Source.DELAYED, Source.E4M3):
            return bool(self._kernel(here, there, rows, columns, 0, *self._numbers, *more))
        return self._in_threads(here, there, rows, columns, more)

    def _in_threads(self, here: int, there: int, rows: int, columns: int, more: tuple[Any, ...]) -> bool:
        if self._source == Source.TENSOR:
            found: list[int] = []
            _in_pieces(rows * columns, lambda a, b: found.append(largest_of(here + 4 * a, b - a)))
            scale = np.array([scale_of_bits(max(found), self._per_max, self._power_of_two)], np.float32)
            return self._given._in_threads(here, there, rows, columns, (scale.ctypes.data, *more[1:]))
        done: list[bool] = []
        # A row is the least that may be cut off: a channel's scale, and those of blocks, are found in one.
        unit = 1 if self._source == Source.GIVEN else columns

        def piece(a: int, b: int) -> None:
            begin, stop = -(-a // unit) * unit, -(-b // unit) * unit
            shape = (1, stop - begin) if unit == 1 else ((stop - begin) // columns, columns)
            if stop > begin:
                done.append(self._kernel(here + 4 * begin, there + 4 * begin, *shape, begin, *self._numbers, *more))

        _in_pieces(rows * columns, piece)
        return all(done)


def round_to_bfloat16(x: Tensor, out: Tensor) -> None:
    """x as the nearest values of bfloat16, into a float32 tensor of its size, which may be x."""
    here, there = x.data_ptr(), out.data_ptr()
    if here == there:
        _in_pieces(x.numel(), lambda a, b: finish(here + 4 * a, b - a))
    else:
        _in_pieces(x.numel(), lambda a, b: to_bfloat16(here + 4 * a, there + 4 * a, b - a))


def add_bias_and_round(y: Tensor, bias: Tensor) -> None:
    """y [rows, columns] + bias [columns], both float32, as the nearest values of bfloat16, in place."""
    finish_with_bias(y.data_ptr(), y.shape[0], y.shape[1], bias.data_ptr())
