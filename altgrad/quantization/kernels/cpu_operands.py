"""The compiled operands on the CPU: a role's numbers as the kernels take them, and tensors as addresses.

Every tensor here has passed `operand_kernels` of `operand_dispatch`. Large ones are cut into a piece for each thread
that torch may use.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.kernels import Rounding, grid_of
from altgrad.quantization.kernels.cpu import THREADED_FROM, _constants, _in_pieces, _word
from altgrad.quantization.kernels.operands import (
    WORDS,
    Source,
    finish,
    finish_with_bias,
    largest_of,
    rounder,
    scale_of_bits,
    scale_of_history,
    to_bfloat16,
)

SOURCES = {
    "current": Source.TENSOR,
    "delayed": Source.DELAYED,
    "per_channel": Source.ROWS,
    "E8M0": Source.E8M0,
    "E4M3": Source.E4M3,
}
"""By a rule's kind, or the format of its blocks' scales."""


class Cells(NamedTuple):
    """Addresses that a call reads and writes, 0 where there is none: the given scale, float32; the number of the draw,
    int64; the history, float32 [length], what the step has gathered, and its opening amax, float32."""

    scale: int = 0
    draws: int = 0
    history: int = 0
    length: int = 0
    gathered: int = 0
    opening: int = 0


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
        self._per_max = headroom / fmt.max
        size, emax, beyond = block
        words = np.zeros(WORDS, np.int64)
        words[:11] = _constants(grid_of(fmt), rounding, "saturate")
        words[11:22] = _constants(grid_of(get_format("E4M3")), "nearest", "saturate")
        words[22], words[26] = _word(self._per_max), _word(beyond)
        words[23] = np.float64(grid_of(fmt).max_value).view(np.int64)
        words[24], words[25], words[28] = size, emax, power_of_two
        words[27] = key if key < 1 << 63 else key - (1 << 64)
        self._words = words
        """alive as long as its address is used"""
        self._rule = words.ctypes.data
        self._given = (
            OperandRounder(fmt, Source.GIVEN, rounding, keeps_infinities=keeps_infinities, key=key)
            if source in (Source.TENSOR, Source.DELAYED)
            else self
        )

    def __call__(self, x: Tensor, out: Tensor, cells: Cells, *, advance: bool = False, shared: bool = False) -> bool:
        """x rounded into `out`, of its size; False where only torch's operators can, and `out` then says nothing."""
        elements, columns = x.numel(), x.size(-1)
        rows, here, there = elements // columns, x.data_ptr(), out.data_ptr()
        # Blocks in E4M3 share a scale of the tensor, which one call finds and uses.
        if elements < THREADED_FROM or self._source == Source.E4M3 or torch.get_num_threads() == 1:
            return self._kernel(here, there, rows, columns, 0, self._rule, *cells, advance, shared)
        if self._given is self:
            return self._in_threads(here, there, rows, columns, cells)
        found = [0]
        if self._source == Source.TENSOR or advance or cells.length == 0:
            _in_pieces(elements, lambda a, b: found.append(largest_of(here + 4 * a, b - a)))
        rule = max(found), self._per_max, self._power_of_two
        number = (
            scale_of_bits(*rule)
            if self._source == Source.TENSOR
            else scale_of_history(*rule, *cells[2:], advance, shared)
        )
        scale = np.array([number], np.float32)
        return self._given._in_threads(here, there, rows, columns, cells._replace(scale=scale.ctypes.data))

    def _in_threads(self, here: int, there: int, rows: int, columns: int, cells: Cells) -> bool:
        done: list[bool] = []
        # A row is the least that may be cut off: a channel's scale, and those of blocks, are found in one.
        unit = 1 if self._source == Source.GIVEN else columns

        def piece(a: int, b: int) -> None:
            begin, stop = -(-a // unit) * unit, -(-b // unit) * unit
            shape = (1, stop - begin) if unit == 1 else ((stop - begin) // columns, columns)
            if stop > begin:
                start = here + 4 * begin, there + 4 * begin, *shape, begin
                done.append(self._kernel(*start, self._rule, *cells, False, False))

        _in_pieces(rows * columns, piece)
        return all(done)


def round_to_bfloat16(x: Tensor, out: Tensor) -> None:
    """x as the nearest values of bfloat16, into another float32 tensor of its size."""
    elements, here, there = x.numel(), x.data_ptr(), out.data_ptr()
    if elements < THREADED_FROM:
        to_bfloat16(here, there, elements)
    else:
        _in_pieces(elements, lambda a, b: to_bfloat16(here + 4 * a, there + 4 * a, b - a))


def round_in_place(y: Tensor) -> None:
    """y, float32, as the nearest values of bfloat16."""
    elements, here = y.numel(), y.data_ptr()
    if elements < THREADED_FROM:
        finish(here, elements)
    else:
        _in_pieces(elements, lambda a, b: finish(here + 4 * a, b - a))


def add_bias_and_round(y: Tensor, bias: Tensor) -> None:
    """y [..., columns] + bias [columns], both float32, as the nearest values of bfloat16, in place."""
    columns, here, added = y.size(-1), y.data_ptr(), bias.data_ptr()
    elements = y.numel()

    def piece(a: int, b: int) -> None:
        begin, end = -(-a // columns), -(-b // columns)
        finish_with_bias(here + 4 * begin * columns, end - begin, columns, added)

    _in_pieces(elements, piece)
