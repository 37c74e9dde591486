"""Why runs failed: the first sign of it, the direction of the step that it showed in, the kind of layer, the step.

`altgrad.sweep.signs` has the rules and what they are drawn from. Here they are put beside how runs ended: a loss that
is no number shows in the forward pass, a gradient that is none under a loss that is one in the backward pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from altgrad.sweep.signs import Direction, Moment, first_of

LAYER_KINDS: Mapping[str, re.Pattern[str]] = {
    "head": re.compile(r"(^|\.)(lm_head|score|classifier|head)$"),
    "embedding": re.compile(r"(^|\.)(wte|wpe|\w*emb\w*)(\.|$)"),
    "MLP down": re.compile(r"(mlp|ffn|feed_forward)\.(c_proj|down_proj|fc2|w2|lin2)$|(?<!attention)\.output\.dense$"),
    "MLP up": re.compile(r"(c_fc|up_proj|gate_proj|fc1|w1|w3|lin1|intermediate\.dense)$"),
    "attention out": re.compile(r"(c_proj|o_proj|out_proj|out_lin|attention\.output\.dense)$"),
    "attention in": re.compile(r"(c_attn|qkv\w*|[qkv]_proj|[qkv]_lin|query|key|value|in_proj\w*)$"),
}
"""By the names that GPT-2, Llama, BERT and DistilBERT give their layers; the first that matches counts."""
NOT_FINITE: Mapping[str, tuple[Direction, str]] = {
    "train_loss": ("forward", "a loss that is no number"),
    "grad_norm": ("backward", "gradients that are no numbers"),
    "nonfinite_weights": ("optimizer", "weights that are no numbers"),
    "skipped_tensors": ("backward", "gradients that are no numbers"),
}


def layer_kind(name: str) -> str:
    """The kind of layer that a name stands for; 'other' for one that no pattern knows, 'the loss' for no layer."""
    if not name:
        return "the loss"
    return next((kind for kind, pattern in LAYER_KINDS.items() if pattern.search(name)), "other")


@dataclass(frozen=True)
class Sign:
    """The first sign of one run; `limit` is NaN where the value is no number."""

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


def first_sign(trial: Mapping[Any, Any], moments: Iterable[Moment]) -> Sign | None:
    """The first sign of a trial that ended so (a row of `Records.trials`), by its rules' first moments."""
    found = first_of(moments)
    signal, step = trial["signal"], trial["step"]
    if trial["outcome"] == "nonfinite" and signal in NOT_FINITE and (found is None or step <= found.step):
        direction, meaning = NOT_FINITE[signal]
        return Sign(int(step), direction, signal, trial["layer"], float(trial["value"]), math.nan, meaning)
    if found is None:
        return None
    rule = found.rule
    return Sign(found.step, rule.direction, rule.signal, found.layer, found.value, rule.limit, rule.meaning)
