"""The Triton kernels as calls on tensors; what they do is told in `gpu_programs`.

Without a GPU they run under Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from altgrad.quantization.kernels import NEAREST_U, Grid, Overflow, Rounding, hash_keys, last_finite, overflow_values
from altgrad.quantization.kernels.gpu_programs import (
    index_elements,
    largest_parts_of,
    round_elements,
    scale_and_add,
    transpose,
)

BLOCK, WARPS, TILE = 2048, 4, 64
"""Elements a program rounds: enough of them that a thread's own preparations cost little."""
MOST_PARTS = 1024
"""Programs that look for an amax: every rounding program reads what each has found."""


class History(NamedTuple):
    """A delayed scale's state on x's device, float32: the window [length], None while empty, and 0-d cells."""

    window: Tensor | None
    gathered: Tensor
    opening: Tensor
    advance: bool
    shared: bool


class Rule(NamedTuple):
    """How a scale follows from an amax, x's own or a history's; `per_max`: head-room over the format's end."""

    per_max: float
    power_of_two: bool = False
    history: History | None = None

    @property
    def looks(self) -> bool:
        """Whether x's own amax is asked for."""
        past = self.history
        return past is None or past.advance or (past.window is None and not past.shared)


def quantize(
    x: Tensor, scale: float | Tensor, grid: Grid, rounding: Rounding, overflow: Overflow, seed: int | None, out: Tensor
) -> None:
    """round(x / scale) * scale into `out`; contiguous tensors of one floating dtype, possibly the same one."""
    _launch(x, _scale_on(x, scale), grid, rounding, overflow, seed, out)


def grid_values(
    x: Tensor, scale: float | Tensor, grid: Grid, rounding: Rounding, seed: int | None, out: Tensor
) -> None:
    """round(x / scale), saturating, into the bfloat16 `out`; infinities stay."""
    _launch(x, _scale_on(x, scale), grid, rounding, "saturate", seed, out, is_unscaled=True)


def grid_values_by_rule(x: Tensor, grid: Grid, rounding: Rounding, seed: int | None, out: Tensor, rule: Rule) -> Tensor:
    """`grid_values` under the scale that the rule finds, which is returned, 0-d float32."""
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    _launch(x, scale, grid, rounding, "saturate", seed, out, is_unscaled=True, rule=rule)
    return scale


def largest_parts(x: Tensor) -> Tensor:
    """Bits of the largest magnitudes of x's parts, int32 [a power of two]: the largest of them is x's amax."""
    count = min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(x.numel(), BLOCK)))
    parts = torch.empty(count, dtype=torch.int32, device=x.device)
    rounds = triton.cdiv(x.numel(), count * BLOCK)
    largest_parts_of[(count,)](
        _plain(x),
        parts,
        x.numel(),
        rounds,
        IS_BFLOAT16=x.dtype == torch.bfloat16,
        PARTS=count,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return parts


def scaled(y: Tensor, factors: list[Tensor], out: Tensor, bias: Tensor | None = None) -> None:
    """y [..., n], float32 and contiguous, times up to two 0-d factors, plus a float32 bias [n], into `out`, float32 or
    bfloat16."""
    scale_and_add[_programs(y)](
        y,
        factors[0] if factors else y,
        factors[-1] if factors else y,
        y if bias is None else bias,
        _plain(out),
        y.numel(),
        y.shape[-1],
        FACTORS=len(factors),
        HAS_BIAS=bias is not None,
        WRITES_BFLOAT16=out.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,  # the product is rounded before the bias is added
    )


def transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The contiguous transpose of a contiguous [rows, columns] in a dtype that holds its values exactly."""
    rows, columns = x.shape
    out = torch.empty(columns, rows, dtype=dtype, device=x.device)
    transpose[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
        _plain(x), out, rows, columns, IS_BFLOAT16=x.dtype == torch.bfloat16, TILE=TILE
    )
    return out


def _launch(
    x: Tensor,
    scale: Tensor,
    grid: Grid,
    rounding: Rounding,
    overflow: Overflow,
    seed: int | None,
    out: Tensor,
    *,
    is_unscaled: bool = False,
    rule: Rule | None = None,
) -> None:
    history = None if rule is None else rule.history
    window = None if history is None else history.window
    parts = largest_parts(x) if rule is not None and rule.looks else None
    finite_over, infinite_over = overflow_values(grid, rounding, overflow)
    is_stochastic = rounding == "stochastic"
    if is_stochastic and seed is None:
        raise ValueError("stochastic rounding needs a seed, an integer of up to 64 bits; got None")
    first, second = hash_keys(seed or 0) if is_stochastic else (0, 0)
    is_nearest = rounding == "nearest"
    round_elements[_programs(x)](
        _plain(x),
        _plain(out),
        scale,
        x.numel(),
        first,
        second,
        grid.min_normal,
        grid.spacing,
        grid.unscale,
        grid.unscale_rest,
        finite_over,
        infinite_over,
        last_finite(x.dtype),
        NEAREST_U if is_nearest else 0,
        scale if parts is None else parts,
        0.0 if rule is None else rule.per_max,
        scale if window is None else window,
        scale if history is None else history.gathered,
        scale if history is None else history.opening,
        0 if window is None else window.numel(),
        PARTS=0 if parts is None else parts.numel(),
        DELAYED=history is not None,
        HAS_HISTORY=window is not None,
        WINDOW=1 if window is None else triton.next_power_of_2(window.numel()),
        ADVANCES=history is not None and history.advance,
        SHARED=history is not None and history.shared,
        POWER_OF_TWO=rule is not None and rule.power_of_two,
        SHIFT=grid.shift,
        OFFSET=grid.offset,
        MAX_INDEX=grid.max_index,
        ODD=int(is_nearest),
        STOCHASTIC=is_stochastic,
        SATURATES=overflow == "saturate",
        UNSCALED=is_unscaled,
        IS_BFLOAT16=x.dtype == torch.bfloat16,
        WRITES_BFLOAT16=out.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def code_index(x: Tensor, scale: float | Tensor, grid: Grid, out: Tensor) -> None:
    """Signed code nearest to x / scale into the int32 `out`."""
    index_elements[_programs(x)](
        _plain(x),
        out,
        _scale_on(x, scale),
        x.numel(),
        grid.min_normal,
        grid.unscale,
        grid.unscale_rest,
        NEAREST_U,
        SHIFT=grid.shift,
        OFFSET=grid.offset,
        MAX_INDEX=grid.max_index,
        IS_BFLOAT16=x.dtype == torch.bfloat16,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def _plain(x: Tensor) -> Tensor:
    return x.detach().view(torch.int16) if x.dtype == torch.bfloat16 else x.detach()


def _programs(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), BLOCK),)


def _scale_on(x: Tensor, scale: float | Tensor) -> Tensor:
    """The scale as a float32 tensor on x's device: read by the kernel, so that nobody waits for it."""
    if isinstance(scale, Tensor):
        return scale.to(x.device, torch.float32).reshape(())
    return torch.full((), scale, dtype=torch.float32, device=x.device)
