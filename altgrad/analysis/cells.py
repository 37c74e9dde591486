"""Cells: one format, arm and policy with all its seeds, at the setting that represents it.

An arm that was run with several values of a parameter other than the learning rate (a rung clip, a beta) is as many
arms: each is compared under its own name. What is chosen within a cell is the learning rate alone, by the mean
validation loss over all seeds (see `grids`).

A stopped run has no final loss: it is never averaged in. A run that a race pruned says nothing of its setting but that
others were better; a lost one (out of memory, not run yet) costs its seed and no other. One in which a layer had to be
moved to another format is no result of its own: its loss is used nowhere, and since such seeds are not lost at random,
nothing is decided of a cell that has one (see `contrasts` and `verdicts`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from altgrad.analysis.inference import t_interval
from altgrad.analysis.records import FAILED, FINISHED, SHIFTED, ending_of
from altgrad.analysis.signs import Sign, signs_of
from altgrad.quantization import PrecisionPolicy, get_format, named_policy
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import UNQUANTIZED
from altgrad.training.outcome import OutcomeKind

REFERENCE_FORMAT, REFERENCE_ARM, MAIN_POLICY = "BF16", "adamw", "uniform"
UNITS = {"lm": "nats", "classify": "in 1 − F1 micro"}
"""What a cell's losses are in; of a classifier they are errors (see `scores`)."""
MEASURES = {UNITS["lm"]: "loss", UNITS["classify"]: "error"}
"""What a report calls them."""
LEARNED_SHARE, LEARNED_NATS = 0.10, 0.5
SIGNALS_OF_CELLS = ("flip_yield", "stall_ratio", "stable_rank", "bits_per_byte")

Key = tuple[str, str, str]
"""Format, arm, policy."""


@dataclass(frozen=True)
class Stop:
    """Why and when a guard ended a run: signal, layer ("" for none), step."""

    signal: str
    layer: str
    step: float


@dataclass(frozen=True)
class Cell:
    """One format, arm and policy at its chosen learning rate.

    `losses` holds the finished seeds' validation losses in nats, `starts` the training losses of the first step,
    `stops` those that a guard ended, `missing` the lost seeds and `pruned` those that a race ended; `signals` the
    finished seeds' mean final SIGNALS_OF_CELLS. `arm` names the parameters that tell it from other arms of its
    kind, `family` does not; `plain` and `control`: see `training.arm_configs`.
    """

    format: str
    arm: str
    policy: str
    lr: float
    geometry: bool
    losses: Mapping[int, float]
    stops: Mapping[int, Stop] = field(default_factory=dict)
    missing: tuple[int, ...] = ()
    pruned: tuple[int, ...] = ()
    shifted: Mapping[int, str] = field(default_factory=dict)
    """By seed the moves to other formats that its run needed, as in "lm_head: E4M3->E5M2"."""
    signs: Mapping[int, tuple[Sign, ...]] = field(default_factory=dict)
    """By seed, of runs with a result, the first sign of failure in each direction, the earliest first."""
    outcomes: Mapping[str, int] = field(default_factory=dict)
    signals: Mapping[str, float] = field(default_factory=dict)
    trial_ids: tuple[str, ...] = ()
    starts: Mapping[int, float] = field(default_factory=dict)
    unit: str = "nats"
    chosen_by: Mapping[int, float] = field(default_factory=dict)
    """What the rate is chosen by, of the finished seeds; empty: the losses themselves."""
    family: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    """The learning rates that it was chosen from."""
    tried: tuple[Cell, ...] = ()
    """Every setting that was run, this one among them."""
    exploratory: bool = False
    """Whether its grid has no rate in common with those it is compared with."""
    plain: str = ""
    control: str = ""
    quantized: bool = True
    """False for an arm whose layers round nothing, whatever the format."""
    rules: str = ""
    """What each layer computes in, as JSON; '' for the policy of that name."""

    @property
    def is_judged(self) -> bool:
        """Whether it trains in 8 bits, so that it trains or fails for its format."""
        return self.quantized and is_narrow(self.format)

    @property
    def precision(self) -> PrecisionPolicy:
        """What each layer computes in."""
        return _precision(self.rules) if self.rules else named_policy(self.policy, self.format)

    @property
    def key(self) -> Key:
        return self.format, self.arm, self.policy

    @property
    def name(self) -> str:
        """Format, arm and policy as the name of a file, or of a place in the report."""
        return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(self.key))

    @property
    def settings(self) -> int:
        """How many settings were run."""
        return max(1, len(self.tried))

    @property
    def n(self) -> int:
        """Seeds with a result."""
        return len(self.losses) + len(self.stops)

    @property
    def has_result(self) -> bool:
        """Whether it says anything: a seed ended, and none of the chosen setting was pruned."""
        return bool(self.n) and not self.pruned

    @property
    def mean(self) -> float:
        """Mean validation loss of an unstopped cell, nats; NaN where a seed was stopped or none finished."""
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses and not self.stops else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return t_interval(list(self.losses.values())) if not self.stops else (math.nan, math.nan)

    @property
    def rank(self) -> tuple[float, ...]:
        """Sort key, best first: seeds pruned, share stopped or shifted, seeds missing, mean of what is chosen by."""
        values = list((self.chosen_by or self.losses).values())
        loss = math.fsum(values) / len(values) if values else math.inf
        if not self.n:
            return bool(self.pruned), 2.0, len(self.missing), loss
        failed = len(self.stops) + len(self.shifted)
        return bool(self.pruned), failed / (self.n + len(self.shifted)), len(self.missing), loss

    @property
    def learned(self) -> bool:
        """Whether every finished seed has learned; False where none finished."""
        return bool(self.losses) and all(map(self.seed_learned, self.losses))

    def seed_learned(self, seed: int) -> bool:
        """Whether the finished seed ended clearly below where it began; False where that is not known."""
        start, loss = self.starts.get(seed, math.nan), self.losses[seed]
        return loss < (1 - LEARNED_SHARE) * start or loss < start - LEARNED_NATS

    def main_stop(self) -> Stop:
        """The first stop of the commonest signal and layer."""
        (kind, _), *_ = Counter((stop.signal, stop.layer) for stop in self.stops.values()).most_common(1)
        return next(stop for stop in self.stops.values() if (stop.signal, stop.layer) == kind)


def format_order(name: str) -> tuple[int, int, str]:
    """Sort key: total bits, then exponent bits; FP32 last."""
    if name == UNQUANTIZED:
        return 32, 8, name
    fmt = get_format(name)
    return fmt.total_bits, fmt.exponent_bits, name


def arm_order(name: str) -> tuple[int, str]:
    """Sort key: the order of the registry, unknown arms last by name; with parameters after the plain name."""
    known, family = list(ARMS), name.partition(",")[0]
    return (known.index(family) if family in known else len(known)), name


def is_narrow(name: str) -> bool:
    """Whether a value of the format takes 8 bits or fewer, and its runs are judged by it."""
    return format_order(name)[0] <= 8


def cell_of(trials: Sequence[Mapping[Hashable, Any]], arm: str, knobs: Mapping[str, Any]) -> Cell:
    """The cell of trials that differ in nothing but the seed, in its order."""
    finished = [trial for trial in trials if trial["state"] == FINISHED]
    failed = [trial for trial in trials if trial["state"] == FAILED]
    shifted = {int(trial["seed"]): trial["formats"] for trial in trials if trial["state"] == SHIFTED}
    others = [trial for trial in trials if trial["state"] not in (FINISHED, FAILED, SHIFTED)]
    pruned = tuple(int(trial["seed"]) for trial in others if trial["outcome"] == OutcomeKind.PRUNED)
    first = trials[0]
    return Cell(
        format=first["format"],
        arm=arm,
        policy=first["policy"],
        lr=float(first["lr"]),
        geometry=bool(first["geometry"]),
        losses={int(trial["seed"]): float(trial["val_loss"]) for trial in finished},
        starts={int(trial["seed"]): float(trial["first_loss"]) for trial in (*finished, *failed)},
        stops={
            int(trial["seed"]): Stop(trial["signal"] or "val_loss", trial["layer"], float(trial["step"]))
            for trial in failed
        },
        missing=tuple(int(trial["seed"]) for trial in others if trial["outcome"] != OutcomeKind.PRUNED),
        pruned=pruned,
        shifted=shifted,
        signs={int(trial["seed"]): signs_of(trial) for trial in (*finished, *failed)},
        outcomes=dict(Counter(map(ending_of, trials)).most_common()),
        signals={name: mean_of_known(trial[name] for trial in finished) for name in SIGNALS_OF_CELLS},
        trial_ids=tuple(trial["trial_id"] for trial in trials),
        unit=UNITS[first["task"]],
        chosen_by=_chosen_by(finished),
        family=first["optimizer"],
        knobs=knobs,
        quantized=bool(first["quantized"]),
        plain=first["plain_arm"],
        control=first["control_arm"],
        rules=first["rules"],
    )


@cache
def _precision(rules: str) -> PrecisionPolicy:
    return PrecisionPolicy.model_validate_json(rules)


def mean_of_known(values: Iterable[float]) -> float:
    """The mean of those that are finite; NaN where none is."""
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _chosen_by(finished: Sequence[Mapping[Hashable, Any]]) -> dict[int, float]:
    """A classifier's error on validation documents by seed: choosing by the test score would flatter the choice."""
    scores = {int(trial["seed"]): 1 - float(trial.get("val_f1_micro", math.nan)) for trial in finished}
    return {} if any(map(math.isnan, scores.values())) else scores


def find_reference(cells: Sequence[Cell]) -> Cell | None:
    """The BF16 AdamW cell, of policy `uniform` where there are several; None where no seed of it finished."""
    found = [
        cell
        for cell in cells
        if (cell.format, cell.family) == (REFERENCE_FORMAT, REFERENCE_ARM) and cell.losses and not cell.pruned
    ]
    return min(found, key=lambda cell: (cell.policy != MAIN_POLICY, cell.policy, cell.rank)) if found else None
