"""Which kernel steps a tensor: numba on the CPU, Triton on a GPU, the torch reference elsewhere.

The environment variable ALTGRAD_KERNEL chooses for all of them, as it does for rounding.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

from torch import Tensor

from altgrad.quantization.kernels import KERNEL_DTYPES
from altgrad.quantization.kernels.dispatch import numba_for, triton_for
from altgrad.training.kernels import Job, Plan


class Kernel(Protocol):
    """A module that steps tensors."""

    def step_tensors(self, jobs: list[Job], plan: Plan, call: int, counts: Tensor) -> None:
        """One step of every job; `counts` is int64 [jobs, len(Count)] and is added to."""


def kernel_for(job: Job) -> Kernel:
    """The fastest kernel that can take the job's tensors."""
    name = "reference"
    if job.weight.dtype == job.grad.dtype and job.weight.dtype in KERNEL_DTYPES:
        if numba_for(job.weight) is not None:
            name = "cpu"
        elif triton_for(job.weight, 1.0) is not None:
            name = "gpu"
    return _kernel(name)


@cache
def _kernel(name: str) -> Kernel:
    # Imported when asked for: two of them need libraries that not every machine has.
    return cast(Kernel, importlib.import_module(f"altgrad.training.kernels.{name}"))
