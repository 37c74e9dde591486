"""Signs that a run fails: rules over signals of layers, and the direction of the step in which each of them shows.

A training step goes forward, backward and through the optimizer, and a format may fail in each: values too large or
too small for it in the forward pass, gradients in the backward pass, steps too small for its grid in the optimizer.
What is kept of a trial is when each rule first held, and in which layer: a few lines where its table of layers has
thousands, and an export carries them.

Limits lie outside what healthy runs show: 126 trials of 300 steps that all ended within 5 % of BF16's loss (BF16, E3M4,
E4M3, E5M2, E7M0 under four arms, two rates, three seeds; every layer, every check), and inside what the planted faults
of docs/bench/signals.md do. Those of gradients are drawn from 300 steps of AdamW with activations and gradients in 8
bits too: where eight in ten gradients of a head round to zero, E3M4 still ends at BF16's loss, for they are small.

| signal | healthy runs | rule |
| --- | --- | --- |
| overflow of any role | 0 | above .01 |
| signal to quantization noise | 12.3 dB and more (weights in E7M0) | below 10 dB |
| saturation | .105 at most (weights in E7M0) | above .25 |
| underflow of weights, activations | .051 at most (activations in E0M7) | above .25 |
| underflow of gradients | .81 in E3M4, .96 in E0M7 (4.6 % above BF16) | above .98 |
| flip yield | .46 and more, 99 of 100 .87 and more | below .4 |
| layers that get no update; weights that get none | 0; 5e-5 | any; above .5 |
| spread; spectral norm over the reference's | .49 and more; 7.03 at most | below .35; above 8 |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from altgrad.training.record import from_plain, to_plain

Direction = Literal["forward", "backward", "optimizer"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Rule:
    """A signal that shows, beyond its limit, in which direction a run fails; `meaning` says what then happens."""

    signal: str
    direction: Direction
    test: Literal["above", "below"]
    limit: float
    meaning: str

    def holds(self, values: np.ndarray) -> np.ndarray:
        """[values] whether each is beyond the limit; NaN never is."""
        with np.errstate(invalid="ignore"):
            beyond: np.ndarray = values > self.limit if self.test == "above" else values < self.limit
        return beyond


def _of_role(role: str, direction: Direction, underflow: float = 0.25) -> tuple[Rule, ...]:
    return (
        Rule(f"{role}_overflow", direction, "above", 0.01, f"{role}s beyond the format's largest value"),
        Rule(f"{role}_underflow", direction, "above", underflow, f"{role}s that round to zero"),
        Rule(f"{role}_saturation", direction, "above", 0.25, f"{role}s at the format's largest magnitude"),
        Rule(f"{role}_sqnr", direction, "below", 10.0, f"{role}s lost in rounding noise"),
    )


RULES: dict[str, Rule] = {
    rule.signal: rule
    for rule in (
        *_of_role("weight", "forward"),
        *_of_role("activation", "forward"),
        *_of_role("gradient", "backward", underflow=0.98),
        Rule("flip_yield", "optimizer", "below", 0.4, "steps that rounding swallows"),
        Rule("frozen", "optimizer", "above", 0.0, "a layer to which nothing is applied"),
        Rule("zero_updates", "optimizer", "above", 0.5, "weights to which nothing is applied"),
        Rule("spread_ratio", "optimizer", "below", 0.35, "weights that collapse to one direction"),
        Rule("spectral_ratio", "optimizer", "above", 8.0, "weights that grow without bound"),
    )
}
"""By signal; of several that hold at one check the first in this order is told, as the cause of what follows."""


@dataclass(frozen=True)
class Moment:
    """When a rule first held in a trial, in the layer that was furthest beyond it, and the value there."""

    signal: str
    layer: str
    step: int
    value: float

    @property
    def rule(self) -> Rule:
        return RULES[self.signal]


def first_moments(layers: pa.Table) -> list[Moment]:
    """The first moment of every rule that held, from a trial's signals of layers (`layer_table.SCHEMA`)."""
    known = pc.is_in(layers["signal"], pa.array(list(RULES), pa.string()))
    table = layers.filter(known)
    signals, names = np.asarray(table["signal"].to_pylist()), table["layer"].to_pylist()
    steps, values = table["step"].to_numpy(), table["value"].to_numpy()
    found = []
    for rule in RULES.values():
        places = np.flatnonzero(signals == rule.signal)
        places = places[rule.holds(values[places])]
        if not len(places):
            continue
        first = places[steps[places] == steps[places].min()]
        worst = first[values[first].argmax() if rule.test == "above" else values[first].argmin()]
        found.append(Moment(rule.signal, names[worst], int(steps[worst]), float(values[worst])))
    return found


def as_text(moments: Iterable[Moment]) -> str:
    """The moments as a ledger keeps them: JSON, a list of (signal, layer, step, value)."""
    return json.dumps([[item.signal, item.layer, item.step, to_plain(item.value)] for item in moments])


def from_text(text: str) -> list[Moment]:
    """The inverse of `as_text`, without what the rules of this version do not hold of."""
    found = (Moment(signal, layer, step, from_plain(value)) for signal, layer, step, value in json.loads(text))
    return [item for item in found if item.signal in RULES and item.rule.holds(np.array([item.value]))[0]]


def first_of(moments: Iterable[Moment]) -> Moment | None:
    """The earliest; of several at one step the one whose rule stands first. None where no rule held."""
    order = list(RULES)
    return min(moments, key=lambda moment: (moment.step, order.index(moment.signal)), default=None)
