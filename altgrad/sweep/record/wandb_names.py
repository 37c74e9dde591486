"""What a trial's record is called in Weights & Biases, and back: the two directions in one place.

A row's signal has a group before it (`train/loss`, `val/f1_micro`, `signals/stall_ratio`), a layer's signal stands at
`layers/<layer>/<signal>`, and the trial's step is a metric of its own. W&B's summary holds how the trial ended under
`outcome/`. Numbers come back as they were: W&B writes them with all their digits, and those that are not finite as the
words NaN, Infinity and -Infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from altgrad.sweep.record.ledger_schema import EVENTS, ROW_SIGNALS
from altgrad.training.catalogue import CLASSIFICATION_SCORES, SIGNALS
from altgrad.training.outcome import Outcome
from altgrad.training.record import flat

STEP = "trainer/step"
LAYERS = "layers/"
OUTCOME = "outcome/"
DATA, MANIFEST, PLACE = "data.sha256", "sweep.manifest", "sweep.place"
"""What a run's configuration says beside the trial's own: its data, what `sweep.json` says, its place in the sweep."""
MUTATIONS = "sweep/mutations"
"""In the summary of a population's member: what it took over, in the columns of the ledger's table behind the id."""
SIGNS = "sweep/signs"
"""In the summary of a run that has ended: when each rule of failure first held, as the ledger has it."""
SUMMARY = (OUTCOME, MUTATIONS, SIGNS)
"""How what the mirror itself puts into a summary begins; W&B adds every metric's last value."""
EVALUATED = ("perplexity", "bits_per_byte", "threshold", "eval_samples_per_s")
WORDS = ("formats", *EVENTS)
"""What a row says in words; all else in it are numbers."""
RARE = ("exact", "detail", "shadow")
"""Schedules of signals that many checks leave out; so do prospects, which the catalogue does not have."""
NUMBERS_OF_ENDING = ("value", "limit", "train_loss", "val_loss", "bits_per_byte", "seconds")
NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def metric_name(signal: str) -> str:
    """W&B's name of a row's signal: `train/loss`, `val/f1_micro`, `test/f1_micro`, `signals/stall_ratio`."""
    for split in ("train", "val"):
        if signal.startswith(f"{split}_"):
            return f"{split}/{signal.removeprefix(f'{split}_')}"
    if signal in (*CLASSIFICATION_SCORES, "baseline_f1_micro"):
        return f"test/{signal}"
    schedule = SIGNALS[signal].schedule if signal in SIGNALS else "step"
    if signal in EVALUATED or schedule == "evaluation":
        return f"val/{signal}"
    return f"{'train' if schedule in ('step', 'reference') else 'signals'}/{signal}"


def metrics_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `metrics.jsonl` under W&B's names."""
    found = {metric_name(name): value for name, value in row.items() if name not in ("step", "layers")}
    for layer, signals in row.get("layers", {}).items():
        found |= {f"{LAYERS}{layer}/{name}": value for name, value in signals.items()}
    return found | {STEP: row["step"]}


def frequent(metrics: Iterable[str]) -> list[str]:
    """The metrics of layers that are measured at every check, or nearly."""
    signals = {name: name.rpartition("/")[2] for name in metrics if name.startswith(LAYERS)}
    return [name for name, signal in signals.items() if signal in SIGNALS and SIGNALS[signal].schedule not in RARE]


class Signals:
    """Rows from metrics: the inverse of `metrics_of`. `unknown` are the names that it did not know, and left out."""

    def __init__(self) -> None:
        self._names = {metric_name(name): name for name in (*ROW_SIGNALS, *SIGNALS, *WORDS)}
        self.unknown: set[str] = set()

    def row(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The row of `metrics.jsonl`: without what W&B adds itself, which begins with an underscore, and without None,
        which a table of W&B's has where a step has no value."""
        row: dict[str, Any] = {"step": int(metrics[STEP])}
        for metric, value in flat(metrics).items():
            if value is None:
                continue
            if metric.startswith(LAYERS):
                layer, _, signal = metric.removeprefix(LAYERS).rpartition("/")
                row.setdefault("layers", {}).setdefault(layer, {})[signal] = number(value)
            elif (name := self._names.get(metric)) is not None:
                row[name] = value if name in WORDS else number(value)
            elif metric != STEP and not metric.startswith("_"):
                self.unknown.add(metric)
        return row


def number(value: Any) -> float:
    """As a float, from W&B's word for one that is not finite too."""
    return NONFINITE[value] if value in NONFINITE else float(value)


def summary_of(outcome: Outcome, known: Iterable[str]) -> dict[str, Any]:
    """What W&B's summary is told of an ending; what it does not have is emptied where it stands among `known`."""
    named = {f"{OUTCOME}{name}": value for name, value in outcome.to_dict().items()}
    return {name: value for name, value in named.items() if value not in (None, "") or name in known}


def outcome_of(summary: Mapping[str, Any]) -> Outcome | None:
    """The ending that a summary tells of, if it does; ValueError for a kind that there is not."""
    told = {field.name: summary.get(f"{OUTCOME}{field.name}") for field in fields(Outcome)}
    if told["kind"] is None:
        return None
    values = {name: number(v) if name in NUMBERS_OF_ENDING else v for name, v in told.items() if v is not None}
    return Outcome.from_dict(values)


def config_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mappings that `record.flat` made one of; ValueError where a name is that of a mapping and of a value."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *above, name = path.split(".")
        place = found
        for step in above:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path!r} is below a value, not a mapping")
        place[name] = value
    return found
