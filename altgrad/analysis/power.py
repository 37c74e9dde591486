"""What a planned sweep could decide: the procedures of the report, run on noise before anything is trained."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from altgrad.analysis.cells import REFERENCE_ARM, REFERENCE_FORMAT, Cell
from altgrad.analysis.contrasts import interactions, weights_of
from altgrad.analysis.grids import arm_labels
from altgrad.analysis.inference import LEAST_JOINT, POWER, detectable
from altgrad.analysis.study import MARGIN, main_policy
from altgrad.analysis.twins import ONE_GRID
from altgrad.analysis.verdicts import format_verdicts, verdicts
from altgrad.analysis.wording import counted, share
from altgrad.training.config import UNQUANTIZED, TrainConfig

NOISE = 0.02
"""Standard deviation of a run's loss, relative to it, that the power of trains and fails is given for."""
FAILING = 1.3
STUDIES = 100
"""Of small plans; of large ones fewer, since their formats average."""
BASE_LOSS, FIRST_LOSS = 2.4, 5.5


def planned_power(trials: Iterable[TrainConfig], seeds: int, margin: float = MARGIN) -> list[str]:
    """A line for each question: what so many seeds of these trials decide with a power of .8."""
    cells = _planned_cells(list(trials))
    if seeds < 2:
        return ["power: one seed has no spread, so nothing can be decided; 6 and more are expected of a study"]
    return [_format_power(cells, seeds, margin), _geometry_power(cells, seeds)]


def _planned_cells(trials: Sequence[TrainConfig]) -> list[Cell]:
    """The cells that the trials make; of formats that are one grid the first."""
    records: list[dict[Hashable, Any]] = [
        {"format": c.format, "optimizer": c.arm, "options": c.optimizer.model_dump_json(), "policy": c.recipe_name}
        for c in trials
    ]
    found = {}
    for config, (label, knobs) in zip(trials, arm_labels(records), strict=True):
        found[config.format, label, config.recipe_name] = Cell(
            config.format,
            label,
            config.recipe_name,
            config.optimizer.lr,
            config.use_manifold_aware,
            {},
            family=config.arm,
            knobs=knobs,
            plain=config.optimizer.plain_arm,
            control=config.optimizer.control_arm,
            quantized=config.format != UNQUANTIZED and config.optimizer.rounds_operands,
            rules=config.precision.model_dump_json(),
        )
    first, second = ONE_GRID
    has_first = any(key[0] == first for key in found)
    return [cell for cell in found.values() if not (has_first and cell.format == second)]


def _geometry_power(cells: list[Cell], seeds: int) -> str:
    contrasts = interactions(cells)
    if not contrasts:
        return (
            "power: no gain beyond BF16 can be measured: that takes a geometry-aware arm and the plain arm of its "
            "residence, both in an 8-bit format and in BF16"
        )
    least = detectable(weights_of([item.terms for item in contrasts]), seeds)
    text = (
        f"power: {counted(seeds, 'paired seed')} show gains beyond BF16 from {least:.2g} standard deviations of their "
        f"paired differences ({counted(len(contrasts), 'difference')} together, power {share(POWER)})"
    )
    return text + (
        "" if seeds >= LEAST_JOINT else f"; a distribution-free test stands beside it from {LEAST_JOINT} seeds on"
    )


def _format_power(cells: list[Cell], seeds: int, margin: float) -> str:
    policy = main_policy(cells)
    judged = [cell for cell in cells if cell.is_judged and cell.policy == policy]
    if not judged or not any((cell.format, cell.family) == (REFERENCE_FORMAT, REFERENCE_ARM) for cell in cells):
        return "power: no format can be said to train or to fail: that takes an 8-bit format and BF16 AdamW"
    draw = np.random.default_rng(0)
    apart = {cell.format: cell.format for cell in judged}
    found = {}
    for word, factor in (("trains", 1.0), ("fails", FAILING)):
        hits = []
        for _ in range(max(20, min(STUDIES, 2000 // len(judged)))):
            own = [_drawn(cell, BASE_LOSS * factor, seeds, draw) for cell in judged]
            reference = _drawn(judged[0], BASE_LOSS, seeds, draw, "BF16")
            decided = format_verdicts(own, verdicts(own, reference, margin, apart), apart)
            hits.append(np.mean([item.word == word for item in decided]))
        found[word] = float(np.mean(hits))
    return (
        f"power: where losses vary by {share(NOISE)} from run to run, a format as good as BF16 is decided to train "
        f"with a power of {share(found['trains'])}, one that ends {share(FAILING - 1)} above it in every arm to "
        f"fail with {share(found['fails'])}"
    )


def _drawn(cell: Cell, mean: float, seeds: int, draw: np.random.Generator, format: str = "") -> Cell:
    losses = mean * np.exp(NOISE * draw.standard_normal(seeds))
    return Cell(
        format or cell.format,
        cell.arm,
        cell.policy,
        cell.lr,
        cell.geometry,
        dict(enumerate(map(float, losses))),
        starts=dict.fromkeys(range(seeds), FIRST_LOSS),
        family=cell.family,
    )
