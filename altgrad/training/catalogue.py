"""Every signal by name: what it means, its unit, and what it can be at all.

One place, so that documents, guards and their errors say the same. A signal of layers has a value for every layer
and one for the row, over all of them; `flip_yield/min` is the least over the layers (min, max or mean),
`flip_yield/lm_head` that of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Signal:
    """A row of the catalogue; the value lies within [`least`, `most`] unless it is not finite."""

    meaning: str
    unit: str
    of_layers: bool = False
    least: float = -math.inf
    most: float = math.inf


SIGNALS: dict[str, Signal] = {
    "train_loss": Signal("loss of the step's batch, before the step", "nats", least=0),
    "val_loss": Signal("loss on validation batches", "nats", least=0),
    "loss_excess": Signal("training loss minus that of the first step", "nats"),
    "grad_norm": Signal("L2 norm of the whole gradient, before clipping", "loss per weight", least=0),
    "flips": Signal("weights whose integer code changed", "number", True, least=0),
    "updates": Signal("weights to which a non-zero change was applied", "number", True, least=0),
    "gradient_updates": Signal("weights with |gradient| > 1e-10", "number", True, least=0),
    "ulp_travel": Signal("sum of |code change|", "codes", True, least=0),
    "bit_position": Signal("sum of signed code changes", "codes", True),
    "stall_ratio": Signal("1 - flips / updates; 0 with no updates", "share", True, 0, 1),
    "flip_yield": Signal(
        "flips / sum of min(1, |change| / spacing): realised over expected under unbiased rounding", "ratio", True, 0
    ),
    "overflow": Signal("weights that wanted to leave the grid", "number", True, least=0),
    "stable_rank": Signal("squared Frobenius norm over squared spectral norm; of the row: the mean", "rank", True, 0),
    "skipped_tensors": Signal("tensors left out of a step for a non-finite gradient", "number", least=0),
    "nonfinite_weights": Signal("weights that are NaN or infinite", "number", least=0),
}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


AGGREGATES: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max, "mean": _mean}
"""Over the layers whose value is a number."""


def check_signal(name: str) -> Signal:
    """The catalogue's row for `signal`, `signal/min|max|mean` or `signal/layer`; ValueError with the nearest name."""
    base, _, part = name.partition("/")
    if base not in SIGNALS:
        close = get_close_matches(base, SIGNALS, n=1, cutoff=0.4)
        near = f"; nearest: {close[0]}" if close else ""
        raise ValueError(f"signal={name!r} is not known; allowed: {', '.join(SIGNALS)}{near}")
    if ("/" in name) and not (part and SIGNALS[base].of_layers):
        layered = ", ".join(key for key, signal in SIGNALS.items() if signal.of_layers)
        raise ValueError(
            f"signal={name!r}: '/' takes min, max, mean or a layer's name, and only of a signal of layers ({layered})"
        )
    return SIGNALS[base]


def read_signal(row: Mapping[str, Any], name: str) -> float | None:
    """The signal's value in a row; None where the row has none."""
    base, _, part = name.partition("/")
    if not part:
        value: float | None = row.get(base)
        return value
    layers = row.get("layers", {})
    if part not in AGGREGATES:
        own: float | None = layers.get(part, {}).get(base)
        return own
    values = [v[base] for v in layers.values() if v.get(base) is not None and not math.isnan(v[base])]
    return AGGREGATES[part](values) if values else None


def as_table() -> list[tuple[str, str, str, str]]:
    """Name, unit, level and meaning of every signal."""
    return [
        (name, signal.unit, "row and layers" if signal.of_layers else "row", signal.meaning)
        for name, signal in SIGNALS.items()
    ]
