"""What runs of a sweep have spent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spend:
    """An amount spent: wall-clock hours of drivers, hours of GPUs, dollars."""

    hours: float = 0.0
    gpu_hours: float = 0.0
    usd: float = 0.0
