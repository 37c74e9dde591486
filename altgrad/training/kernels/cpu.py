"""The numba kernel: a plan and its tensors as the numbers and addresses that `fused` steps in one call.

Threads, as many as torch may use, share out the tensors: sums are per tensor, so it does not matter who takes which.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from altgrad.quantization import get_format
from altgrad.quantization.kernels import cpu as quantize_cpu
from altgrad.quantization.kernels import grid_of
from altgrad.training.kernels import FIXED, MAX_RUNGS, Job, Placement, Plan, fused, least_stiffness

_WORDS: dict[torch.dtype, Any] = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.int16}


def step_tensors(jobs: list[Job], plan: Plan, call: int, counts: Tensor) -> None:
    """One step of every job, all of one dtype; `counts` is int64 [jobs, len(Count)] and is added to."""
    table = np.array([job.addresses() for job in jobs], dtype=np.int64)
    word, rows = np.zeros(1, dtype=_WORDS[jobs[0].weight.dtype]), counts.numpy()
    numbers, grid_words = _numbers(plan), _grid_words(plan.fmt.name if plan.fmt else "E4M3")
    dividing = [_divides(job, plan) for job in jobs]

    def part(share: tuple[bool, NDArray[np.int64]]) -> None:
        divides, chosen = share
        stepper_of(plan, divides)(word, table, chosen, numbers, grid_words, call, rows)

    shares = [
        (divides, each)
        for divides in set(dividing)
        for each in _shares([i for i, own in enumerate(dividing) if own == divides], jobs)
    ]
    waiting = [quantize_cpu._pool().submit(part, share) for share in shares[1:]] if len(shares) > 1 else []
    part(shares[0])
    for share in waiting:
        share.result()


def stepper_of(plan: Plan, divides: bool) -> Any:
    """The compiled step for a plan's choices."""
    feedback = plan.feedback and plan.lr > 0
    decays = plan.weight_decay > 0 and plan.placement == Placement.RUNGS
    return fused.stepper(
        int(plan.moments),
        int(plan.geometry),
        int(plan.placement),
        plan.fmt is not None,
        plan.needs_scale,
        plan.needs_mean,
        plan.own_unit,
        feedback,
        plan.carry,
        decays,
        int(plan.counting),
        plan.rescales,
        divides,
    )


def _divides(job: Job, plan: Plan) -> bool:
    """Whether y = weight / scale needs a division: not for powers of two, whose inverse is exact."""
    if not plan.needs_scale or plan.fmt is None:
        return False
    if job.scale is not None:
        return math.frexp(job.scale.item())[0] != 0.5
    return plan.master_scale is not None or plan.fmt.total_bits <= 8


def _shares(chosen: list[int], jobs: list[Job]) -> list[NDArray[np.int64]]:
    """The chosen tensors by thread, each to the one that has the least so far, large ones first."""
    sizes = {index: jobs[index].weight.numel() for index in chosen}
    threads = torch.get_num_threads() if sum(sizes.values()) >= quantize_cpu.THREADED_FROM else 1
    if threads == 1:
        return [np.array(chosen, dtype=np.int64)]
    loads, members = [0] * threads, [[] for _ in range(threads)]  # type: ignore[var-annotated]
    for index in sorted(chosen, key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        loads[least] += sizes[index]
        members[least].append(index)
    return [np.array(each, dtype=np.int64) for each in members if each]


@lru_cache(maxsize=64)
def _numbers(plan: Plan) -> NDArray[np.float64]:
    fmt = plan.fmt
    has_exponent, is_wide = (fmt.exponent_bits > 0, fmt.total_bits > 8) if fmt else (False, True)
    extremes = (1.0 / fmt.max, fmt.max, least_stiffness(fmt)) if fmt else (0.0, 0.0, 0.0)
    clip = min(plan.rung_clip, MAX_RUNGS)
    return np.array(
        [
            plan.lr,
            plan.beta1,
            plan.beta2,
            plan.eps,
            plan.weight_decay,
            plan.max_stiffness,
            clip,
            plan.master_scale or 0.0,
            *extremes,
            has_exponent,
            is_wide,
        ],
        np.float64,
    )


@cache
def _grid_words(name: str) -> NDArray[np.uint32]:
    """What the loops need of a format."""
    grid = grid_of(get_format(name))
    word, step = quantize_cpu._word, grid.mantissa_step
    more = [
        grid.offset,
        grid.min_exponent_bits,
        grid.max_exponent_bits,
        grid.max_index,
        1 << (23 - grid.shift),
        word(2.0**FIXED / step),
        word(step),
    ]
    return np.concatenate([quantize_cpu._constants(grid, "nearest", "saturate"), np.array(more, np.uint32)])
