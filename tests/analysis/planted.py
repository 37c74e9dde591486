"""Cells and studies whose truth is known, without a ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from altgrad.analysis.cells import Cell, Stop
from altgrad.analysis.study import Study, study_of
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import UNQUANTIZED

START, BASE = 5.5, 2.4


def cell(losses: dict[int, float], stops: tuple[int, ...] = (), **changes: Any) -> Cell:
    """A cell of these losses and stopped seeds, E5M2 with AdamW unless told otherwise."""
    fields: dict[str, Any] = {"format": "E5M2", "arm": "adamw", "policy": "uniform", "lr": 1e-3} | changes
    family = fields.setdefault("family", fields["arm"].partition(",")[0])
    fields.setdefault("geometry", ARMS[family].kind in ("manifold", "grid"))
    fields.setdefault("plain", ARMS[family].plain_arm)
    fields.setdefault("control", ARMS[family].control_arm)
    fields.setdefault("quantized", fields["format"] != UNQUANTIZED and ARMS[family].rounds_operands)
    fields.setdefault("starts", dict.fromkeys((*losses, *stops), START))
    return Cell(losses=losses, stops={seed: Stop("flip_yield", "lm_head", 30.0) for seed in stops}, **fields)


def cells_of(
    names: Sequence[tuple[str, str]], offset: Callable[[str, str, int], float | str | None], seeds: int
) -> list[Cell]:
    """A cell per (format, arm); `offset` from BASE in nats, "stop", or None for a lost seed."""
    found = []
    for name, arm in names:
        values = {seed: offset(name, arm, seed) for seed in range(seeds)}
        losses = {seed: BASE + value for seed, value in values.items() if isinstance(value, float)}
        stops = tuple(seed for seed, value in values.items() if value == "stop")
        missing = tuple(seed for seed, value in values.items() if value is None)
        found.append(cell(losses, stops, format=name, arm=arm, missing=missing))
    return found


def everywhere(formats: Sequence[str], arms: Sequence[str]) -> list[tuple[str, str]]:
    """The product, without what a sweep leaves out: arms other than AdamW in FP32."""
    return [(name, arm) for name in formats for arm in arms if name != UNQUANTIZED or arm == "adamw"]


def noisy(
    effects: dict[tuple[str, str], float | str], spread: float = 0.003, key: int = 0
) -> Callable[[str, str, int], float | str]:
    """Effects by (format, arm), a seed's own difficulty, and normal noise of this standard deviation."""

    def offset(name: str, arm: str, seed: int) -> float | str:
        value = effects.get((name, arm), 0.0)
        if not isinstance(value, float):
            return value
        own = np.random.default_rng([key, seed, *map(ord, f"{name}{arm}")]).normal(0, spread)
        return float(value + own + 0.05 * np.random.default_rng([key, seed]).normal())

    return offset


def planted(
    formats: Sequence[str], arms: Sequence[str], effects: dict[tuple[str, str], float | str], seeds: int, **options: Any
) -> Study:
    """A study of formats × arms with these effects."""
    margin = {name: options.pop(name) for name in ("margin", "equal_within") if name in options}
    return study_of(cells_of(everywhere(formats, arms), noisy(effects, **options), seeds), **margin)
