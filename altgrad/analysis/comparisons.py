"""Tables that compare cells: 8 bits with 16 of as many exponent bits, the best of each width, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from altgrad.analysis import contrasts
from altgrad.analysis.cells import Cell, format_order
from altgrad.analysis.contrasts import Contrast
from altgrad.analysis.study import Study
from altgrad.analysis.tables import DASH, Table, effect_text, links, loss_text, number, slim, verdict_text
from altgrad.analysis.twins import twin_map
from altgrad.training.arm_configs import bytes_per_weight
from altgrad.training.config import TrainConfig

BEST = 3
"""Cells of each width in the table of the best."""


def widths(study: Study) -> list[Contrast]:
    """8 bits minus 16 bits of as many exponent bits, by format, arm and policy."""
    return contrasts.measured(
        contrasts.widths(study.cells), twin_map(study.cells), study.reference, sound=study.is_sound
    )


def widths_table(study: Study, found: Sequence[Contrast]) -> Table:
    """A line per pair: both losses, their difference, and whether it is range or precision that the 8 bits lack."""
    lines = [
        (
            item.cell.format,
            item.other.format,
            item.cell.arm,
            item.cell.policy,
            loss_text(item.cell),
            loss_text(item.other),
            effect_text(item),
            _lack_text(study, item),
        )
        for item in found
    ]
    columns = ("8 bits", "16 bits", "arm", "policy", "loss at 8", "loss at 16", f"difference, {study.unit}", "reading")
    return slim(Table(columns, lines, frozenset({4, 5, 6}), "8 bits", links(item.cell for item in found)), ("policy",))


def _lack_text(study: Study, item: Contrast) -> str:
    if not item.other.n:
        return "no result at 16 bits"
    narrow, wide = (_fails(study, cell) for cell in (item.cell, item.other))
    if narrow and wide:
        return "fails at 16 bits too: mantissa bits are not what is missing"
    if narrow:
        return "precision: with more mantissa bits it does not fail"
    if item.decided:
        return "mantissa bits cost, decided" if item.mean > 0 else "better with fewer mantissa bits, decided"
    return "no difference decided" if item.status == "measured" else item.status


def _fails(study: Study, cell: Cell) -> bool:
    """Whether it was stopped in most seeds, or is decided to fail, or, where no verdict is given (16 bits), ends beyond
    the margin."""
    if cell.n and 2 * len(cell.stops) > cell.n:
        return True
    verdict = study.verdicts.get(cell.key)
    if verdict is not None:
        return verdict.word == "fails"
    base = study.reference
    return base is not None and math.isfinite(cell.mean) and cell.mean > (1 + study.margin) * base.mean


def best_table(study: Study) -> Table:
    """The best cells of 8 and of 16 bits by mean loss, those without stops, and their distance from BF16 AdamW."""
    columns = ("format", "bits", "arm", "policy", "lr", "seeds", "loss", f"minus BF16, {study.unit}", "verdict")
    lines, shown = [], []
    for bits in (8, 16):
        own = [cell for cell in study.cells if format_order(cell.format)[0] == bits and math.isfinite(cell.mean)]
        own = [cell for cell in own if cell.quantized and not cell.shifted and cell.has_result]
        for cell in sorted(own, key=lambda cell: cell.rank)[:BEST]:
            shown.append(cell)
            verdict = verdict_text(study, cell, study.verdicts.get(cell.key))
            distance = "reference" if cell is study.reference else effect_text(study.comparison(cell))
            lines.append(
                (
                    cell.format,
                    str(bits),
                    cell.arm,
                    cell.policy,
                    number(cell.lr, "g"),
                    str(cell.n),
                    loss_text(cell),
                    distance,
                    DASH if cell is study.reference else verdict,
                )
            )
    return slim(Table(columns, lines, frozenset({4, 5, 6, 7}), "bits", links(shown)), ("policy", "lr"))


def costs(study: Study, trials: pd.DataFrame) -> pd.DataFrame:
    """A row per cell that finished: format, arm, policy, loss, tokens_per_s (or samples/s), weight_bytes, state_bytes.

    Speeds are medians over the cell's trials, of this emulation; bytes are those that have to be kept between steps.
    """
    by_id = trials.set_index("trial_id")
    rows = []
    for cell in study.cells:
        if not math.isfinite(cell.mean):
            continue
        own = by_id.loc[list(cell.trial_ids)]
        config = TrainConfig.model_validate_json(own["config"].iloc[0])
        weight, state = bytes_per_weight(config.optimizer, format_order(cell.format)[0] if cell.quantized else 32)
        speed = own["samples_per_s" if config.task == "classify" else "tokens_per_s"].median()
        rows.append((cell.format, cell.arm, cell.policy, cell.mean, float(speed), weight, state))
    names = ["format", "arm", "policy", "loss", "speed", "weight_bytes", "state_bytes"]
    return pd.DataFrame(rows, columns=names)


def costs_table(study: Study, found: pd.DataFrame) -> Table:
    """The same as texts."""
    columns = ("format", "arm", "policy", "loss", "tokens/s or samples/s", "bytes a weight", "bytes of optimizer state")
    lines = [
        (
            row["format"],
            row["arm"],
            row["policy"],
            number(row["loss"], ".3f"),
            number(row["speed"], ",.0f"),
            number(row["weight_bytes"], "g"),
            number(row["state_bytes"], "g"),
        )
        for row in found.to_dict("records")
        if row["policy"] == study.policy
    ]
    return slim(Table(columns, lines, frozenset({3, 4, 5, 6}), "format"), ("policy",))
