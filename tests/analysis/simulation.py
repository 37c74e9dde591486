"""Sweeps whose truth is known, by the hundred: how often what a report calls decided is false.

A sweep is formats × arms × seeds of losses: a seed's own difficulty (3 σ), its interaction with the format and with the
arm (σ / 2 each), and a run's own noise (σ). Scenarios differ in that noise and in how it is spread over cells. The
whole study is computed as for a report, and all that it calls decided is held against the truth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator
from planted import BASE, cell

from altgrad.analysis.cells import Cell
from altgrad.analysis.study import Study, study_of

FORMATS = ("E0M7", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "E1M6")
ARMS = ("adamw", "adamw_sr", "manifold", "manifold_sr", "grid")
SIGMA = 0.01
"""Of a run, relative to BASE."""

Array = np.ndarray


def normal(draw: Generator, shape: tuple[int, ...]) -> Array:
    return draw.standard_normal(shape)


def student(draw: Generator, shape: tuple[int, ...]) -> Array:
    """t with 3 degrees of freedom, of unit variance."""
    return draw.standard_t(3, shape) / math.sqrt(3)


def bad_runs(draw: Generator, shape: tuple[int, ...]) -> Array:
    """One run in 8 ends 6 σ worse."""
    return draw.standard_normal(shape) + 6 * (draw.random(shape) < 1 / 8)


def skewed(draw: Generator, shape: tuple[int, ...]) -> Array:
    """Lognormal of unit variance."""
    values = np.exp(draw.standard_normal(shape))
    return (values - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def equal(draw: Generator) -> Array:
    return np.ones((len(FORMATS) + 1, len(ARMS)))


def every_cell_its_own(draw: Generator) -> Array:
    return np.exp(draw.normal(0, 0.5, (len(FORMATS) + 1, len(ARMS))))


def one_format(draw: Generator) -> Array:
    spread = equal(draw)
    spread[2] = 4
    return spread


def one_cell(draw: Generator) -> Array:
    spread = equal(draw)
    spread[3, 2] = 5
    return spread


def quiet_reference(draw: Generator) -> Array:
    spread = np.linspace(1, 4, len(FORMATS) + 1)[:, None] * equal(draw)
    spread[-1] = 0.2
    return spread


def loud_arm(draw: Generator) -> Array:
    spread = equal(draw)
    spread[:, 2] = 3
    return spread


@dataclass(frozen=True)
class Scenario:
    """`excess`: of every 8-bit cell over BF16, relative; `effects`: standard deviation of true interactions, in their
    own noise; `lost`: cells without a run; `stops`: the share of runs that are stopped; `formats`, `arms`: those run.
    """

    name: str
    noise: Callable[[Generator, tuple[int, ...]], Array] = normal
    spread: Callable[[Generator], Array] = equal
    excess: float = 0.0
    effects: float = 0.0
    lost: tuple[tuple[int, int], ...] = ()
    stops: float = 0.0
    formats: tuple[str, ...] = FORMATS
    arms: tuple[str, ...] = ARMS


SMALL = {"formats": ("E4M3", "E5M2"), "arms": ("adamw", "manifold")}

NULL = (
    Scenario("normal"),
    Scenario("t3", student),
    Scenario("bad runs", bad_runs),
    Scenario("a spread for each cell", spread=every_cell_its_own),
    Scenario("one format × 4", spread=one_format),
    Scenario("one cell × 5", spread=one_cell),
    Scenario("quiet BF16, formats × 1 to 4", spread=quiet_reference),
    Scenario("one arm × 3, t3", student, loud_arm),
    Scenario("one cell lost", lost=((6, 4),)),
    Scenario("a tenth of runs stopped", stops=0.1),
    Scenario("2 formats × 1 arm", **SMALL),
    Scenario("2 formats × 1 arm, t3", student, **SMALL),
)
SKEWED = (Scenario("lognormal (not bounded)", skewed),)
AT_MARGIN = (
    Scenario("normal", excess=0.1),
    Scenario("t3", student, excess=0.1),
    Scenario("one format × 4", spread=one_format, excess=0.1),
    Scenario("one cell lost", excess=0.1, lost=((6, 4),)),
)
TRUE = (
    Scenario("normal", effects=2.0),
    Scenario("t3", student, effects=2.0),
    Scenario("a spread for each cell", spread=every_cell_its_own, effects=2.0),
    Scenario("2 formats × 1 arm", effects=2.0, **SMALL),
)


@dataclass
class Tally:
    """Of `studies`: how many have each kind of event; `sums`: means over studies."""

    studies: int = 0
    events: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)

    def rate(self, name: str) -> float:
        return self.events[name] / self.studies

    def mean(self, name: str) -> float:
        return self.sums[name] / self.studies

    def error(self, name: str) -> float:
        """The simulation's standard error of a rate."""
        rate = self.rate(name)
        return math.sqrt(max(rate * (1 - rate), 1 / self.studies) / self.studies)


def drawn(scenario: Scenario, seeds: int, draw: Generator) -> tuple[Study, dict[tuple[str, str], float]]:
    """A study, and the true interaction of each (format, arm), nats."""
    sigma = SIGMA * BASE
    names = (*FORMATS, "BF16")
    shape = (len(names), len(ARMS), seeds)
    shared = 3 * draw.standard_normal((1, 1, seeds))
    shared = (
        shared + 0.5 * draw.standard_normal((len(names), 1, seeds)) + 0.5 * draw.standard_normal((1, len(ARMS), seeds))
    )
    losses = BASE + sigma * (shared + scenario.spread(draw)[:, :, None] * scenario.noise(draw, shape))
    losses[:-1] *= 1 + scenario.excess
    truth = {}
    for i, name in enumerate(FORMATS):
        for j, arm in enumerate(ARMS[2:], 2):
            effect = scenario.effects * 2 * sigma * draw.standard_normal()
            losses[i, j] -= effect
            truth[name, arm] = effect
    stopped = draw.random(shape) < scenario.stops
    stopped[-1, 0] = False
    cells = []
    for i, name in enumerate(names):
        for j, arm in enumerate(ARMS):
            if arm not in scenario.arms or name not in (*scenario.formats, "BF16"):
                continue
            if (i, j) in scenario.lost:
                cells.append(cell({}, format=name, arm=arm, missing=tuple(range(seeds))))
                continue
            ends = {s: float(losses[i, j, s]) for s in range(seeds) if not stopped[i, j, s]}
            cells.append(cell(ends, tuple(s for s in range(seeds) if stopped[i, j, s]), format=name, arm=arm))
    return study_of(cells), truth


def simulate(scenario: Scenario, seeds: int, studies: int, key: int = 0) -> Tally:
    """What such studies call decided, held against the truth."""
    found = Tally()
    for number in range(studies):
        study, truth = drawn(scenario, seeds, np.random.default_rng([key, seeds, number]))
        found.studies += 1
        for name in set(_events(study, truth, scenario)):
            found.events[name] += 1
        words = [item.word for item in study.formats]
        found.sums["trains"] += words.count("trains") / len(words)
        found.sums["set"] += len(study.best)
        real = [item for item in study.beyond if abs(truth[place(item.cell)]) > 0]
        if real:
            found.sums["power"] += sum(item.decided for item in real) / len(real)
    return found


def _events(study: Study, truth: dict[tuple[str, str], float], scenario: Scenario) -> Iterable[str]:
    measured = [item for item in study.beyond if item.status == "measured"]
    for item in measured:
        real = truth[place(item.cell)]
        if item.decided and item.mean * real <= 0:
            yield from ("false difference", "false")
        if not item.low <= real <= item.high:
            yield "uncovered"
    if measured:
        head = max(measured, key=lambda item: item.mean)
        if not head.low <= truth[place(head.cell)] <= head.high:
            yield "headline uncovered"
        best = max(measured, key=lambda item: truth[place(item.cell)])
        if scenario.effects and not any(item.cell is best.cell for group in study.best for item in group):
            yield "best left out"
        if study.leads and (not scenario.effects or study.best[0][0].cell is not best.cell):
            yield from ("false best", "false")
    if any(item.decided for item in study.gains if item.status == "stopped"):
        yield from ("false stops", "false")
    # At the margin itself either claim is counted as false, though at most one of them can be.
    claims = {item.word for item in study.verdicts.values()}
    if "fails" in claims and scenario.excess <= study.margin:
        yield from ("false fails", *(() if scenario.excess else ("false",)))
    if "trains" in claims and scenario.excess >= study.margin:
        yield "false trains"


def place(cell: Cell) -> tuple[str, str]:
    return cell.format, cell.arm


def power(effect: float, seeds: int, studies: int, key: int = 1) -> tuple[float, float]:
    """How often one true interaction of `effect` standard deviations is decided, and named alone as the largest."""
    decided = alone = 0
    for number in range(studies):
        study, _ = drawn(Scenario("normal"), seeds, np.random.default_rng([key, seeds, number]))
        gain = effect * 2 * SIGMA * BASE
        cells = [_shifted(item, gain) if place(item) == ("E4M3", "manifold") else item for item in study.cells]
        shifted = study_of(cells)
        decided += any(place(item.cell) == ("E4M3", "manifold") and item.decided for item in shifted.beyond)
        alone += shifted.leads and place(shifted.best[0][0].cell) == ("E4M3", "manifold")
    return decided / studies, alone / studies


def _shifted(item: Cell, gain: float) -> Cell:
    return cell({seed: loss - gain for seed, loss in item.losses.items()}, format=item.format, arm=item.arm)
