"""Runs of which a layer had to be moved to another format: what is said of them, which is never a verdict.

Such a run shows that its first format failed by a rule that the sweep declared, and nothing of how the format would
have ended. Where every run of a cell needed it, the format did not train by itself: a fact, told with its counts.
"""

from __future__ import annotations

from altgrad.analysis.cells import Cell
from altgrad.analysis.study import Study
from altgrad.analysis.wording import counted, listed, several


def rescue_text(cell: Cell) -> str:
    """'needed rescue: shifted to E5M2 in 3 of 3 seeds'."""
    to = dict.fromkeys(move.rpartition("->")[2] for move in moves(cell))
    return f"needed rescue: shifted to {several(list(to))} in {rescued_share(cell)}"


def rescued_share(cell: Cell) -> str:
    return f"{len(cell.shifted)} of {counted(cell.n + len(cell.shifted), 'seed')}"


def moves(cell: Cell) -> list[str]:
    """The moves of the cell's layers, each once: 'E4M3->E5M2'."""
    return list(dict.fromkeys(item.rpartition(": ")[2] for text in cell.shifted.values() for item in text.split(", ")))


def left_out_text(study: Study) -> str:
    """How many trials of which cells say nothing of their format for a shift; nothing where there are none."""
    found = [(cell, item) for cell in study.cells for item in cell.tried or (cell,) if item.shifted]
    if not found:
        return ""
    count = sum(len(item.shifted) for _, item in found)
    names = [
        f"{item.format} {item.arm}{'' if item.policy == study.policy else f' ({item.policy})'}"
        f"{'' if cell.settings == 1 else f' at rate {item.lr:g}'}: {listed(moves(item))} in {rescued_share(item)}"
        for cell, item in found
    ]
    return (
        f"Left out of every verdict, gain and choice: {counted(count, 'trial')} in which a layer had to be moved to "
        f"another format, {several(names)}. Their losses are not those of the format they began in."
    )
