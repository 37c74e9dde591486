"""Learning rates that one sweep settles for another: tuned on seeds that judge nothing, judged on seeds untouched."""

from __future__ import annotations

from pathlib import Path

from altgrad.analysis.grids import build_cells, chosen
from altgrad.analysis.records import UNRESOLVED
from altgrad.analysis.scores import judged
from altgrad.analysis.sweeps import read_sweep
from altgrad.analysis.twins import ONE_GRID
from altgrad.training.outcome import OutcomeKind


def settled_lrs(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """See `altgrad.analysis.settled_lrs`."""
    sweep = read_sweep(folder)
    if len(sweep.settings) > 1:
        raise ValueError(f"{folder} has {len(sweep.settings)} settings; rates are settled in one")
    records = next(iter(sweep.settings.values()))
    lacks = (records.trials["state"] == UNRESOLVED) & (records.trials["outcome"] != OutcomeKind.PRUNED)
    if lacks.any():
        raise ValueError(f"{folder}: {lacks.sum()} of {len(lacks)} trials have no result yet: no rate is settled")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for cell in build_cells(judged(records.trials)):
        # Of all that it ran at, also where other arms have fewer rates: nothing is judged on these seeds.
        found.setdefault(cell.format, {}).setdefault(cell.family, {})[cell.policy] = chosen(cell.tried, None).lr
    for name, twin in (ONE_GRID, ONE_GRID[::-1]):
        if twin in found:
            found.setdefault(name, found[twin])
    return found
