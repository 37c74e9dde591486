"""Why runs failed: the first signs of it, the direction of the step that each showed in, the kind of layer, the step.

`sweep.record.signs` has the rules and what they are drawn from. Here they are put beside how runs ended: a loss that
is no number shows in the forward pass, a gradient that is none under a loss that is one in the backward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from altgrad.analysis.layer_signals import layer_kind
from altgrad.analysis.wording import listed
from altgrad.sweep.record.signs import DIRECTIONS, Direction, Moment, first_of, from_text

NOT_FINITE: Mapping[str, tuple[Direction, str]] = {
    "train_loss": ("forward", "a loss that is no number"),
    "grad_norm": ("backward", "gradients that are no numbers"),
    "nonfinite_weights": ("optimizer", "weights that are no numbers"),
    "skipped_tensors": ("backward", "gradients that are no numbers"),
}


@dataclass(frozen=True)
class Sign:
    """A sign of failure in one run; `limit` is NaN where the value is no number."""

    step: int
    direction: Direction
    signal: str
    layer: str
    value: float
    limit: float
    meaning: str

    @property
    def kind(self) -> str:
        return layer_kind(self.layer)


def signs_of(trial: Mapping[Any, Any]) -> tuple[Sign, ...]:
    """The first sign in each direction of a trial (a row of `Records.trials`), the earliest first.

    Up to the steps asked of the trial, which may have been trained for longer.
    """
    moments = [moment for moment in from_text(trial["signs"] or "[]") if moment.step <= trial["steps"]]
    found = [_sign(first) for direction in DIRECTIONS if (first := first_of(_in(direction, moments))) is not None]
    if trial["outcome"] == "nonfinite" and trial["signal"] in NOT_FINITE:
        direction, meaning = NOT_FINITE[trial["signal"]]
        step = int(trial["step"])
        broken = Sign(step, direction, trial["signal"], trial["layer"], float(trial["value"]), math.nan, meaning)
        # What is no number counts before what else is seen at the same check.
        found = [sign for sign in found if sign.direction != direction or sign.step < step]
        if all(sign.direction != direction for sign in found):
            found.insert(0, broken)
    return tuple(sorted(found, key=lambda sign: sign.step))


def _in(direction: Direction, moments: Iterable[Moment]) -> list[Moment]:
    return [moment for moment in moments if moment.rule.direction == direction]


def _sign(moment: Moment) -> Sign:
    rule = moment.rule
    return Sign(moment.step, rule.direction, rule.signal, moment.layer, moment.value, rule.limit, rule.meaning)


@dataclass(frozen=True)
class CommonSign:
    """What the runs of a cell have in common: the commonest first sign, `seeds` of `runs` show it, at `steps`."""

    sign: Sign
    kinds: tuple[str, ...]
    """of layers, the commonest first"""
    seeds: int
    runs: int
    steps: tuple[int, int]
    """least and greatest"""


def common_sign(runs: Sequence[Sequence[Sign]]) -> CommonSign | None:
    """The commonest first sign of runs, each with its signs, the earliest first; None where none shows any."""
    firsts = [signs[0] for signs in runs if signs]
    if not firsts:
        return None
    (signal, _), *_ = Counter(sign.signal for sign in firsts).most_common(1)
    same = [sign for sign in firsts if sign.signal == signal]
    kinds = tuple(kind for kind, _ in Counter(sign.kind for sign in same).most_common())
    first = min(same, key=lambda sign: sign.step)
    return CommonSign(first, kinds, len(same), len(runs), (first.step, max(sign.step for sign in same)))


def sign_text(runs: Sequence[Sequence[Sign]]) -> str:
    """The commonest first sign of runs in half a sentence; '' where none shows any."""
    found = common_sign(runs)
    if found is None:
        return ""
    sign, (first, last) = found.sign, found.steps
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"first sign in the {pass_text(sign.direction)}: {sign.signal} of {listed(found.kinds[:2])}, {steps}"


def pass_text(direction: Direction) -> str:
    """'forward pass', 'backward pass', 'optimizer'."""
    return direction if direction == "optimizer" else f"{direction} pass"
