"""Signals of layers, read from a sweep or an export of one, and by the kind of layer: what a report says of layers it
says of kinds (embedding, attention in and out, MLP up and down, head), so that models of any depth compare.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from altgrad.sweep.record import layout
from altgrad.sweep.record.layer_table import read_layers
from altgrad.sweep.record.shards import OF_LAYERS, Export

LAYER_KINDS: Mapping[str, re.Pattern[str]] = {
    "head": re.compile(r"(^|\.)(lm_head|score|classifier|head)$"),
    "embedding": re.compile(r"(^|\.)(wte|wpe|\w*emb\w*)(\.|$)"),
    "MLP down": re.compile(r"(mlp|ffn|feed_forward)\.(c_proj|down_proj|fc2|w2|lin2)$|(?<!attention)\.output\.dense$"),
    "MLP up": re.compile(r"(c_fc|up_proj|gate_proj|fc1|w1|w3|lin1|intermediate\.dense)$"),
    "attention out": re.compile(r"(c_proj|o_proj|out_proj|out_lin|attention\.output\.dense)$"),
    "attention in": re.compile(r"(c_attn|qkv\w*|[qkv]_proj|[qkv]_lin|query|key|value|in_proj\w*)$"),
}
"""By the names that GPT-2, Llama, BERT and DistilBERT give their layers; the first that matches counts."""
KINDS = ("embedding", "attention in", "attention out", "MLP up", "MLP down", "head", "other")
"""In the order of a forward pass."""


def layer_kind(name: str) -> str:
    """The kind of layer that a name stands for; 'other' for one that no pattern knows, 'the loss' for no layer."""
    if not name:
        return "the loss"
    return next((kind for kind, pattern in LAYER_KINDS.items() if pattern.search(name)), "other")


def layers_of(folder: Path, trial_ids: Collection[str], signals: Collection[str] | None = None) -> pa.Table:
    """Signals of layers of these trials of a sweep, or of an export: OF_LAYERS, all signals or those asked for."""
    if layout.shards(folder):
        table = Export(folder).layers(signals)
        return table.filter(pc.is_in(table["trial_id"], pa.array(list(trial_ids), pa.string())))
    parts = {name: read_layers(folder / "trials" / name, signals) for name in trial_ids}
    owners = [pa.array([name] * len(part), pa.string()) for name, part in parts.items()]
    named = [part.add_column(0, "trial_id", own) for own, part in zip(owners, parts.values(), strict=True)]
    return pa.concat_tables([OF_LAYERS.empty_table(), *named])


def signals_by_kind(folder: Path, steps: Mapping[str, int], signals: Collection[str]) -> pd.DataFrame:
    """Means over the layers of each kind: trial_id, signal, kind, step, value; up to the `steps` asked of each trial.

    `folder`: a sweep's or an export's. Layers without a number are left out of a mean.
    """
    found: pd.DataFrame = layers_of(folder, list(steps), signals).to_pandas(strings_to_categorical=True)
    found = found[found["step"].to_numpy() <= found["trial_id"].map(steps).to_numpy(dtype=float)]
    kinds = {name: layer_kind(name) for name in found["layer"].cat.categories}
    found = found.assign(kind=found["layer"].map(kinds).astype(str))
    keys = ["trial_id", "signal", "kind", "step"]
    means: pd.DataFrame = found.groupby(keys, observed=True, sort=False)["value"].mean().reset_index()
    return means.astype({"trial_id": str, "signal": str})
