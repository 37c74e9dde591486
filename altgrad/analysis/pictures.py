"""Sections of pictures: each is drawn once per mixed-precision policy, of the cells at their chosen parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from altgrad.analysis import curves, figures
from altgrad.analysis.sections import Group, Material, Picture, Section
from altgrad.analysis.wording import listed

Draw = Callable[[pd.DataFrame, Sequence[str], Path], bool]
"""Draws trials, with the `panel` of each, of these policies into a file; False where there is nothing to show."""
MOST_PANELS = 8
"""Of a picture of several policies."""
MOST_COLUMNS = 12
"""Of one heat map."""
HEAT_MAP = (
    "What formats are judged by, minus BF16's at the same seed: mean and half the simultaneous interval. Above, "
    "against BF16 AdamW, which the verdicts are of; below, where several arms were run, against BF16 with the same "
    "arm, which leaves what the format does. Purple is lower than BF16, orange higher, stronger the larger the "
    "difference. A full colour with a border is decided; a faded one is not. Hatched cells had runs stopped and have "
    "no mean."
)
NO_REFERENCE = "There is no BF16 AdamW reference to measure from."
OF_EVERY_POLICY = ("loss_curves", "excess_curves", "first_signs", "stop_reasons")
"""Pictures by the beginning of their file's name; the others are of the policy that the finding speaks of."""
BANDS = (
    "Bands are 95 % t intervals of that mean at each step, from 3 seeds on, and not corrected for the number of steps "
    "or lines; of 2 seeds, whose interval would fill the panel, each is a thin line."
)


def heat_map(material: Material) -> Section:
    """Every format, arm and policy beside BF16: one picture, or one per policy where that would be too wide."""
    title, study, policies = "Distance from BF16", material.study, material.policies
    parts = [policies] if len(figures.columns_of(study, policies)) <= MOST_COLUMNS else [[name] for name in policies]
    shown = []
    for part in parts:
        suffix = "" if len(part) == len(policies) else f"_{part[0]}"
        path = material.picture(f"heat_map{suffix}", partial(figures.heat_map, study, part))
        if path is not None:
            said = (f"{title}, policy {part[0]}", f"Policy {part[0]}.") if suffix else (title, "")
            shown.append(Picture(said[0], path, said[1]))
    return Section(title, Group.TRAINING, HEAT_MAP, pictures=shown, nothing=NO_REFERENCE)


def loss_curves(material: Material) -> Section:
    """Training loss over steps."""
    return _section(
        material,
        "Loss by format",
        Group.TRAINING,
        f"One panel per arm, the mean of the seeds. {BANDS} The dashed line with stars is BF16 AdamW; a cross is where "
        "a guard stopped a run. The axis is cut to where runs differ.",
        "No training loss is recorded yet.",
        "loss_curves",
        lambda trials, _, path: curves.loss_curves(trials, material.records.rows, path),
    )


def excess_curves(material: Material) -> Section:
    """Training loss minus the reference's over steps."""
    return _section(
        material,
        "Distance from BF16 while training",
        Group.TRAINING,
        "Training loss minus BF16 AdamW's at the same step and seed, the mean of the seeds. The batches are the same, "
        f"so their noise cancels. {BANDS} Linear within ±0.02 nats, logarithmic beyond.",
        "There is no BF16 AdamW run with the same seed to measure from.",
        "excess_curves",
        lambda trials, _, path: curves.excess_curves(trials, material.records.rows, path),
    )


def stop_reasons(material: Material) -> Section:
    """How many runs were stopped by which signal."""
    return _section(
        material,
        "Stops by reason",
        Group.FAILURES,
        "Runs that a guard ended, by the signal that ended them, of each cell at its chosen settings.",
        "No run of a cell at its chosen settings was stopped by a guard.",
        "stop_reasons",
        lambda trials, _, path: figures.stop_reasons(trials, path),
    )


def flip_yields(material: Material) -> Section:
    """Flip yield over steps."""
    return _section(
        material,
        "Flip yield",
        Group.FAILURES,
        "Code changes that happened over code changes expected of the steps taken, the mean of the seeds. Near 1 the "
        "steps reach the weights; near 0 rounding swallows them. Arms in which it stays within .1 of 1 are left out. "
        f"{BANDS}",
        "No flip yield is recorded: nothing was quantized.",
        "flip_yield",
        lambda trials, _, path: curves.flip_yields(trials, material.records.rows, path),
    )


def _section(
    material: Material, title: str, group: Group, caption: str, nothing: str, name: str, draw: Draw
) -> Section:
    """A section of one picture per policy, under the caption that they share."""
    return Section(title, group, caption, pictures=by_policy(material, title, name, draw), nothing=nothing)


def by_policy(material: Material, title: str, name: str, draw: Draw) -> list[Picture]:
    """A picture of the policy that the finding speaks of, and one of all others, or one of each where that would have
    too many panels; those of which there is something to show."""
    main = material.study.policy
    others = [policy for policy in material.policies if policy != main] if name in OF_EVERY_POLICY else []
    panels = {(cell.policy, cell.arm) for cell in material.study.cells if cell.policy in others}
    parts = [[main], *([others] if len(panels) <= MOST_PANELS else [[policy] for policy in others] if others else [])]
    several = len(material.policies) > 1
    shown = []
    for part in (part for part in parts if part):
        said = part[0] if len(part) == 1 else "others"
        path = material.picture(f"{name}_{said}" if several else name, partial(draw, _paneled(material, part), part))
        if path is not None:
            words = f"Policy {said}." if len(part) == 1 else f"Policies {listed(part)}."
            shown.append(Picture(f"{title}, {words[0].lower()}{words[1:-1]}" if several else title, path, words))
    return shown if several else [replace(picture, caption="") for picture in shown]


def _paneled(material: Material, policies: Sequence[str]) -> pd.DataFrame:
    """The trials of the policies' cells at their chosen parameters, with the panel that each is drawn in, and the
    reference's."""
    study = material.study
    panels = {
        name: cell.arm if len(policies) == 1 else f"{cell.policy}: {cell.arm}"
        for cell in study.cells
        if cell.policy in policies
        for name in cell.trial_ids
    }
    measured_from = dict.fromkeys(() if study.reference is None else study.reference.trial_ids, "")
    # A curve under a format's name is of that format alone.
    own = material.trials[material.trials["formats"] == ""]
    return own.assign(panel=own["trial_id"].map(measured_from | panels)).dropna(subset="panel")
