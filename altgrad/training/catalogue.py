"""Every signal by name: what it means, its unit, when it is measured, and what it can be at all.

One place, so that documents, guards and their errors say the same. A signal of layers has a value for every layer
and one for the row, over all of them (its `row` rule); `flip_yield/min` is the least over the layers (min, max or
mean), `flip_yield/lm_head` that of one layer.

| schedule | measured |
| --- | --- |
| step | at every step |
| check | over, or at the last step of, every log interval |
| exact | at the first check and every `observe.exact_ranks_every`-th after it |
| detail | at the first check and every `observe.detail_every`-th after it |
| shadow | at the checks that `observe.shadow_every` names; off unless asked for |
| reference | at every step or check for which the run was given a reference's curve |
| evaluation | at every evaluation |

A signal that is not measured at a check keeps the guards' counts as they are.

Layers of reference runs also have values under names like weight_sqnr@E4M3: what another format would make of them
(`observers.prospects`). They are not of the run itself, and no guard may test them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from altgrad.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor  # which a ledger is read without

Schedule = Literal["step", "check", "exact", "detail", "shadow", "reference", "evaluation"]
RowRule = Literal["sum", "mean", "max", "own"]

CLASSIFICATION_SCORES = (
    "f1_micro",
    "f1_macro",
    "precision",
    "recall",
    "subset_accuracy",
    "hamming_loss",
    "roc_auc_micro",
    "pr_auc_micro",
)
CLASSIFICATION_SIGNALS = (
    *CLASSIFICATION_SCORES,
    "val_f1_micro",
    "threshold",
    "baseline_f1_micro",
    "samples_per_s",
    "eval_samples_per_s",
)
"""What a classification's rows hold beside the signals of every task."""


@dataclass(frozen=True)
class Signal:
    """A row of the catalogue; the value lies within [`least`, `most`] unless it is not finite.

    `row`: how a row's value comes from its layers' ("own": it is measured over all layers together); None for a
    signal that layers don't have. `of_weight` measures it on a layer's weight matrix, a 0-d tensor, without waiting
    for a device; signals without one have an observer that does (`observers`).
    """

    meaning: str
    unit: str
    schedule: Schedule = "check"
    row: RowRule | None = None
    least: float = -math.inf
    most: float = math.inf
    of_weight: Callable[[Tensor], Tensor] | None = None

    @property
    def of_layers(self) -> bool:
        """Whether every layer has a value."""
        return self.row is not None


def _of_roles() -> Iterator[tuple[str, Signal]]:
    for role in ("weight", "activation", "gradient"):
        of = (
            f"of the {role}s that a layer multiplies by"
            if role != "gradient"
            else "of the gradients at a layer's output"
        )
        yield f"{role}_amax", Signal(f"largest magnitude {of}", "the tensor's", "check", "max", 0)
        yield (
            f"{role}_amax_mean",
            Signal(f"moving average of {role}_amax over 100 steps", "the tensor's", "check", "max", 0),
        )
        yield (f"{role}_amax_jump", Signal(f"{role}_amax over its moving average before", "ratio", "check", "max", 0))
        yield (
            f"{role}_overflow",
            Signal(f"elements {of} that would round beyond the format's largest value", "share", "check", "max", 0, 1),
        )
        yield (
            f"{role}_underflow",
            Signal(f"elements {of}, not 0, that round to a zero", "share", "detail", "max", 0, 1),
        )
        yield (
            f"{role}_saturation",
            Signal(f"elements {of} at the format's largest magnitude", "share", "detail", "max", 0, 1),
        )
        yield f"{role}_sqnr", Signal(f"signal to quantization noise {of}", "dB", "detail", "mean")


SIGNALS: Registry[Signal] = Registry(
    {
        "train_loss": Signal("loss of the step's batch, before the step", "nats", "step", least=0),
        "val_loss": Signal("loss on validation batches", "nats", "evaluation", least=0),
        "loss_excess": Signal("training loss minus that of the first step", "nats", "step"),
        "loss_gap": Signal("training loss minus the reference's on the same batch", "nats", "reference"),
        "grad_norm": Signal("L2 norm of the whole gradient, before clipping", "loss per weight", "step", least=0),
        "grad_norm_z": Signal(
            "grad_norm's distance from its moving mean in moving standard deviations (decay .97)", "ratio", "step"
        ),
        "flips": Signal("weights whose integer code changed", "number", row="own", least=0),
        "updates": Signal("weights to which a non-zero change was applied", "number", row="own", least=0),
        "gradient_updates": Signal("weights with |gradient| > 1e-10", "number", row="own", least=0),
        "ulp_travel": Signal("sum of |code change|", "codes", row="own", least=0),
        "bit_position": Signal("sum of signed code changes", "codes", row="own"),
        "flip_rate": Signal("flips per weight and step", "share", "check", "own", 0, 1),
        "flip_rate_per_epoch": Signal(
            "flips per weight in as many steps as a pass over the training data takes", "number", row="own", least=0
        ),
        "stall_ratio": Signal("1 - flips / updates; 0 with no updates", "share", "check", "own", 0, 1),
        "flip_yield": Signal(
            "flips / sum of min(1, |change| / spacing): realised over expected under unbiased rounding",
            "ratio",
            row="own",
            least=0,
        ),
        "zero_updates": Signal("weights to which a step applied no change", "share", "check", "own", 0, 1),
        "frozen": Signal("layers with a gradient to which nothing was applied", "number", row="sum", least=0),
        "overflow": Signal("weights that wanted to leave the grid", "number", row="own", least=0),
        "quantized_share": Signal(
            "parameters that a format rounds in matrix products and convolutions, over all of the model's",
            "share",
            least=0,
            most=1,
        ),
        "skipped_tensors": Signal("tensors left out of a step for a non-finite gradient", "number", least=0),
        "nonfinite_weights": Signal("weights that are NaN or infinite", "number", least=0),
        "stable_rank": Signal("squared Frobenius norm over squared spectral norm", "rank", row="mean", least=0),
        "spectral_norm": Signal("largest singular value of the weight", "the weight's", row="max", least=0),
        "rank_drop": Signal("stable rank lost since the first check", "share", row="max", most=1),
        "critical_rank_drop": Signal(
            "rank_drop of the head and of the layers that write into the residual stream", "share", row="max", most=1
        ),
        "rank_ratio": Signal("stable rank over the reference's at the same step", "ratio", "reference", "mean", 0),
        "spread": Signal(
            "share of the weight's energy outside its first direction: 1 - 1 / stable_rank",
            "share",
            "check",
            "mean",
            0,
            1,
        ),
        "spread_ratio": Signal("spread over the reference's at the same step", "ratio", "reference", "mean", 0),
        "spectral_ratio": Signal("spectral norm over the reference's at the same step", "ratio", "reference", "max", 0),
        "effective_rank": Signal("exp of the entropy of s / sum s over singular values s", "rank", "exact", "mean", 0),
        "variance_rank": Signal(
            "fewest directions that hold 99 % of the squared Frobenius norm", "rank", "exact", "mean", 0
        ),
        "grad_l2": Signal("L2 norm of the weight's gradient, before clipping", "loss per weight", row="max", least=0),
        "grad_linf": Signal("largest magnitude of the weight's gradient", "loss per weight", row="max", least=0),
        "grad_snr": Signal("|mean| over standard deviation of the gradient's elements", "ratio", row="mean", least=0),
        "grad_zero": Signal("elements of the gradient that are 0", "share", "check", "mean", 0, 1),
        "dead_units": Signal(
            "output units whose gradients stayed below 1e-8 for 100 steps", "share", "check", "mean", 0, 1
        ),
        "update_ratio": Signal("RMS of the step's change over RMS of the weight", "ratio", row="mean", least=0),
        **dict(_of_roles()),
        "activation_kurtosis": Signal(
            "fourth standardized moment of a layer's input; 3 for a normal one", "ratio", "detail", "max", 1
        ),
        "attention_logit_max": Signal(
            "largest query-key product over the root of the head's width", "logits", "detail", "max"
        ),
        "stiffness": Signal("mean log2 of the format's spacing at the weights", "binades", "detail", "mean"),
        "grid_distance": Signal("mean distance of the weights to the nearest grid point", "ULP", "detail", "mean", 0),
        "on_grid": Signal("weights that lie on the grid", "share", "detail", "mean", 0, 1),
        "codes_in_use": Signal(
            "distinct codes among the weights, of the format's finite values", "share", "detail", "mean", 0, 1
        ),
        "stiffness_correlation": Signal(
            "Pearson correlation of log |gradient| with log spacing", "-1 to 1", "detail", "mean", -1, 1
        ),
        "ulp_travel_max": Signal("largest |code change| of the step", "codes", "detail", "max", 0),
        "gradient_cosine": Signal(
            "cosine of the gradient with that of the float32 shadow", "-1 to 1", "shadow", "own", -1, 1
        ),
        "gradient_shadow_snr": Signal("shadow's gradient over its difference from ours", "dB", "shadow", "own"),
    }
)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


AGGREGATES: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max, "mean": _mean, "sum": sum}
"""Over the layers whose value is a number; a rule on a signal takes min, max or mean."""


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
    values = _numbers(layers, base)
    return AGGREGATES[part](values) if values else None


def over_layers(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The row's values of all signals that come from their layers'; NaN where no layer's is a number."""
    measured = {name for values in layers.values() for name in values if name in SIGNALS}
    row = {}
    for name in sorted(measured):
        rule = SIGNALS[name].row
        if rule is not None and rule != "own":
            values = _numbers(layers, name)
            row[name] = AGGREGATES[rule](values) if values else math.nan
    return row


def _numbers(layers: Mapping[str, Mapping[str, Any]], name: str) -> list[float]:
    return [v[name] for v in layers.values() if v.get(name) is not None and not math.isnan(v[name])]


def as_table() -> list[tuple[str, str, str, str, str]]:
    """Name, unit, level, schedule and meaning of every signal."""
    return [
        (name, signal.unit, "row and layers" if signal.of_layers else "row", signal.schedule, signal.meaning)
        for name, signal in SIGNALS.items()
    ]
