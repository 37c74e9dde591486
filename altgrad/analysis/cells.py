"""Cells and what is said of each: does it train, how far is it from BF16, what did the geometry gain?

A cell is one format, arm and policy with all its seeds. Where several learning rates (or rung clips) were
run, the cell is represented by one of them: all seeds unstopped if there is such a one, then the fewest
unresolved, then the least mean validation loss. The reference is chosen in the same way. Choosing and judging
by the same validation loss flatters every cell slightly, and the cell with more learning rates more.

A stopped run has no final loss. It is censored: never averaged in, and a cell with a stopped seed is "failed
k of n" and ranks below every cell without one.

Nothing is judged against a reference that did not learn: a run that blew up, or stood still, would make every
format look as good as it. A run has learned if its final validation loss lies below the training loss of its
first step by more than 10 % or by more than 0.5 nats. (An untrained byte model starts near ln 256 = 5.55 nats,
on training and validation text alike, and one step moves the loss by some hundredths.)

Verdicts, against the reference's loss with a margin (10 %), seed by seed:

    trains      every seed finishes within the margin, and has learned
    fails       every seed is stopped, ends outside the margin, or has not learned
    unclear     neither: the seeds disagree, or are too few to compare

They are decided only with 2 seeds or more and none missing. `trains` must also leave room: the 95 % interval
of the relative excess lies within the margin, or a further seed could lie as far out as the seeds' whole
range is wide. `fails` must not overlap: the least loss of its finished seeds is above the greatest loss of
the reference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import pandas as pd

from altgrad.analysis.load import FAILED, FINISHED
from altgrad.analysis.stats import Paired, adjust, paired, t_interval
from altgrad.quantization import get_format
from altgrad.training.config import ARMS, UNQUANTIZED

REFERENCE_FORMAT, REFERENCE_ARM, MAIN_POLICY = "BF16", "adamw", "uniform"
MARGIN = 0.10
ALPHA = 0.05
UNITS = {"lm": "nats", "classify": "in 1 − F1 micro"}
"""What a cell's losses are in; of a classifier they are errors (see `scores`)."""
MEASURES = {UNITS["lm"]: "loss", UNITS["classify"]: "error"}
"""What a report calls them."""
LEARNED_SHARE, LEARNED_NATS = 0.10, 0.5
SAME_RESIDENCE = {
    "manifold_sr": "adamw_sr",
    "manifold_nearest": "adamw_nearest",
    "grid": "adamw_sr",
    "grid_literal": "adamw_sr",
}
"""For arms whose weights live on the grid, the plain arm that lives there too: only the step rule differs."""


SIGNALS_OF_CELLS = ("flip_yield", "stall_ratio", "stable_rank", "bits_per_byte")


@dataclass(frozen=True)
class Cell:
    """One format, arm and policy at its chosen learning rate.

    `losses` holds the finished seeds' validation losses in nats, `starts` their training losses at the first
    step, `stops` the failed seeds' signals and layers, `missing` the unresolved seeds; `signals` the finished
    seeds' mean final SIGNALS_OF_CELLS.
    """

    format: str
    arm: str
    policy: str
    lr: float
    rung_clip: float
    geometry: bool
    losses: Mapping[int, float]
    stops: Mapping[int, tuple[str, str]]
    missing: tuple[int, ...]
    outcomes: Mapping[str, int]
    signals: Mapping[str, float]
    trial_ids: tuple[str, ...] = ()
    choices: int = 1
    starts: Mapping[int, float] = field(default_factory=dict)
    unit: str = "nats"
    chosen_by: Mapping[int, float] = field(default_factory=dict)
    """What parameters are chosen by, of the finished seeds; empty: the losses themselves."""

    @property
    def n(self) -> int:
        """Seeds with a result."""
        return len(self.losses) + len(self.stops)

    @property
    def mean(self) -> float:
        """Mean validation loss of an unstopped cell, nats; NaN where a seed was stopped or none finished."""
        return sum(self.losses.values()) / len(self.losses) if self.losses and not self.stops else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return t_interval(list(self.losses.values())) if not self.stops else (math.nan, math.nan)

    @property
    def rank(self) -> tuple[float, int, float]:
        """Sort key, best first: share stopped, seeds missing, mean of what the finished are chosen by."""
        if not self.n:
            return 2.0, len(self.missing), math.inf
        values = list((self.chosen_by or self.losses).values())
        loss = sum(values) / len(values) if values else math.inf
        return len(self.stops) / self.n, len(self.missing), loss

    @property
    def learned(self) -> bool:
        """Whether every finished seed has learned; False where none finished."""
        return bool(self.losses) and all(map(self.seed_learned, self.losses))

    def seed_learned(self, seed: int) -> bool:
        """Whether the finished seed ended clearly below where it began; False where that is not known."""
        start, loss = self.starts.get(seed, math.nan), self.losses[seed]
        return loss < (1 - LEARNED_SHARE) * start or loss < start - LEARNED_NATS

    def main_stop(self) -> tuple[str, str]:
        """The commonest (signal, layer) of the stopped seeds."""
        return Counter(self.stops.values()).most_common(1)[0][0]


@dataclass(frozen=True)
class Comparison:
    """One cell against another: `differences` by seed, cell - other in nats, where both have finished.

    `sound` is False in a sweep whose reference did not learn: nothing is decided in it.
    """

    cell: Cell
    other: Cell
    differences: Mapping[int, float]
    paired: Paired | None
    p_adjusted: float = math.nan
    sound: bool = True

    @property
    def kind(self) -> str:
        """measured, rescued (the other was stopped in every seed, this one learned), lost (the reverse), or
        stopped."""
        if self.cell.stops or self.other.stops:
            if not self.cell.stops and not self.other.losses and self.cell.learned:
                return "rescued"
            if not self.other.stops and not self.cell.losses and self.other.learned:
                return "lost"
            return "stopped"
        return "measured" if self.paired else "no result"

    @property
    def decided(self) -> bool:
        """Whether the difference is significant and one side learned, or one failed in each of 2 or more seeds."""
        if not (self.sound and (self.cell.learned or self.other.learned)):
            return False
        if self.kind in ("rescued", "lost"):
            return min(self.cell.n, self.other.n) >= 2 and not (self.cell.missing or self.other.missing)
        return self.kind == "measured" and self.p_adjusted <= ALPHA


@dataclass(frozen=True)
class Judgement:
    """A verdict on a cell, whether the seeds suffice for it, and the mean relative `excess` over BF16."""

    verdict: str
    decided: bool = False
    excess: float = math.nan


@dataclass(frozen=True)
class Study:
    """Every comparison that a report shows."""

    cells: list[Cell]
    reference: Cell | None
    against_reference: dict[tuple[str, str, str], Comparison] = field(default_factory=dict)
    judgements: dict[tuple[str, str, str], Judgement] = field(default_factory=dict)
    geometry: list[Comparison] = field(default_factory=list)
    correction: str = "Holm"
    geometry_correction: str = "Holm"

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

    def comparison(self, cell: Cell) -> Comparison | None:
        return self.against_reference.get(key_of(cell))

    def judgement(self, cell: Cell) -> Judgement:
        return self.judgements.get(key_of(cell), Judgement("no reference"))


def key_of(cell: Cell) -> tuple[str, str, str]:
    return cell.format, cell.arm, cell.policy


def format_order(name: str) -> tuple[int, int, str]:
    """Sort key: total bits, then exponent bits; FP32 last."""
    if name == UNQUANTIZED:
        return 32, 8, name
    fmt = get_format(name)
    return fmt.total_bits, fmt.exponent_bits, name


def arm_order(name: str) -> tuple[int, str]:
    """Sort key: the order of the registry, unknown arms last by name."""
    known = list(ARMS)
    return (known.index(name) if name in known else len(known)), name


def is_eight_bit(name: str) -> bool:
    return format_order(name)[0] == 8


def build_study(trials: pd.DataFrame) -> Study:
    """Cells, their differences from the reference, geometry against plain arms; p values corrected."""
    cells = build_cells(trials)
    reference = find_reference(cells)
    others = [] if reference is None else [cell for cell in cells if cell is not reference]
    compared = [compare(cell, reference) for cell in others if reference is not None]
    sound = reference is None or reference.learned
    compared, correction = _with_adjusted(compared, sound)
    judged = {} if reference is None or not sound else {key_of(cell): judge(cell, reference) for cell in cells}
    geometry, geometry_correction = _with_adjusted(geometry_comparisons(cells), sound)
    return Study(
        cells,
        reference,
        {key_of(item.cell): item for item in compared},
        judged,
        geometry,
        correction,
        geometry_correction,
    )


def build_cells(trials: pd.DataFrame) -> list[Cell]:
    """One cell per format, arm and policy, in the order of formats, each at its best parameters."""
    # Plain records: a frame per choice takes most of the time of a large sweep's report.
    groups: dict[tuple[Any, ...], dict[str, list[dict[Hashable, Any]]]] = {}
    for record in trials.to_dict("records"):
        choices = groups.setdefault((record["format"], record["optimizer"], record["policy"]), {})
        choices.setdefault(record["options"], []).append(record)
    cells = []
    for choices in groups.values():
        found = [_cell(sorted(choice, key=itemgetter("seed"))) for choice in choices.values()]
        cells.append(replace(min(found, key=lambda cell: cell.rank), choices=len(found)))
    return sorted(
        cells,
        key=lambda cell: (format_order(cell.format), cell.policy != MAIN_POLICY, cell.policy, arm_order(cell.arm)),
    )


def _cell(trials: Sequence[Mapping[Hashable, Any]]) -> Cell:
    """The cell of trials that differ in nothing but the seed, in its order."""
    finished = [trial for trial in trials if trial["state"] == FINISHED]
    failed = [trial for trial in trials if trial["state"] == FAILED]
    first = trials[0]
    return Cell(
        format=first["format"],
        arm=first["optimizer"],
        policy=first["policy"],
        lr=float(first["lr"]),
        rung_clip=float(first["rung_clip"]),
        geometry=bool(first["geometry"]),
        losses={int(trial["seed"]): float(trial["val_loss"]) for trial in finished},
        starts={int(trial["seed"]): float(trial["first_loss"]) for trial in finished},
        stops={int(trial["seed"]): (trial["signal"] or "val_loss", trial["layer"]) for trial in failed},
        missing=tuple(int(trial["seed"]) for trial in trials if trial["state"] not in (FINISHED, FAILED)),
        outcomes=dict(Counter(trial["outcome"] for trial in trials).most_common()),
        signals={name: mean_of_known(trial[name] for trial in finished) for name in SIGNALS_OF_CELLS},
        trial_ids=tuple(trial["trial_id"] for trial in trials),
        unit=UNITS[first["task"]],
        chosen_by=_chosen_by(finished),
    )


def mean_of_known(values: Iterable[float]) -> float:
    """The mean of those that are numbers; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _chosen_by(finished: Sequence[Mapping[Hashable, Any]]) -> dict[int, float]:
    """A classifier's error on validation documents by seed: choosing by the test score would flatter the choice."""
    scores = {int(trial["seed"]): 1 - float(trial.get("val_f1_micro", math.nan)) for trial in finished}
    return {} if any(map(math.isnan, scores.values())) else scores


def find_reference(cells: Sequence[Cell]) -> Cell | None:
    """The BF16 AdamW cell, of policy `uniform` where there are several; None where no seed of it finished."""
    found = [cell for cell in cells if (cell.format, cell.arm) == (REFERENCE_FORMAT, REFERENCE_ARM) and cell.losses]
    return min(found, key=lambda cell: (cell.policy != MAIN_POLICY, cell.policy)) if found else None


def compare(cell: Cell, other: Cell) -> Comparison:
    """The differences over the seeds that both have finished; no pairs where either has a stopped seed."""
    common = [] if cell.stops or other.stops else sorted(set(cell.losses) & set(other.losses))
    differences = {seed: cell.losses[seed] - other.losses[seed] for seed in common}
    return Comparison(cell, other, differences, paired(list(differences.values())) if common else None)


def judge(cell: Cell, reference: Cell, margin: float = MARGIN) -> Judgement:
    """Whether the cell trains within `margin` of the reference's loss; see the module."""
    common = sorted(set(cell.losses) & set(reference.losses))
    excesses = [cell.losses[seed] / reference.losses[seed] - 1 for seed in common]
    trained = [excess <= margin and cell.seed_learned(seed) for seed, excess in zip(common, excesses, strict=True)]
    mean = sum(excesses) / len(excesses) if excesses else math.nan
    enough = cell.n >= 2 and not cell.missing and len(common) == len(cell.losses)
    if not cell.n:
        return Judgement("no result")
    if not cell.stops and excesses and all(trained):
        room = max(excesses) + max(excesses) - min(excesses) <= margin or t_interval(excesses)[1] <= margin
        return Judgement("trains", enough and room, mean)
    if len(common) == len(cell.losses) and not any(trained):
        apart = not cell.losses or min(cell.losses.values()) > max(reference.losses.values())
        return Judgement("fails", enough and apart, mean)
    return Judgement("unclear", False, mean)


def geometry_comparisons(cells: Sequence[Cell]) -> list[Comparison]:
    """Each geometry-aware arm against AdamW and the plain arm of its residence, in its format and policy."""
    by_key = {key_of(cell): cell for cell in cells}
    compared = []
    for cell in cells:
        for arm in filter(None, (REFERENCE_ARM, SAME_RESIDENCE.get(cell.arm))) if cell.geometry else ():
            other = by_key.get((cell.format, arm, cell.policy))
            if other is not None:
                compared.append(compare(cell, other))
    return compared


def twin_control(cells: Sequence[Cell]) -> tuple[int, float] | None:
    """How many pairs of runs differ only in E0M7 against E1M6, and their largest difference, nats; or None.

    The two are one grid up to a power of two, which the scale takes up: a difference is a fault.
    The literal gradient mode is exempt, its stiffness differs by definition.
    """
    by_key = {key_of(cell): cell for cell in cells}
    found = [
        abs(loss - twin.losses[seed])
        for (name, arm, policy), cell in by_key.items()
        if name == "E0M7"
        and arm != "manifold_gradient"
        and (twin := by_key.get(("E1M6", arm, policy))) is not None
        and (twin.lr == cell.lr)
        for seed, loss in cell.losses.items()
        if seed in twin.losses
    ]
    return (len(found), max(found)) if found else None


def _with_adjusted(compared: Sequence[Comparison], sound: bool) -> tuple[list[Comparison], str]:
    tested = [item for item in compared if item.paired]
    p_values, method = adjust([dict(item.differences) for item in tested])
    adjusted = dict(zip(map(id, tested), p_values, strict=True))
    return [replace(item, p_adjusted=adjusted.get(id(item), math.nan), sound=sound) for item in compared], method
