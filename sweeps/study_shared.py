"""What the study's sweeps share: length, schedule, arms, and the learning rates settled on other seeds.

The plan is sweeps/study.md. `rates` are read from what sweeps/study_rates.py found, exported to sweeps/study/rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from altgrad.analysis import load, settled_lrs
from altgrad.sweep import SweepSpec
from altgrad.sweep.space.axes import Constraint
from altgrad.training.config import DataConfig, ScheduleConfig

GRIDS = ("E0M7", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
"""Every 8-bit split but E1M6, which is E0M7's grid under another name."""
JUDGED = ("adamw", "adamw_sr", "manifold", "manifold_sr", "grid")
"""The geometry-aware arms that are judged, and the plain arms of their residences."""
EVERYTHING = ("uniform", "uniform_full")
"""Weights in 8 bits; and weights, activations and gradients."""
SCHEDULE = ScheduleConfig(kind="wsd", decay_fraction=0.5)
EVAL_BATCHES = 16
"""Of 8 windows of 128 bytes: all of pydoc's validation text."""
FOUND = Path(__file__).parent / "study"
"""What the sweeps exported."""
MAIN = FOUND / "main"


def rates(formats: Mapping[str, str] | None = None, policies: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Format to arm to policy: the settled rates; those named take the rates of what they are mapped to."""
    found: dict[str, Any] = {name: dict(arms) for name, arms in settled_lrs(FOUND / "rates").items()}
    for name, like in (formats or {}).items():
        found[name] = dict(found[like])
    for arms in found.values():
        for arm, own in arms.items():
            arms[arm] = dict(own) | {name: own[like] for name, like in (policies or {}).items() if like in own}
    return found


def study(name: str, **values: Any) -> SweepSpec:
    """A sweep of the study: six seeds of 400 steps of the judged arms, unless told otherwise."""
    usual: dict[str, Any] = {
        "name": f"study_{name}",
        "formats": ("BF16", *GRIDS),
        "optimizers": JUDGED,
        "policies": EVERYTHING,
        "seeds": 6,
        "steps": 400,
        "schedule": SCHEDULE,
        "data": DataConfig(eval_batches=EVAL_BATCHES),
        "eval_interval": 100,
        "checkpoint_interval": 200,
    }
    return SweepSpec(**(usual | values))


def cells_with_stops(folder: Path) -> list[tuple[str, str, str]]:
    """(format, arm, policy) of the exported sweep's cells in which a guard ended a run."""
    trials = load(folder).trials
    stopped = trials[trials["state"] == "failed"]
    return list(dict.fromkeys(zip(stopped["format"], stopped["optimizer"], stopped["policy"], strict=True)))


def left_out(cells: Sequence[tuple[str, str, str]]) -> tuple[Constraint, ...]:
    """Rules that leave of the product of the cells' formats, arms and policies only these cells."""
    formats, arms, policies = (tuple(dict.fromkeys(values)) for values in zip(*cells, strict=True))
    wanted = set(cells)
    return tuple(
        Constraint(
            name=f"not_{format}_{arm}_{policy}",
            when={"format": format, "optimizer": arm, "policy": policy},
            reason="no run of this cell was stopped",
        )
        for format in formats
        for arm in arms
        for policy in policies
        if (format, arm, policy) not in wanted
    )
