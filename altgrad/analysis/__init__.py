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


def load(folder: Path | str) -> Frames:
    """The frames (trials, rows, layers, outcomes, spend) of a sweep's folder, or of an export of one.

    FileNotFoundError where it is neither.
    """
    from altgrad.analysis.frames import Frames

    return Frames(folder)
