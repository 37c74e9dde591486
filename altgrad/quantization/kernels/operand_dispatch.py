"""Which kernel makes a whole operand of a tensor: amax, scale and rounding in one call, by every rule for scales.

`dispatch` chooses for single steps; here None says that no kernel does it all, and the steps are taken one by one.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format
from altgrad.quantization.kernels import Rounding, Seed, dispatch, grid_of, seed_of


def operand_kernels(x: Tensor) -> ModuleType | None:
    """The kernels that take x by its address, if it may be taken: float32, contiguous, in this process's memory.

    Of nothing else is an address ever taken, for an address says neither dtype nor length.
    """
    if dispatch.is_traced(x) or x.dtype is not torch.float32 or not (x.is_cpu and x.is_contiguous()):
        return None
    if x.is_neg() or x.numel() == 0 or x.data_ptr() == 0:
        return None
    return _addressed_kernels(os.environ.get("ALTGRAD_KERNEL", ""))


@cache
def _addressed_kernels(forced: str) -> ModuleType | None:
    if dispatch.numba_kernels(forced) is None:
        return None
    return importlib.import_module("altgrad.quantization.kernels.cpu_operands")


Cells = tuple[Tensor | None, Tensor, Tensor]
"""A delayed scale's history, what the step has gathered, and its opening amax: see `ScaleTracker.cells`."""


def grid_values_by_rule(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    seed: Seed,
    headroom: float,
    power_of_two: bool,
    *,
    cells: Cells | None = None,
    advance: bool = False,
    shared: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """`grid_values` under the scale of x's amax, or of a history (`cells`, on x's device), and that scale, 0-d.

    With `advance` x joins what the step gathers.
    """
    if (triton := dispatch.triton_for(x, 1.0)) is None:
        return None
    out, grid = torch.empty_like(x, dtype=torch.bfloat16), grid_of(fmt)
    history = None if cells is None else triton.History(*cells, advance, shared)
    rule = triton.Rule(headroom / grid.max_value, power_of_two, history)
    return out, triton.grid_values_by_rule(x, grid, rounding, seed_of(seed), out, rule)


def values_by_lines(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    seed: Seed,
    kind: str,
    *,
    headroom: float = 1.0,
    power_of_two: bool = False,
    size: int = 0,
    emax: int = 0,
) -> tuple[Tensor, Tensor] | None:
    """x [..., n] rounded under a scale for each row ("per_channel") or block of one ("E8M0", "E4M3": the format of
    its scale, `size` elements of top exponent `emax`), float32; and the scales. Infinities stay."""
    if x.dim() == 0 or dispatch.triton_for(x, 1.0) is None:
        return None
    lines, grid, scales = _gpu_lines(), grid_of(fmt), get_format("E4M3")
    kinds = {"per_channel": lines.ROWS, "E8M0": lines.E8M0, "E4M3": lines.E4M3}
    rule = lines.Lines(
        kinds[kind], headroom / grid.max_value, power_of_two, size, emax, scales.max * fmt.max, grid_of(scales)
    )
    return cast("tuple[Tensor, Tensor]", lines.values_by_lines(x, grid, rounding, seed_of(seed), rule))


@cache
def _gpu_lines() -> ModuleType:
    return importlib.import_module("altgrad.quantization.kernels.gpu_lines")
