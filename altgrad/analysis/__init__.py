"""Reads what a sweep recorded and says what it means; trains nothing and needs no Ray.

`load` gives the records as frames. `report.write_report` is the way to what they mean: ledger (`records`) → cells and
their comparisons (`cells`, `study`) → a sentence (`finding`), pictures (`figures`) and the report around them.
`test_matrix` lists what is tested in what combination.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from altgrad.analysis.frames import Frames
    from altgrad.analysis.grids import SettledRates


def load(folder: Path | str) -> Frames:
    """The frames (trials, rows, layers, outcomes, spend) of a sweep's folder, or of an export of one.

    FileNotFoundError where it is neither.
    """
    from altgrad.analysis.frames import Frames

    return Frames(folder)


def settled_lrs(folder: Path | str) -> SettledRates:
    """The learning rate of each cell at which a sweep over rates ended lowest, for `SweepSpec.settled_lrs` of one that
    judges on other seeds; by format, arm and policy.

    `folder`: the sweep's, or an export of it. Of E0M7 and E1M6, which are one grid, one stands for both. ValueError
    where the sweep has trials without a result, or several settings.
    """
    from altgrad.analysis.settled import settled_lrs

    return settled_lrs(Path(folder))
