"""Everything that a report says of one setting, computed once: cells, contrasts, verdicts and the best formats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from altgrad.analysis import contrasts, verdicts
from altgrad.analysis.cells import MAIN_POLICY, MEASURES, UNITS, Cell, Key, build_cells, find_reference
from altgrad.analysis.contrasts import Contrast, table, weights_of, without_repeats
from altgrad.analysis.inference import best_set
from altgrad.analysis.verdicts import FormatVerdict, Verdict

MARGIN = 0.10
NOISE = 8 * float(np.finfo(np.float32).eps)
"""What two float32 losses differ by, relative to the largest, when they are the same number."""
EQUAL_SHARE = 0.25
"""Two gains are equal if they differ by less than this part of the arm's gain in BF16, unless told otherwise."""


@dataclass(frozen=True)
class Study:
    """The answer's numbers. `families`: "reference", "gain" and "beyond" (BF16 and FP32) contrasts, each one family."""

    cells: list[Cell]
    reference: Cell | None
    margin: float = MARGIN
    equal_within: float | None = None
    against_reference: dict[Key, Contrast] = field(default_factory=dict)
    gains: list[Contrast] = field(default_factory=list)
    beyond: list[Contrast] = field(default_factory=list)
    verdicts: dict[Key, Verdict] = field(default_factory=dict)
    formats: list[FormatVerdict] = field(default_factory=list)
    """Of the main policy."""
    best: list[list[Contrast]] = field(default_factory=list)
    """Which may gain most beyond BF16, each with its twins, the largest first; of the main policy."""

    @property
    def unit(self) -> str:
        return self.cells[0].unit if self.cells else UNITS["lm"]

    @property
    def measure(self) -> str:
        return MEASURES[self.unit]

    @property
    def is_sound(self) -> bool:
        """Whether there is a reference to judge by, and it learned in every finished seed."""
        return self.reference is not None and self.reference.learned

    @cached_property
    def policy(self) -> str:
        """The policy that the finding speaks of."""
        return main_policy(self.cells)

    @property
    def judged(self) -> list[Cell]:
        """The 8-bit cells of the main policy."""
        return [cell for cell in self.cells if cell.policy == self.policy and cell.is_judged]

    @property
    def seeds(self) -> int:
        """The most seeds with a result that a cell has."""
        return max((cell.n for cell in self.cells), default=0)

    def comparison(self, cell: Cell) -> Contrast | None:
        return self.against_reference.get(cell.key)

    def gain_of(self, cell: Cell) -> Contrast | None:
        return next((item for item in self.gains if item.cell is cell), None)

    def gain_in(self, format: str, cell: Cell) -> Contrast | None:
        """What the cell's arm gains in another format."""
        found = [item for item in self.gains if item.cell.format == format and item.cell.family == cell.family]
        return next((item for item in found if item.cell.knobs == cell.knobs), found[0] if found else None)

    def equal_limit(self, item: Contrast) -> float:
        """Within what an interaction counts as equal to 0: as told, else by the arm's gain in BF16."""
        if self.equal_within is not None:
            return self.equal_within
        in_bf16 = self.gain_in("BF16", item.cell)
        return EQUAL_SHARE * abs(in_bf16.mean) if in_bf16 is not None and math.isfinite(in_bf16.mean) else 0.0


def main_policy(cells: Sequence[Cell]) -> str:
    """The policy that a finding speaks of: uniform where it was run, else the first by name."""
    policies = sorted({cell.policy for cell in cells if cell.is_judged})
    return MAIN_POLICY if MAIN_POLICY in policies or not policies else policies[0]


def build_study(trials: pd.DataFrame, *, margin: float = MARGIN, equal_within: float | None = None) -> Study:
    """The study of the trials of one setting (`load.Records.trials`, as `scores.judged` leaves them)."""
    return study_of(build_cells(trials), margin=margin, equal_within=equal_within)


def study_of(cells: Sequence[Cell], *, margin: float = MARGIN, equal_within: float | None = None) -> Study:
    """The study of these cells."""
    cells = list(cells)
    reference = find_reference(cells)
    found = Study(cells, reference, margin, equal_within)
    tolerance = tolerance_of(cells)
    sound = reference is None or reference.learned
    gains = contrasts.measured(contrasts.gains(cells), tolerance, reference, sound=sound)
    beyond = contrasts.measured(contrasts.interactions(cells), tolerance, reference, sound=sound)
    if reference is None:
        return Study(cells, None, margin, equal_within, gains=gains, beyond=beyond)
    compared = contrasts.measured(contrasts.against_reference(cells, reference), tolerance, reference, sound=sound)
    own = verdicts.verdicts(cells, reference, margin, tolerance) if sound else {}
    return Study(
        cells,
        reference,
        margin,
        equal_within,
        {item.cell.key: item for item in compared},
        gains,
        beyond,
        own,
        verdicts.format_verdicts(found.judged, own, tolerance) if sound else [],
        _best(beyond, found.policy, tolerance) if sound else [],
    )


def tolerance_of(cells: Sequence[Cell]) -> float:
    """What two of the cells' losses may differ by and be the same number."""
    losses = [abs(loss) for cell in cells for loss in cell.losses.values() if math.isfinite(loss)]
    return NOISE * max(losses, default=0.0)


def _best(beyond: Sequence[Contrast], policy: str, tolerance: float) -> list[list[Contrast]]:
    rivals = [
        item
        for item in beyond
        if item.kind == "beyond BF16"
        and item.cell.policy == policy
        and item.status in ("measured", "identical")
        and item.cell.learned
    ]
    firsts = without_repeats([item.differences for item in rivals], tolerance)
    groups: dict[int, list[Contrast]] = {}
    for item, place in zip(rivals, firsts, strict=True):
        groups.setdefault(place, []).append(item)
    leaders = [group[0] for group in groups.values()]
    if not leaders:
        return []
    stays = best_set(
        table([item.differences for item in leaders]), weights_of([item.terms for item in leaders]), floor=tolerance
    )
    left = [group for group, is_in in zip(groups.values(), stays, strict=True) if is_in]
    return sorted(left, key=lambda group: -group[0].mean)
