"""What is compared with what, seed by seed, and how surely the two differ.

A contrast is a weighted sum of cells: a format minus BF16; what a geometry-aware arm gains over the plain arm of the
same residence; and the interaction, that gain minus what the same steps gain without the format, in BF16 or over
weights that nothing rounds. The interaction is what the project asks for: a step rule that helps everywhere says
nothing of a format.

    gain(f, a)        = y(f, plain of a) - y(f, a)                          positive where a is better
    beyond BF16       = gain(f, a) - gain(BF16, a)
    beyond FP32       = gain(f, a) - [y(FP32, AdamW) - y(f, control of a)]   the same steps over float32 weights
    relief            = y(f, a, uniform) - y(f, a, recipe)      positive where a recipe that spares layers is better
    width             = y(f, a) - y(g, a)     g: 16 bits with f's exponent bits; what the missing mantissa bits cost

Contrasts of one kind are one family, and share one error rate of 5 %. What is tied in every seed is said to be
identical and left out of it, as are contrasts with a stopped seed: those are compared by an exact test of their own,
corrected by Holm, since a stopped run has no loss. Of a contrast with a cell whose runs were shifted to another format
the other seeds are shown, and nothing is tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from altgrad.analysis.cells import (
    MAIN_POLICY,
    REFERENCE_ARM,
    REFERENCE_FORMAT,
    Cell,
    Key,
    format_order,
    is_narrow,
    mean_of_known,
)
from altgrad.analysis.inference import (
    ALPHA,
    LEAST_JOINT,
    Array,
    detectable,
    family_level,
    holm,
    independent,
    intervals,
    max_t,
    more_seeds,
    stop_test,
)
from altgrad.analysis.twins import noise_of
from altgrad.quantization import same_spacings
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import UNQUANTIZED

Kind = Literal["reference", "gain", "beyond BF16", "beyond FP32", "relief", "width", "change"]
Status = Literal["measured", "identical", "one seed", "stopped", "shifted", "exploratory", "no result"]
PRIMARY_FREE = 10
"""Seeds from which the distribution-free test must agree."""


@dataclass(frozen=True, eq=False)
class Family:
    """What the contrasts of one kind share: `weights` [m, cells] of those tested, and each one's two-sided level."""

    weights: Array
    level: float

    @cached_property
    def kappa(self) -> float:
        """How many independent variances they count as."""
        return independent(self.weights)[0] if len(self.weights) > 1 else 1.0


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of cells, per seed in `differences`; `mean` ± `half` in the study's unit.

    `p_free` is the distribution-free p, from 6 seeds on, and `p_stop` that of the stops, both corrected for the family;
    NaN where they do not apply.
    """

    kind: Kind
    cell: Cell
    terms: tuple[tuple[Cell, int], ...]
    differences: Mapping[int, float] = field(default_factory=dict)
    status: Status = "no result"
    mean: float = math.nan
    half: float = math.inf
    spread: float = math.nan
    family: Family | None = None
    p_free: float = math.nan
    p_stop: float = math.nan

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def median(self) -> float:
        return float(np.median(list(self.differences.values()))) if self.differences else math.nan

    @property
    def noise(self) -> float:
        """What its differences may be off 0 and be 0: one diverged cell says nothing of another contrast's noise."""
        return noise_of(cell.losses[seed] for cell, _ in self.terms for seed in self.differences)

    @property
    def other(self) -> Cell:
        """What the cell is compared with within its format, or the reference."""
        return next(cell for cell, _ in self.terms if cell is not self.cell)

    @property
    def is_apart(self) -> bool:
        """Whether the interval excludes 0."""
        return self.status == "measured" and abs(self.mean) > self.half

    @property
    def disagrees(self) -> bool:
        """Whether the interval and the distribution-free test say different things."""
        return not math.isnan(self.p_free) and self.is_apart != (self.p_free <= ALPHA)

    @property
    def decided(self) -> bool:
        """Whether it differs from 0; from 10 seeds on both tests have to say so."""
        if self.status == "stopped":
            return self.p_stop <= ALPHA
        if not (self.is_apart and (self.cell.learned or self.other.learned)):
            return False
        return self.n < PRIMARY_FREE or math.isnan(self.p_free) or self.p_free <= ALPHA

    def within(self, limit: float) -> bool:
        """Whether the whole interval lies within ± limit."""
        return self.status == "identical" or (
            self.status == "measured" and limit > 0 and abs(self.mean) + self.half <= limit
        )

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds more would bring 0 out of the interval with a power of .8; None: over 60, or it is out."""
        if self.family is None or self.is_apart:
            return None
        return more_seeds(abs(self.mean), self.spread, self.n, self.family.level, self.family.kappa)

    @property
    def detectable(self) -> float:
        """The difference that so many seeds decide with a power of .8; NaN where nothing was tested."""
        return math.nan if self.family is None else detectable(self.family.weights, self.n) * self.spread


def against_reference(cells: Sequence[Cell], reference: Cell) -> list[Contrast]:
    """Each cell minus the reference."""
    return [Contrast("reference", cell, ((cell, 1), (reference, -1))) for cell in cells if cell is not reference]


def against_same_arm(cells: Sequence[Cell]) -> list[Contrast]:
    """Each cell minus that of the reference's format with the same arm."""
    found, by_arm = [], _by_arm(cells)
    for cell in cells:
        same = _twin_of(cell, by_arm, REFERENCE_FORMAT, cell.family)
        if same is not None and same is not cell:
            found.append(Contrast("reference", cell, ((cell, 1), (same, -1))))
    return found


def gains(cells: Sequence[Cell]) -> list[Contrast]:
    """What each geometry-aware arm gains over the plain arm of its residence, in its format and policy."""
    found, by_arm = [], _by_arm(cells)
    for cell in cells:
        if cell.geometry and (plain := _plain_of(cell, by_arm)) is not None:
            found.append(Contrast("gain", cell, ((plain, 1), (cell, -1))))
    return found


def reliefs(cells: Sequence[Cell]) -> list[Contrast]:
    """What each recipe of an 8-bit format gives back: the loss under the main policy minus that under the recipe."""
    main = {(cell.format, cell.arm): cell for cell in cells if cell.policy == MAIN_POLICY and cell.is_judged}
    return [
        Contrast("relief", cell, ((whole, 1), (cell, -1)))
        for cell in cells
        if cell.policy != MAIN_POLICY and (whole := main.get((cell.format, cell.arm))) is not None
    ]


def widths(cells: Sequence[Cell]) -> list[Contrast]:
    """What an 8-bit format's missing mantissa bits cost: its loss minus that of 16 bits with its exponent bits."""
    wide = {
        (format_order(cell.format)[1], cell.arm, cell.policy): cell
        for cell in cells
        if format_order(cell.format)[0] == 16 and cell.quantized
    }
    return [
        Contrast("width", cell, ((cell, 1), (other, -1)))
        for cell in cells
        if cell.is_judged and (other := wide.get((format_order(cell.format)[1], cell.arm, cell.policy))) is not None
    ]


def interactions(cells: Sequence[Cell]) -> list[Contrast]:
    """What each geometry-aware arm gains in an 8-bit format beyond its gain in BF16, and beyond its FP32 control's."""
    found, by_arm = [], _by_arm(cells)
    for cell in cells:
        if not (cell.geometry and cell.is_judged):
            continue
        plain = _plain_of(cell, by_arm)
        if plain is None:
            continue
        own = ((plain, 1), (cell, -1))
        same = _twin_of(cell, by_arm, REFERENCE_FORMAT, cell.family)
        same_plain = None if same is None else _plain_of(same, by_arm)
        if same is not None and same_plain is not None:
            found.append(Contrast("beyond BF16", cell, (*own, (same_plain, -1), (same, 1))))
        control = _twin_of(cell, by_arm, cell.format, cell.control) if cell.control else None
        unquantized = _twin_of(plain, by_arm, UNQUANTIZED, REFERENCE_ARM)
        if control is not None and unquantized is not None:
            found.append(Contrast("beyond FP32", cell, (*own, (unquantized, -1), (control, 1))))
    return found


ByArm = Mapping[tuple[str, str], Sequence[Cell]]
"""Cells by format and arm, whatever its parameters."""


def _by_arm(cells: Iterable[Cell]) -> ByArm:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.format, cell.family), []).append(cell)
    return found


def _plain_of(cell: Cell, cells: ByArm) -> Cell | None:
    return _twin_of(cell, cells, cell.format if cell.quantized else UNQUANTIZED, cell.plain)


def _twin_of(cell: Cell, cells: ByArm, format: str, family: str) -> Cell | None:
    """The cell of that format and arm which shares the parameters that both have; its own policy first."""
    rivals = [
        other
        for other in cells.get((format, family), ())
        if all(cell.knobs[name] == other.knobs[name] for name in cell.knobs.keys() & other.knobs.keys())
        and (other.policy == cell.policy or not is_narrow(format) or _is_control_of(other, cell))
    ]
    own = [other for other in rivals if other.policy == cell.policy] or rivals
    # Of arms that differ in more, the one with the usual parameters, whatever came out: none is chosen by its result.
    return min(own, key=lambda other: (_unusual(other), other.arm)) if own else None


def _is_control_of(other: Cell, cell: Cell) -> bool:
    """Whether float32 weights that no layer rounds step as the cell's do: under the same spacings."""
    return not other.quantized and same_spacings(other.precision, cell.precision)


def _unusual(cell: Cell) -> int:
    usual = ARMS.get(cell.family)
    return sum(getattr(usual, name, None) != value for name, value in cell.knobs.items())


def measured(
    contrasts: Sequence[Contrast],
    twins: Mapping[str, str],
    reference: Cell | None = None,
    *,
    sound: bool = True,
    share: float = 1.0,
) -> list[Contrast]:
    """The contrasts of one family with their intervals; `twins`: each format's first twin, which count once.

    `reference`: whose losses take each seed's own difficulty out of a test of stops. `sound` False: it did not learn,
    and nothing is tested. `share`: of the error of 5 %, for intervals and for stops alike.
    """
    found = [_paired(contrast) for contrast in contrasts]
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, item in enumerate(found):
        if item.status == "measured":
            cell = item.cell
            groups.setdefault((item.kind, twins.get(cell.format, cell.format), cell.arm, cell.policy), []).append(i)
    leaders = [max(group, key=lambda i: found[i].n) for group in groups.values()]
    if sound and leaders:
        _test(found, leaders, share)
        for leader, group in zip(leaders, groups.values(), strict=True):
            names = ("mean", "half", "spread", "family", "p_free")
            for i in group:
                found[i] = replace(found[i], **{name: getattr(found[leader], name) for name in names})
    return _with_stop_tests(found, reference, share) if sound else found


def _test(found: list[Contrast], tested: Sequence[int], share: float) -> None:
    columns = [found[i] for i in tested]
    differences, weights = table([item.differences for item in columns]), weights_of([item.terms for item in columns])
    floors = np.array([item.noise for item in columns])
    level = family_level(len(columns), share)
    result = intervals(differences, weights, level, floor=floors)
    seeds = len(differences)
    free = max_t(differences) / share if seeds >= LEAST_JOINT else np.full(len(columns), np.nan)
    family = Family(weights, level)
    for place, i in enumerate(tested):
        found[i] = replace(
            found[i],
            half=float(result.half[place]),
            spread=float(result.spread[place]),
            family=family,
            p_free=float(np.minimum(1.0, free[place])),
        )


def _paired(contrast: Contrast) -> Contrast:
    """The contrast with its differences over the seeds that all of its cells have, and its status.

    The reference's stopped and shifted seeds are lost ones where a cell is only measured against it.
    """
    cells = [cell for cell, _ in contrast.terms]
    judged = cells if contrast.kind != "reference" else cells[:1]
    if any(cell.exploratory for cell in cells):
        status: Status = "exploratory"
    elif any(cell.shifted for cell in judged):
        status = "shifted"
    elif any(cell.stops for cell in judged):
        status = "stopped" if all(cell.has_result for cell in cells) else "no result"
    else:
        status = "measured"
    usable = all(cell.losses and cell.has_result for cell in cells) and status != "stopped"
    seeds = sorted(set.intersection(*(set(cell.losses) for cell in cells))) if usable else []
    differences = {}
    for seed in seeds:
        value = math.fsum(weight * cell.losses[seed] for cell, weight in contrast.terms)
        differences[seed] = 0.0 if abs(value) <= noise_of(cell.losses[seed] for cell in cells) else value
    if not differences:
        return replace(contrast, status=status if status in ("stopped", "shifted") else "no result")
    if status == "measured" and len(differences) == 1:
        status = "one seed"
    elif status == "measured" and not any(differences.values()):
        status = "identical"
    mean = math.fsum(differences.values()) / len(differences)
    return replace(
        contrast, differences=differences, status=status, mean=mean, half=0.0 if status == "identical" else math.inf
    )


def table(columns: Sequence[Mapping[int, float]]) -> Array:
    """[seeds, columns], NaN where a column lacks a seed."""
    seeds = sorted({seed for column in columns for seed in column})
    return np.array([[column.get(seed, np.nan) for column in columns] for seed in seeds], dtype=float)


def weights_of(terms: Sequence[Sequence[tuple[Cell, int]]]) -> Array:
    """[contrasts, cells]."""
    places: dict[Key, int] = {}
    for cell, _ in (term for contrast in terms for term in contrast):
        places.setdefault(cell.key, len(places))
    found = np.zeros((len(terms), len(places)))
    for row, contrast in enumerate(terms):
        for cell, weight in contrast:
            found[row, places[cell.key]] += weight
    return found


def _with_stop_tests(found: list[Contrast], reference: Cell | None, share: float) -> list[Contrast]:
    """Exact tests of the pairs of cells in which a seed was stopped, corrected by Holm over them."""
    kinds = ("gain", "change")
    stopped = [i for i, item in enumerate(found) if item.status == "stopped" and item.kind in kinds]
    p_values = [stop_test(*(_scores(cell, reference) for cell in (found[i].cell, found[i].other))) for i in stopped]
    for i, p in zip(stopped, holm(p_values), strict=True):
        found[i] = replace(found[i], p_stop=min(1.0, p / share))
    return found


def _scores(cell: Cell, reference: Cell | None) -> list[float]:
    """Losses of the finished seeds minus the reference's, infinity for a stopped one."""
    known = {} if reference is None else reference.losses
    usual = mean_of_known(known.values()) if known else 0.0
    return [*(loss - known.get(seed, usual) for seed, loss in cell.losses.items()), *(math.inf for _ in cell.stops)]
