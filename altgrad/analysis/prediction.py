"""What a reference run says of every format before anything is trained in it, and how right that was.

BF16 AdamW runs are looked at for what each 8-bit format would make of their tensors and steps
(`training.observers.prospects`). A cell is predicted to fail where that is already beyond what healthy runs show: the
limits are those of `sweep.signs`, of the roles that its policy rounds, and one of its own. An arm that rounds to
nearest is predicted to fail where one step at the full rate moves fewer than MOVED of the weights: flip yield itself
says too little, for the weights that still move are those that soon stop to. Formats of an arm are expected in the
order of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from scipy.stats import spearmanr

from altgrad.analysis.cells import Cell, format_order, is_narrow
from altgrad.analysis.study import Study
from altgrad.analysis.tables import DASH, Table, excess_text, links, number, slim, verdict_text
from altgrad.analysis.wording import signed
from altgrad.quantization import FORMATS, PrecisionPolicy, ScaleRule
from altgrad.sweep.record.signs import RULES, Rule
from altgrad.training.arm_configs import ARMS, AnyOptimizerConfig
from altgrad.training.config import TrainConfig

ROLES = ("weight", "activation", "gradient")
SIGNALS = (*(f"{role}_{what}" for role in ROLES for what in ("sqnr", "underflow")), "flip_yield", "flip_rate")
MOVED = Rule("flip_rate", "optimizer", "below", 0.15, "steps that rounding swallows")
"""Drawn from 300 steps of a 2 × 64 GPT with AdamW to nearest: where a step would move a fifth of the weights (E4M3) it
ended 9 % above BF16, where a tenth (E5M2) 23 %, and below (E6M1, E7M0) it stalled. Look at other models for a test.
"""
LEAST_RANKED = 4
"""Formats of one arm and policy from which their order is compared."""

Prospects = Mapping[str, Mapping[str, float]]
"""Format to signal (one of SIGNALS) to its mean over layers and runs."""


@dataclass(frozen=True)
class Prediction:
    """Of a format, arm and policy: whether it fails, and the signal that is nearest to its limit or furthest beyond it.

    `score` orders formats, the best first: the share of weights that a step moves in an arm that rounds to nearest,
    else the least signal to noise of the roles that are rounded, dB.
    """

    word: str
    """trains | fails"""
    signal: str
    value: float
    score: float


def prospects_of(by_layer: pd.DataFrame) -> Prospects:
    """From signals of layers named like weight_sqnr@E4M3 (columns step, signal, value), of the last look."""
    own = by_layer[by_layer["signal"].isin({f"{signal}@{name}" for signal in SIGNALS for name in FORMATS})]
    last = own[own["step"] == own["step"].max()]
    found: dict[str, dict[str, float]] = {}
    for name, value in last.groupby("signal")["value"].mean().items():
        signal, _, fmt = str(name).partition("@")
        found.setdefault(fmt, {})[signal] = float(value)
    return dict(sorted(found.items(), key=lambda item: format_order(item[0])))


def predict(
    prospects: Prospects, format: str, precision: PrecisionPolicy, optimizer: AnyOptimizerConfig
) -> Prediction | None:
    """The prediction for a cell; None where the reference was not looked at for one of its formats, or for its scales:
    what is looked at is a tensor's current largest magnitude."""
    rule = precision.resolve("")
    known = {role: getattr(rule, role) for role in ROLES if rule is not None and getattr(rule, role) is not None}
    if any(role.scale != ScaleRule() for role in known.values()):
        return None
    roles = {name: role.format for name, role in known.items()}
    asked = [(name, f"{role}_{what}") for role, name in roles.items() for what in ("sqnr", "underflow")]
    if getattr(optimizer, "rounding", None) == "nearest":
        asked.append((format, MOVED.signal))
    asked = [(name, signal) for name, signal in asked if is_narrow(name)]
    if any(name not in prospects for name, _ in asked):
        return None
    distances = []
    for name, signal in asked:
        value = prospects[name].get(signal, math.nan)
        limit = MOVED if signal == MOVED.signal else RULES[signal]
        sign = 1 if limit.test == "below" else -1
        if math.isfinite(value):
            distances.append((sign * (value - limit.limit) / limit.limit, signal, value))
    if not distances:
        return None
    distance, signal, value = min(distances)
    values = {signal: value for _, signal, value in distances}
    noise = min((value for name, value in values.items() if name.endswith("sqnr")), default=math.nan)
    return Prediction("fails" if distance < 0 else "trains", signal, value, values.get(MOVED.signal, noise))


def prospects_table(prospects: Prospects) -> Table:
    """A line per format: what it would keep of weights, activations and gradients, and of steps to nearest."""
    columns = (
        "format",
        *(f"{role}s, dB" for role in ROLES),
        *(f"{role}s to 0" for role in ROLES),
        "flip yield to nearest",
        "weights moved a step",
    )
    lines = [
        (
            name,
            *(number(own.get(f"{role}_sqnr", math.nan), ".1f") for role in ROLES),
            *(_share_text(own.get(f"{role}_underflow", math.nan)) for role in ROLES),
            number(own.get("flip_yield", math.nan), ".2f"),
            _share_text(own.get("flip_rate", math.nan)),
        )
        for name, own in prospects.items()
    ]
    return Table(columns, lines, frozenset(range(1, len(columns))))


def _share_text(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.1f} %"


def planned(prospects: Prospects, trials: Iterable[TrainConfig]) -> list[str]:
    """What is predicted to fail of the cells that a plan holds, a line per arm and policy."""
    cells = {
        (config.arm, config.recipe_name, config.format): config.precision
        for config in trials
        if is_narrow(config.format)
    }
    optimizers = {config.arm: config.optimizer for config in trials}
    groups: dict[tuple[str, str], list[str]] = {}
    for (arm, policy, name), precision in cells.items():
        found = predict(prospects, name, precision, optimizers[arm])
        own = groups.setdefault((arm, policy), [])
        if found is not None and found.word == "fails":
            own.append(f"{name} ({found.signal} {found.value:.3g})")
    lines = [
        f"predicted to fail, {arm} under {policy}: {', '.join(own)}" for (arm, policy), own in groups.items() if own
    ]
    return lines or ["no format is predicted to fail"] if groups else []


@dataclass(frozen=True)
class Judged:
    """A cell's prediction beside its verdict."""

    cell: Cell
    prediction: Prediction


def judged(study: Study, prospects: Prospects) -> list[Judged]:
    """The 8-bit cells that can be predicted and have a result."""
    found = []
    for cell in study.cells:
        optimizer = ARMS.get(cell.family)
        if not (cell.is_judged and cell.has_result and optimizer is not None):
            continue
        if (prediction := predict(prospects, cell.format, cell.precision, optimizer)) is not None:
            found.append(Judged(cell, prediction))
    return found


def prediction_table(study: Study, found: Sequence[Judged]) -> Table:
    """What was predicted of each cell and what came of it."""
    columns = ("format", "arm", "policy", "predicted", "by", "value", "score", "excess over BF16", "verdict", "right")
    lines = []
    for item in found:
        verdict = study.verdicts.get(item.cell.key)
        word = verdict_text(study, item.cell, verdict)
        is_decided = word in ("trains", "fails")
        lines.append(
            (
                item.cell.format,
                item.cell.arm,
                item.cell.policy,
                item.prediction.word,
                item.prediction.signal,
                number(item.prediction.value, ".3g"),
                number(item.prediction.score, ".3g"),
                DASH if verdict is None else excess_text(verdict),
                word,
                DASH if not is_decided else "yes" if word == item.prediction.word else "no",
            )
        )
    cells = [item.cell for item in found]
    return slim(Table(columns, lines, frozenset({5, 6, 7}), "format", links(cells)), ("policy",))


def accuracy_texts(study: Study, found: Sequence[Judged]) -> list[str]:
    """How often the prediction was right where the sweep decided, and whether formats came in the order expected."""
    decided = [(item, study.verdicts[item.cell.key].word) for item in found if item.cell.key in study.verdicts]
    decided = [(item, word) for item, word in decided if word in ("trains", "fails")]
    texts = []
    if decided:
        right = sum(item.prediction.word == word for item, word in decided)
        fails = sum(word == "fails" for _, word in decided)
        caught = sum(item.prediction.word == word == "fails" for item, word in decided)
        texts.append(
            f"Right in {right} of {len(decided)} decided cells; of {fails} that fail {caught} were predicted to, and "
            f"{len(decided) - fails} train."
        )
    ranks = _rank_texts(study, found)
    if ranks:
        texts.append(
            f"Order of formats (Spearman's rank correlation of score and loss, 1 is perfect): {'; '.join(ranks)}."
        )
    return texts


def _rank_texts(study: Study, found: Sequence[Judged]) -> list[str]:
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for item in found:
        verdict = study.verdicts.get(item.cell.key)
        if verdict is not None and math.isfinite(verdict.excess):
            pair = (item.prediction.score, -verdict.excess)
            groups.setdefault((item.cell.arm, item.cell.policy), []).append(pair)
    texts = []
    for (arm, policy), pairs in groups.items():
        if len(pairs) >= LEAST_RANKED:
            scores, ends = zip(*pairs, strict=True)
            rank = float(spearmanr(scores, ends).statistic)
            texts.append(f"{arm} under {policy} {signed(rank)} of {len(pairs)} formats")
    return texts
