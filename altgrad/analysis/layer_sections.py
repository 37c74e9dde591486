"""Sections on why formats fail and where each is best: first signs, sweet spots, layers over training, stiffness."""

from __future__ import annotations

from altgrad.analysis import layer_figures
from altgrad.analysis.cells import MAIN_POLICY, Cell
from altgrad.analysis.pictures import by_policy
from altgrad.analysis.prediction import accuracy_texts, judged, prediction_table, prospects_of, prospects_table
from altgrad.analysis.sections import Captioned, Group, Material, Picture, Section
from altgrad.analysis.sweet_spots import answers, relief_table, reliefs, spots_picture, spots_table
from altgrad.analysis.twins import twin_map
from altgrad.analysis.why import signs_table, timeline

ARMS_OVER_TRAINING = ("adamw_nearest", "adamw")
"""Whose layers are drawn over steps: the first of them that was run in 8 bits, else the first arm."""


def first_signs(material: Material) -> Section:
    """Where in a step, in which layers and when runs begin to fail."""
    title, last = "First signs over training", int(material.trials["steps"].max())
    pictures = by_policy(
        material, title, "first_signs", lambda _, policies, path: timeline(material.study, policies, last, path)
    )
    return Section(
        "First signs of failure",
        Group.FAILURES,
        "The first signal of a layer beyond what healthy runs show (docs/bench/signals.md), and in which part of the "
        "step: the forward pass (weights and activations that overflow, round to zero, or drown in rounding noise), "
        "the backward pass (gradients that do), the optimizer (steps that rounding swallows, layers that freeze, "
        "collapse or grow). What a guard stopped in the end is seldom what began it. Of the commonest first sign of a "
        "cell's runs.",
        [Captioned(signs_table(material.study))],
        pictures,
        nothing="No run shows a sign of failure, none was stopped, and no arm is decided to fail.",
    )


def sweet_spots(material: Material) -> Section:
    """Which format each kind of layer takes best."""
    twins = twin_map(material.study.cells)
    found = answers(material.study, material.trials, material.by_kind)
    relieved = reliefs(material.study)
    picture = material.picture("sweet_spots", lambda path: spots_picture(found, twins, path))
    caption = (
        "What leaving layers in BF16 gives back: the loss with the format in all layers minus that under the recipe, "
        "paired by seed, simultaneous intervals over this table. Positive: those layers are better off in BF16."
    )
    return Section(
        "Sweet spot per layer type",
        Group.FAILURES,
        "Which format keeps most of each kind of layer's tensors (signal to quantization noise at the last look), and "
        "in which most of the steps arrive when weights on the grid are rounded to nearest (flip yield). Framed, and "
        "named: the formats that no other is shown to beat over the seeds, so that a single name is a decision.",
        [Captioned(spots_table(found, twins)), Captioned(relief_table(relieved, material.study.unit), caption)],
        [] if picture is None else [Picture("Sweet spots", picture)],
        nothing="Signals of layers are recorded of fewer than two 8-bit formats.",
    )


def layers_over_training(material: Material) -> Section:
    """Stiffness, flip yield and overflow of each kind of layer over steps."""
    cells = _cells_over_training(material.study.judged)
    picture = material.picture(
        "layers_over_training", lambda path: layer_figures.over_training(cells, material.by_kind, path)
    )
    arm = cells[0].arm if cells else ""
    return Section(
        "Layers over training",
        Group.FAILURES,
        f"Of {arm}, means over seeds. Stiffness: the spacing of the grid at the weights; where it grows past the size "
        "of the steps, flip yield falls. Overflow: weights beyond the format's largest value; left out where it is 0 "
        "throughout, as it is under scales that follow the largest weight.",
        pictures=[] if picture is None else [Picture("Layers over training", picture)],
        nothing="No signals of layers are recorded.",
    )


def _cells_over_training(judged: list[Cell]) -> list[Cell]:
    arms = [arm for arm in ARMS_OVER_TRAINING if any(cell.arm == arm for cell in judged)]
    arms += [cell.arm for cell in judged]
    return [cell for cell in judged if cell.arm == arms[0]] if arms else []


def stiffness_field(material: Material) -> Section:
    """Every format's spacing over the weights of the reference."""
    binades = layer_figures.histogram(material.prospects)
    names = [cell.format for cell in material.study.cells if cell.is_judged and cell.policy == MAIN_POLICY]
    picture = material.picture("stiffness_field", lambda path: layer_figures.stiffness_field(names, binades, path))
    return Section(
        "Stiffness field",
        Group.FAILURES,
        "The spacing of each format's grid (its stiffness, as log2) at a weight's magnitude, both against the layer's "
        "largest weight, over the histogram of BF16 AdamW's weights (grey bars, means over layers and seeds, last "
        "look). Below, the formats' values. Steps much smaller than the spacing are swallowed by rounding to nearest.",
        pictures=[] if picture is None else [Picture("Stiffness field", picture)],
    )


def predictions(material: Material) -> Section:
    """What the reference said of every format beforehand, and how right that was."""
    study = material.study
    prospects = prospects_of(material.prospects)
    found = judged(study, prospects)
    caption = (
        "Predicted to fail: a signal of the reference's own tensors and steps, put on the format's grid, is beyond "
        "the limit that healthy runs keep (the rules of the first signs), or, for arms that round to nearest, a "
        "step moves fewer than 15 % of the weights. That limit was drawn from the standard preset's own runs of a 2"
        " × 64 GPT: of those it is a description, of other models and data a prediction. Score: what orders the "
        "formats of an arm, the share of weights that a step moves for arms that round to nearest, else the least "
        "signal to noise of the rounded roles, dB."
    )
    return Section(
        "Predicted before training",
        Group.FAILURES,
        "What every 8-bit format would make of BF16 AdamW's tensors and steps, means over its layers and seeds at its "
        "last look: signal to quantization noise, shares that round to zero, and, of weights on the grid rounded to "
        "nearest, flip yield and the share of weights that one step moves. The reference runs before all others.",
        [Captioned(prospects_table(prospects)), Captioned(prediction_table(study, found), caption)],
        paragraphs=accuracy_texts(study, found),
        nothing="No reference of this sweep was looked at for other formats (its trials are older, or not run yet).",
    )
