"""Formats that are one grid under two names, and losses that are one number.

E0M7 and E1M6 are one grid up to a power of two, which the scale takes up: their runs are the same, count once in every
correction, and a difference between them is a fault of the numerics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from altgrad.analysis.cells import Cell

NOISE = 8 * float(np.finfo(np.float32).eps)
"""What two float32 losses differ by, relative to the larger, when they are the same number."""
ONE_GRID = ("E0M7", "E1M6")
NAMED_STEPS = "manifold_gradient"
"""The literal gradient mode, whose steps depend on a format's name."""


def noise_of(losses: Iterable[float]) -> float:
    """What a sum of these losses may differ by from 0 and be 0."""
    return NOISE * max(map(abs, losses), default=0.0)


def twin_map(cells: Sequence[Cell]) -> dict[str, str]:
    """Each format's first twin: the first whose runs are the same in every arm and seed that both have."""
    by_format: dict[str, dict[tuple[str, str], Cell]] = {}
    for cell in cells:
        by_format.setdefault(cell.format, {})[cell.arm, cell.policy] = cell
    firsts: dict[str, str] = {}
    for name, own in by_format.items():
        found = (first for first in dict.fromkeys(firsts.values()) if _are_same(by_format[first], own))
        firsts[name] = next(found, name)
    return firsts


def _are_same(a: Mapping[tuple[str, str], Cell], b: Mapping[tuple[str, str], Cell]) -> bool:
    shared = 0
    for key in a.keys() & b.keys():
        one, other = a[key], b[key]
        if one.family == NAMED_STEPS:
            continue
        ended = (one.losses.keys() | one.stops.keys()) & (other.losses.keys() | other.stops.keys())
        if any((seed in one.stops) != (seed in other.stops) for seed in ended):
            return False
        for seed in one.losses.keys() & other.losses.keys():
            if abs(one.losses[seed] - other.losses[seed]) > noise_of((one.losses[seed], other.losses[seed])):
                return False
            shared += 1
    return shared > 0


def twin_control(cells: Sequence[Cell]) -> tuple[int, float] | None:
    """How many pairs of runs differ only in E0M7 against E1M6, and their largest difference, nats; or None."""
    by_key = {cell.key: cell for cell in cells}
    first, second = ONE_GRID
    found = [
        abs(loss - twin.losses[seed])
        for (name, arm, policy), cell in by_key.items()
        if name == first
        and cell.family != NAMED_STEPS
        and (twin := by_key.get((second, arm, policy))) is not None
        and twin.lr == cell.lr
        for seed, loss in cell.losses.items()
        if seed in twin.losses
    ]
    return (len(found), max(found)) if found else None
