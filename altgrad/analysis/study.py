"""Everything that a report says of one setting, computed once: cells, contrasts, verdicts and the best formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from altgrad.analysis import contrasts, verdicts
from altgrad.analysis.cells import MAIN_POLICY, MEASURES, UNITS, Cell, Key, find_reference
from altgrad.analysis.contrasts import Contrast, table, weights_of
from altgrad.analysis.grids import SettledRates, build_cells
from altgrad.analysis.inference import ALPHA, best_set
from altgrad.analysis.twins import twin_map
from altgrad.analysis.verdicts import FormatVerdict, Verdict

MARGIN = 0.10
EQUAL_SHARE = 0.25
"""Two gains are equal if they differ by less than this part of the arm's gain in BF16, unless told otherwise."""


@dataclass(frozen=True)
class Study:
    """The answer's numbers; `against_reference`, `gains` and `beyond` are a family of contrasts each."""

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
    leads: bool = False
    """Whether the first of them is decided to gain, and to gain most."""

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

    @cached_property
    def against_same_arm(self) -> dict[Key, Contrast]:
        """What lies between a cell and BF16 with the same arm: a family of its own."""
        sound = self.reference is None or self.reference.learned
        compared = contrasts.against_same_arm(self.cells)
        found = contrasts.measured(compared, twin_map(self.cells), self.reference, sound=sound)
        return {item.cell.key: item for item in found}

    @property
    def judged(self) -> list[Cell]:
        """The 8-bit cells of the main policy."""
        return [cell for cell in self.cells if cell.policy == self.policy and cell.is_judged]

    @property
    def pairs(self) -> int:
        """The most seeds that a judged cell has in common with the reference."""
        known = set() if self.reference is None else set(self.reference.losses)
        return max((len(known & (cell.losses.keys() | cell.stops.keys())) for cell in self.judged), default=len(known))

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


def build_study(
    trials: pd.DataFrame,
    *,
    margin: float = MARGIN,
    equal_within: float | None = None,
    settled: SettledRates | None = None,
) -> Study:
    """The study of the trials of one setting (`load.Records.trials`, as `scores.judged` leaves them).

    `settled`: learning rates chosen on other seeds, by format, arm and policy.
    """
    return study_of(build_cells(trials, settled or {}), margin=margin, equal_within=equal_within)


def study_of(cells: Sequence[Cell], *, margin: float = MARGIN, equal_within: float | None = None) -> Study:
    """The study of these cells."""
    cells = list(cells)
    reference = find_reference(cells)
    found = Study(cells, reference, margin, equal_within)
    twins = twin_map(cells)
    sound = reference is None or reference.learned
    # Where stops are tested too, both families share the error of the question.
    gained = contrasts.gains(cells)
    has_stops = any(item.cell.stops or item.other.stops for item in gained)
    share = 0.5 if has_stops else 1.0
    gains = contrasts.measured(gained, twins, reference, sound=sound, share=share)
    beyond = contrasts.measured(contrasts.interactions(cells), twins, reference, sound=sound, share=share)
    if reference is None:
        return Study(cells, None, margin, equal_within, gains=gains, beyond=beyond)
    compared = contrasts.measured(contrasts.against_reference(cells, reference), twins, reference, sound=sound)
    own = verdicts.verdicts(cells, reference, margin, twins) if sound else {}
    best, leads = best_of(beyond, found.policy, twins) if sound else ([], False)
    return Study(
        cells,
        reference,
        margin,
        equal_within,
        {item.cell.key: item for item in compared},
        gains,
        beyond,
        own,
        verdicts.format_verdicts(found.judged, own, twins) if sound else [],
        best,
        leads,
    )


def candidates(beyond: Sequence[Contrast], policy: str) -> list[Contrast]:
    """The interactions with BF16 that may be called the largest."""
    return [
        item
        for item in beyond
        if item.kind == "beyond BF16"
        and item.cell.policy == policy
        and item.status in ("measured", "identical")
        and item.cell.learned
    ]


def best_of(beyond: Sequence[Contrast], policy: str, twins: Mapping[str, str]) -> tuple[list[list[Contrast]], bool]:
    """Which may be the largest, the largest first, each with its twins; and whether the first is decided to be.

    It leads if it is decided to be above 0, and all others to be below it at half the error.
    """
    groups: dict[tuple[str, str], list[Contrast]] = {}
    for item in candidates(beyond, policy):
        groups.setdefault((twins[item.cell.format], item.cell.arm), []).append(item)
    if not groups:
        return [], False
    for group in groups.values():
        group.sort(key=lambda item: -item.n)
    leaders = [group[0] for group in groups.values()]
    columns, weights = table([item.differences for item in leaders]), weights_of([item.terms for item in leaders])
    floors = np.array([item.noise for item in leaders])
    stays = best_set(columns, weights, floors=floors)
    alone = best_set(columns, weights, floors=floors, alpha=ALPHA / 2)
    left = [group for group, is_in in zip(groups.values(), stays, strict=True) if is_in]
    left.sort(key=lambda group: -group[0].mean)
    first = left[0][0]
    return left, len(leaders) > 1 and sum(alone) == 1 and first.decided and first.mean > 0
