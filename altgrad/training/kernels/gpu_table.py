"""The table of addresses from which the Triton kernels step all tensors of a group, kept on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altgrad.training.kernels import Job
from altgrad.training.kernels.gpu_parts import ELEMENTS

BLOCK = 1024
"""Elements of a block."""

KEPT_TABLES = 8
_kept_tables: dict[Any, tuple[Tensor, Tensor, bool]] = {}


def table_of(jobs: list[Job], device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """The jobs' table, the job of every block, and whether all tensors allow reads of 16 bytes.

    Kept by its contents, for from step to step the addresses are mostly the same.
    """
    lines, begin = [], 0
    for job in jobs:
        lines.append((*job.addresses(), begin))
        begin += -(-job.weight.numel() // BLOCK)
    key = (tuple(lines), device)
    if key not in _kept_tables:
        while len(_kept_tables) >= KEPT_TABLES:
            _kept_tables.pop(next(iter(_kept_tables)))
        blocks = torch.tensor([-(-job.weight.numel() // BLOCK) for job in jobs], dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(jobs), dtype=torch.int32), blocks)
        is_aligned = all(line[place] % 16 == 0 for line in lines for place in (*range(6), ELEMENTS.value))
        _kept_tables[key] = (_sent(torch.tensor(lines, dtype=torch.int64), device), _sent(owner, device), is_aligned)
    return _kept_tables[key]


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
