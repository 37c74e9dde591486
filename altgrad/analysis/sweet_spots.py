"""Which format each kind of layer takes best: by what its tensors lose in it, and by what a recipe that leaves the kind
in BF16 gives back.

Signals are compared between formats over the same seeds; the formats named are those that no other is shown to beat
(`inference.best_set`), so that a single name is a decision. A role counts where the policy rounds it to the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from altgrad.analysis import contrasts
from altgrad.analysis.cells import MAIN_POLICY, Cell, format_order
from altgrad.analysis.contrasts import Contrast, table
from altgrad.analysis.figures import drawn
from altgrad.analysis.inference import best_set
from altgrad.analysis.layer_signals import KINDS, layer_kind
from altgrad.analysis.palette import INK, MARK
from altgrad.analysis.study import Study
from altgrad.analysis.tables import DASH, Table, effect_text, slim
from altgrad.analysis.twins import twin_map
from altgrad.analysis.wording import listed
from altgrad.quantization import POLICIES, named_policy, own_format

LAYERS = tuple(
    f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head")
)
"""One of each kind that policies tell apart."""


@dataclass(frozen=True)
class Question:
    """What is asked of every kind of layer: a signal of which more is better, of cells whose `role` has the format, of
    the first of these `arms` that was run."""

    signal: str
    role: str
    title: str
    unit: str
    arms: tuple[str, ...]


QUESTIONS = (
    Question("weight_sqnr", "weight", "weights kept", "dB", ("adamw", "adamw_sr", "adamw_nearest")),
    Question("activation_sqnr", "activation", "activations kept", "dB", ("adamw", "adamw_sr", "adamw_nearest")),
    Question("gradient_sqnr", "gradient", "gradients kept", "dB", ("adamw", "adamw_sr", "adamw_nearest")),
    Question("flip_yield", "weight", "steps that arrive, to nearest", "", ("adamw_nearest",)),
)
ROLES = ("activation", "gradient")
"""Roles that `uniform` leaves in BF16."""
NOISE = 1e-6
"""Of a signal's size: differences below it are float32's."""
SIGNALS = tuple(dict.fromkeys(question.signal for question in QUESTIONS))


@dataclass(frozen=True)
class Spot:
    """What one kind of layer answers: `means` by format, and those that no other is shown to beat."""

    kind: str
    means: dict[str, float]
    best: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """A question's spots by kind, of one arm and policy."""

    question: Question
    arm: str
    policy: str
    spots: tuple[Spot, ...]


def answers(study: Study, trials: pd.DataFrame, by_kind: pd.DataFrame) -> list[Answer]:
    """What can be answered from signals by kind (`layer_signals.signals_by_kind`) of the cells' trials."""
    last = by_kind.sort_values("step").groupby(["trial_id", "signal", "kind"])["value"].last()
    seeds = trials.set_index("trial_id")["seed"]
    found = []
    for question in QUESTIONS:
        cells = _asked(study, question)
        if len(cells) < 2:
            continue
        spots = [_spot(kind, question, cells, last, seeds, twin_map(study.cells)) for kind in KINDS]
        told = tuple(spot for spot in spots if len(spot.means) > 1)
        if told:
            found.append(Answer(question, cells[0].arm, cells[0].policy, told))
    return found


def _asked(study: Study, question: Question) -> list[Cell]:
    """The 8-bit cells of one arm and policy in which the role has the format; the arm and policy that have most."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in study.cells:
        if cell.is_judged and cell.arm in question.arms and role_format(cell, question.role) == cell.format:
            groups.setdefault((cell.arm, cell.policy), []).append(cell)
    order = {arm: place for place, arm in enumerate(question.arms)}
    return max(
        groups.values(), key=lambda own: (len(own), -order[own[0].arm], own[0].policy == MAIN_POLICY), default=[]
    )


def role_format(cell: Cell, role: str) -> str | None:
    """The format that the cell's policy gives to this role where it names one for every layer."""
    rule = cell.precision.resolve("")
    found = None if rule is None else getattr(rule, role)
    return None if found is None else str(found.format)


def _spot(
    kind: str, question: Question, cells: Sequence[Cell], last: pd.Series, seeds: pd.Series, twins: dict[str, str]
) -> Spot:
    columns: dict[str, dict[int, float]] = {}
    for cell in cells:
        keys = [(name, question.signal, kind) for name in cell.trial_ids]
        values = {int(seeds[key[0]]): float(last[key]) for key in keys if key in last.index}
        known = {seed: value for seed, value in values.items() if np.isfinite(value)}
        if known:
            columns[cell.format] = known
    means = {name: float(np.mean(list(values.values()))) for name, values in columns.items()}
    leaders = [name for name in columns if twins.get(name, name) == name or twins[name] not in columns]
    if len(leaders) < 2:
        return Spot(kind, means, tuple(leaders))
    floor = NOISE * max(abs(mean) for mean in means.values())
    sides, own = table([columns[name] for name in leaders]), np.eye(len(leaders))
    stays = best_set(sides, own, floors=np.full(len(leaders), floor))
    best = [name for name, is_in in zip(leaders, stays, strict=True) if is_in]
    return Spot(kind, means, tuple(sorted(best, key=lambda name: -means[name])))


def spots_table(found: Sequence[Answer], twins: dict[str, str]) -> Table:
    """Of every kind of layer the formats that may be best by each question, the best first."""
    columns = ["layer type", *(answer.question.title for answer in found)]
    told = {answer.question: {spot.kind: spot for spot in answer.spots} for answer in found}
    kinds = [kind for kind in KINDS if any(kind in spots for spots in told.values())]
    lines = [
        (kind, *(_spot_text(answer, told[answer.question].get(kind), twins) for answer in found)) for kind in kinds
    ]
    return Table(columns, lines)


def _spot_text(answer: Answer, spot: Spot | None, twins: dict[str, str]) -> str:
    if spot is None:
        return DASH
    names = [f"{_with_twins(name, spot, twins)} {_value_text(answer.question, spot.means[name])}" for name in spot.best]
    return names[0] if len(names) == 1 else f"not decided: {listed(names[:4], 'or')}"


def _with_twins(name: str, spot: Spot, twins: dict[str, str]) -> str:
    same = [other for other in spot.means if other != name and twins.get(other) == twins.get(name, name)]
    return " = ".join(sorted([name, *same], key=format_order))


def _value_text(question: Question, value: float) -> str:
    return f"({value:.1f} {question.unit})" if question.unit else f"({value:.2f})"


def reliefs(study: Study) -> list[Contrast]:
    """What each recipe gives back against the same format in all layers, by format, arm and recipe."""
    return contrasts.measured(
        contrasts.reliefs(study.cells), twin_map(study.cells), study.reference, sound=study.is_sound
    )


def relief_table(found: Sequence[Contrast], unit: str) -> Table:
    """A line per format and arm, a column per recipe: the loss under `uniform` minus that under the recipe."""
    policies = list(dict.fromkeys(item.cell.policy for item in found))
    by_cell: dict[tuple[str, str], dict[str, Contrast]] = {}
    for item in found:
        by_cell.setdefault((item.cell.format, item.cell.arm), {})[item.cell.policy] = item
    lines = []
    for (name, arm), own in by_cell.items():
        decided = [item for item in own.values() if item.decided]
        worst = max(decided, key=lambda item: item.mean, default=None)
        text = DASH if worst is None or worst.mean < 0 else recipe_text(worst.cell)
        lines.append((name, arm, *(effect_text(own.get(policy)) for policy in policies), text))
    heads = [f"{recipe_text(next(i.cell for i in found if i.cell.policy == policy))}, {unit}" for policy in policies]
    numeric = frozenset(range(2, 2 + len(policies)))
    return slim(Table(["format", "arm", *heads, "gives back most (decided)"], lines, numeric), ("arm",))


def recipe_text(cell: Cell) -> str:
    """What tells the cell's policy from `uniform`, in words."""
    own, plain = cell.precision, named_policy(MAIN_POLICY, cell.format)
    kept: list[str] = []
    roles: dict[str, None] = {}
    for name in LAYERS:
        rule, usual = own.resolve(name), plain.resolve(name)
        if rule is None or rule.weight is None:
            kept.append(layer_kind(name))
        else:
            roles |= dict.fromkeys(role for role in ROLES if getattr(rule, role) != getattr(usual, role))
    if cell.policy not in POLICIES or own_format(cell.policy) is not None:
        return cell.policy  # which says what it changes
    parts = [f"{listed(_shortened(kept))} in BF16"] if kept else []
    parts += [f"{listed(f'{role}s' for role in roles)} in 8 bits too"] if roles else []
    return f"{cell.policy}: {', '.join(parts)}" if parts else cell.policy


def _shortened(kinds: Iterable[str]) -> list[str]:
    """'attention' for both of its kinds, 'MLP' likewise."""
    found = list(kinds)
    for whole in ("attention", "MLP"):
        own = [kind for kind in found if kind.startswith(whole)]
        if len(own) == 2:
            found = [whole if kind == own[0] else kind for kind in found if kind != own[1]]
    return found


def spots_picture(found: Sequence[Answer], twins: Mapping[str, str], path: Path) -> bool:
    """Every kind of layer by every format, a panel per question; what may be best is framed. False without answers."""
    if not found:
        return False
    kinds = [kind for kind in KINDS if any(spot.kind == kind for answer in found for spot in answer.spots)]
    names = sorted({name for answer in found for spot in answer.spots for name in spot.means}, key=format_order)
    rows = -(-len(found) // 2)
    with drawn(path, (0.75 + 0.34 * len(kinds)) * rows) as figure:
        grid = figure.subplots(rows, min(2, len(found)), squeeze=False)
        for axes, answer in zip(grid.flat, found, strict=False):
            _draw_answer(axes, answer, twins, kinds, names)
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
    return True


def _draw_answer(
    axes: Axes, answer: Answer, twins: Mapping[str, str], kinds: Sequence[str], names: Sequence[str]
) -> None:
    """A field per kind and format, the darker the better; those that may be best are framed."""
    values = [value for spot in answer.spots for value in spot.means.values() if math.isfinite(value)]
    low, high = min(values), max(values)
    for spot in answer.spots:
        row = kinds.index(spot.kind)
        for name, value in spot.means.items():
            column = names.index(name)
            share = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0
            area = Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, facecolor=MARK, alpha=0.06 + 0.34 * share, lw=0)
            axes.add_patch(area)
            if any(twins.get(name, name) == twins.get(best, best) for best in spot.best):
                axes.add_patch(Rectangle((column + 0.05, row + 0.09), 0.9, 0.82, fill=False, edgecolor=INK, lw=1.3))
            text = f"{value:.0f}" if answer.question.unit else f"{value:.2f}"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8)
    unit = f", {answer.question.unit}" if answer.question.unit else ""
    axes.set_title(f"{answer.question.title}{unit} ({answer.arm}, {answer.policy})", fontsize=9)
    axes.set(xlim=(0, len(names)), ylim=(len(kinds), 0))
    axes.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=8)
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=8)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
