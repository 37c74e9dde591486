"""What a sweep recorded as frames for whoever goes on with pandas: one row per trial, per step, per layer.

from altgrad.analysis import load
found = load("runs/format_ablation")           # a sweep's folder, or an export of one
found.trials.groupby(["format", "optimizer"])["val_loss"].describe()
found.layer_signals("flip_yield", "stable_rank")
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from altgrad.analysis.layer_signals import layers_of
from altgrad.analysis.records import RESULT_COLUMNS, Records
from altgrad.analysis.records import load as load_records
from altgrad.analysis.sweeps import declared_axes
from altgrad.sweep.record import layout
from altgrad.sweep.record.folder import read_manifest
from altgrad.sweep.record.layout import LEDGER
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.reader import SPEND, reading
from altgrad.training.config import MODELS
from altgrad.training.outcome import Outcome
from altgrad.training.record import flat


class Frames:
    """The frames of the sweep, or the export, in a folder; each is read when it is first asked for.

    FileNotFoundError where the folder holds neither. All trials of the folder are here, also those of earlier sweeps
    and those that have not run yet.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / LEDGER).is_file() and not layout.shards(self.folder):
            raise FileNotFoundError(f"{self.folder} holds neither a sweep (no {LEDGER}) nor an export of one")

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row per trial: RESULT_COLUMNS and a column per axis, as in results.csv.

        `state` is finished, failed (both are results) or unresolved; `step` is the last one trained, `steps` how many
        were asked for. Losses are in nats per token (per label in a classification), `perplexity` is exp(val_loss),
        `seconds` the wall time of all attempts; `flip_yield` to `eval_samples_per_s` are the last values measured.
        NaN: not measured, or no number.
        """
        return results_table(self._records.trials, declared_axes(read_manifest(self.folder)))

    @property
    def rows(self) -> pd.DataFrame:
        """A row per trial and step (trial_id, step, every signal of the catalogue), up to the steps asked for."""
        return self._records.rows

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """How each trial that ended ended: trial_id and the fields of `Outcome`, as recorded."""
        with Ledger.reading(self.folder / LEDGER) as ledger:
            found = ledger.outcomes()
            order = [name for name in ledger.trials() if name in found]
        columns = ["trial_id", *(field.name for field in fields(Outcome))]
        return pd.DataFrame([{"trial_id": name} | found[name].to_dict() for name in order], columns=columns)

    @cached_property
    def spend(self) -> pd.DataFrame:
        """A row per run of a driver: started (Unix time), hours of wall time, GPU-hours, dollars."""
        with reading(self.folder) as ledger:
            found = pd.DataFrame(ledger.spend(), columns=list(SPEND))
        return found

    @cached_property
    def layers(self) -> pd.DataFrame:
        """A row per trial, step, layer and signal: trial_id, step, layer, signal, value.

        Tens of thousands a trial: `layer_signals` reads a few of them. An export has those of check points.
        """
        return self._layers(None)

    def layer_signals(self, *signals: str) -> pd.DataFrame:
        """A row per trial, step and layer, a column per signal; NaN where one was not measured."""
        found = self._layers(signals)
        index = ["trial_id", "step", "layer"]
        wide: pd.DataFrame = found.pivot(index=index, columns="signal", values="value").reset_index()
        wide.columns.name = None
        return wide.reindex(columns=[*index, *signals])

    @cached_property
    def _records(self) -> Records:
        return load_records(self.folder)

    def _layers(self, signals: Collection[str] | None) -> pd.DataFrame:
        with Ledger.reading(self.folder / LEDGER) as ledger:
            names = list(ledger.trials())
        frame: pd.DataFrame = layers_of(self.folder, names, signals).to_pandas()
        return frame


def results_table(trials: pd.DataFrame, axes: Collection[str] = ()) -> pd.DataFrame:
    """A row per trial: RESULT_COLUMNS, then a column per axis.

    An axis is what differs between trials of one arm, under its dotted path, or is named by one of `axes`, a sweep's.
    """
    table = trials.reindex(columns=list(RESULT_COLUMNS))
    return table if trials.empty else table.join(_axis_columns(trials, axes))


def _axis_columns(trials: pd.DataFrame, axes: Collection[str]) -> pd.DataFrame:
    # One configuration stands for all that differ in format and seed alone.
    groups = trials.groupby(["setting", "options", "policy"], sort=False)
    firsts = groups[["optimizer", "config"]].first()
    found = [flat(json.loads(config)) for config in firsts["config"]]
    values = pd.DataFrame([{name: _cell(value) for name, value in item.items()} for item in found], index=firsts.index)
    # An arm's own field, as in lion.beta2, is one of the optimizer's.
    wanted = {path if path in values else f"optimizer.{path.rpartition('.')[2]}" for path in axes}
    differs = values.groupby(firsts["optimizer"].to_numpy()).nunique(dropna=False).max() > 1
    shared = values.columns[~values.columns.str.startswith("optimizer.")]
    differs |= (values[shared].nunique(dropna=False) > 1).reindex(values.columns, fill_value=False)
    kept = [
        name
        for name in values.columns
        if name.partition(".")[0] not in _NO_AXES and name not in _COLUMNS_OF and (differs[name] or name in wanted)
    ]
    columns = values[kept]
    if "model" in axes:
        columns = columns.assign(model=[_model_name(json.loads(config)["model"]) for config in firsts["config"]])
    place = groups.ngroup().to_numpy()
    return columns.iloc[place].set_index(trials.index)


_NO_AXES = {"guards", "observe", "log_interval", "eval_interval", "checkpoint_interval", "steps"}
"""Fields that can't change what is measured, or have a column."""
_COLUMNS_OF = {"task", "format", "policy", "seed", "optimizer.kind", "optimizer.lr", "optimizer.rung_clip"}


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def _model_name(model: Mapping[str, Any]) -> str:
    named = (name for name, config in MODELS.items() if config.model_dump(mode="json") == model)
    return next(named, f"{model['layers']}x{model['width']}")
