"""Which settings of a cell are compared: equal grids of learning rates, and other parameters as arms of their own.

The best of 12 rates looks better than the best of 4 by chance. So the formats of an arm are cut to the rates that they
share, and arms of one unit to the rates that all have, where they have unequal numbers of them. A cell that shares no
rate with its like is exploratory: it is shown, and nothing of it is decided; but for one that ran at the rate which was
settled for it on other seeds, and so was chosen from nothing.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from altgrad.analysis.cells import MAIN_POLICY, REFERENCE_FORMAT, Cell, Key, arm_order, cell_of, format_order

MOST_ARMS = 8
"""An arm's parameter with more values than these is no axis that somebody wants to compare along."""

Rates = tuple[float, ...]
SettledRates = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Format to arm to policy: the rate that was chosen on other seeds."""


def build_cells(trials: pd.DataFrame, settled: SettledRates | None = None) -> list[Cell]:
    """One cell per format, arm and policy, in the order of formats, each at its best learning rate.

    A cell that ran at its `settled` rate alone was chosen from nothing, and is compared whatever the rates of others.
    """
    # Plain records: a frame per choice takes most of the time of a large sweep's report.
    records = trials.to_dict("records")
    labels = arm_labels(records)
    groups: dict[Key, dict[str, list[dict[Hashable, Any]]]] = {}
    for record, (arm, _) in zip(records, labels, strict=True):
        choices = groups.setdefault((record["format"], arm, record["policy"]), {})
        choices.setdefault(record["options"], []).append(record)
    knobs = dict(labels)
    found = {
        key: [
            cell_of(sorted(choice, key=lambda trial: trial["seed"]), key[1], knobs[key[1]]) for choice in all_.values()
        ]
        for key, all_ in groups.items()
    }
    units = {label: record["lr_unit"] for record, (label, _) in zip(records, labels, strict=True)}
    # Settings of one cell that differ in more than the rate are samples of a search: no other cell has the same.
    grids = {key: [cell.lr for cell in cells] for key, cells in found.items()}
    gridded = {key: rates for key, rates in grids.items() if len(set(rates)) == len(rates)}
    fixed = {key: tuple(rates) for key, rates in gridded.items() if rates == [_settled(settled or {}, key)]}
    compared = compared_rates(gridded, units) | fixed
    cells = [chosen(settings, compared.get(key)) for key, settings in found.items()]
    return sorted(
        cells,
        key=lambda cell: (format_order(cell.format), cell.policy != MAIN_POLICY, cell.policy, arm_order(cell.arm)),
    )


def _settled(rates: SettledRates, key: Key) -> float | None:
    format, arm, policy = key
    return rates.get(format, {}).get(arm.partition(",")[0], {}).get(policy)


def compared_rates(ran: Mapping[Key, Sequence[float]], units: Mapping[str, str]) -> dict[Key, Rates]:
    """The learning rates over which each cell is chosen, of those that share any with its like.

    `ran`: the rates of each cell; `units`: what each arm's rate is measured in.
    """
    by_arm: dict[str, list[Key]] = {}
    for key in ran:
        by_arm.setdefault(key[1], []).append(key)
    members = {arm: _sharing(keys, ran) for arm, keys in by_arm.items()}
    shared = {arm: _common([ran[key] for key in keys]) for arm, keys in members.items() if keys}
    by_unit: dict[str, list[str]] = {}
    for arm in shared:
        by_unit.setdefault(units[arm], []).append(arm)
    for arms in by_unit.values():
        if len({len(shared[arm]) for arm in arms}) > 1 and (common := _common([shared[arm] for arm in arms])):
            shared |= dict.fromkeys(arms, common)
    return {key: shared[arm] for arm, keys in members.items() for key in keys}


def _sharing(keys: Sequence[Key], ran: Mapping[Key, Sequence[float]]) -> list[Key]:
    """The cells of an arm that share the rate which most ran, BF16's among equals; none where each has its own."""
    counts = Counter(rate for key in keys for rate in set(ran[key]))
    own = {rate for key in keys if key[0] == REFERENCE_FORMAT for rate in ran[key]}
    rate = max(counts, key=lambda rate: (counts[rate], rate in own, -rate))
    return [key for key in keys if rate in ran[key]] if counts[rate] > 1 or len(keys) == 1 else []


def _common(grids: Sequence[Sequence[float]]) -> Rates:
    return tuple(sorted(set(grids[0]).intersection(*grids[1:])))


def chosen(settings: Sequence[Cell], compared: Rates | None) -> Cell:
    """The best of a cell's settings over the seeds that they share; `compared` None: of all, exploratory."""
    rates = tuple(sorted({cell.lr for cell in settings})) if compared is None else compared
    rivals = [cell for cell in settings if cell.lr in rates]
    whole = [cell for cell in rivals if cell.losses and not (cell.pruned or cell.stops or cell.shifted)]
    common = set.intersection(*(set(cell.losses) for cell in whole)) if whole else set()

    def rank(cell: Cell) -> tuple[float, ...]:
        # A lost seed says nothing of a setting: it is left out of all of them.
        values = cell.chosen_by or cell.losses
        mean = math.fsum(values[seed] for seed in common) / len(common) if common and cell in whole else cell.rank[-1]
        return (*cell.rank[:2], mean, len(cell.missing)) if common else cell.rank

    return replace(min(rivals, key=rank), rates=rates, tried=tuple(settings), exploratory=compared is None)


def arm_labels(records: Sequence[Mapping[Hashable, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """For each record (format, optimizer, options) its arm with the parameters that vary within it; and these by name.

    The rate is none of them, nor is a parameter with many values or whose values the formats do not share: a search has
    drawn those.
    """
    parsed = {text: json.loads(text) for text in {record["options"] for record in records}}
    values: dict[tuple[str, str], dict[str, set[str]]] = {}
    for record in records:
        for name, value in parsed[record["options"]].items():
            by_format = values.setdefault((record["optimizer"], name), {})
            by_format.setdefault(record["format"], set()).add(json.dumps(value))
    varied: dict[str, list[str]] = {}
    for (arm, name), by_format in values.items():
        is_axis = bool(set.intersection(*by_format.values())) and 1 < len(set.union(*by_format.values())) <= MOST_ARMS
        if name != "lr" and is_axis:
            varied.setdefault(arm, []).append(name)
    labels = []
    for record in records:
        own = {name: parsed[record["options"]][name] for name in varied.get(record["optimizer"], ())}
        words = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in own.items()]
        labels.append((", ".join([record["optimizer"], *words]), own))
    return labels
