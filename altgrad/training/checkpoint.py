"""Atomic checkpoints: after a kill at any moment there is the old state or the new one, whole.

Everything that the next step depends on is inside: weights, optimizer state, the step, and the counts of the guards.
There is no random state to save, since batches and stochastic rounding are functions of (seed, step).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

STATE = "state.pt"


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep: bool = False) -> None:
    """Writes the state beside the old one, then renames it into place; `keep`: also as `step-<step>.pt`, to stay."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (STATE + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / STATE)
    if keep:
        kept = folder / f"step-{state['step']:06d}.pt"
        kept.unlink(missing_ok=True)
        try:
            kept.hardlink_to(folder / STATE)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / STATE, kept)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest complete state, or None where there is none."""
    path = folder / STATE
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
