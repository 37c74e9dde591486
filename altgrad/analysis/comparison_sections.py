"""Sections that compare cells with each other: the best of each width, widths, arms, rates, costs, survival."""

from __future__ import annotations

from functools import partial

from altgrad.analysis import comparison_figures, curves
from altgrad.analysis.comparisons import best_table, costs, costs_table, widths, widths_table
from altgrad.analysis.pictures import by_policy
from altgrad.analysis.scores import effects_table
from altgrad.analysis.sections import Captioned, Group, Material, Picture, Section
from altgrad.analysis.tables import choices_table


def best_of_each_width(material: Material) -> Section:
    """The best cells of 8 and of 16 bits."""
    intro = (
        "By mean loss, of cells without a stopped or shifted run. The best of many flatters: differences are beside."
    )
    return Section("Best 8-bit and 16-bit cells", Group.TRAINING, intro, [Captioned(best_table(material.study))])


def widths_compared(material: Material) -> Section:
    """Range or precision: 8 bits beside 16 bits with as many exponent bits."""
    return Section(
        "Equal exponent bits at 8 and 16 bits",
        Group.FAILURES,
        "Two formats with the same exponent bits cover much the same range and differ in precision. What fails at 8 "
        "bits and not at 16 lacks precision; what fails at both lacks range, or its step rule does not suit it. "
        "Differences are paired by seed, with simultaneous intervals over this table.",
        [Captioned(widths_table(material.study, widths(material.study)))],
        nothing="No 8-bit format was run beside 16 bits with its exponent bits (E5M2 beside FP16, E4M3 beside E4M11).",
    )


def arms_compared(material: Material) -> Section:
    """What geometry-aware arms change in every score and signal."""
    return Section(
        "Geometry-aware minus plain steps, by score and signal",
        Group.GEOMETRY,
        "The geometry-aware arm minus the plain arm of its residence in the same format, paired by seed, plain 95 % "
        "intervals: these describe, decisions are those of the table above. A lower loss, perplexity or stall ratio is "
        "better; a higher flip yield, stable rank or F1 is.",
        [Captioned(effects_table(material.trials, material.study))],
    )


def interactions(material: Material) -> Section:
    """The forest plot of interactions."""
    path = material.picture("interactions", partial(comparison_figures.forest, material.study))
    return Section(
        "Gain beyond BF16, every pair",
        Group.GEOMETRY,
        "What each geometry-aware arm gains over the plain arm of its residence, minus what it gains in BF16, with the "
        "simultaneous interval over all pairs. Filled points may be the largest: no other is shown to beat them.",
        pictures=[] if path is None else [Picture("Gain beyond BF16", path)],
        nothing="No interaction was measured: it takes a geometry-aware arm, its plain arm, and both in BF16.",
    )


def survival(material: Material) -> Section:
    """How many runs go on, over steps."""
    last = int(material.trials["steps"].max())
    return Section(
        "Survival",
        Group.FAILURES,
        "Share of runs that no guard has stopped, by step; panels are arms in which runs were stopped.",
        pictures=by_policy(
            material,
            "Survival",
            "survival",
            lambda _, policies, path: comparison_figures.survival(material.study, policies[0], last, path),
        ),
    )


def gradient_cosine(material: Material) -> Section:
    """How far the gradients are from a float32 shadow's."""
    return Section(
        "Gradient cosine",
        Group.FAILURES,
        "Cosine of the run's gradient with that of a float32 copy of its weights on the same batch: what the "
        "quantized forward and backward passes make of the direction. Measured where observe.shadow_every is set; "
        "arms in which it stays within .001 of 1 are left out.",
        pictures=by_policy(
            material,
            "Gradient cosine",
            "gradient_cosine",
            lambda trials, _, path: curves.gradient_cosines(trials, material.records.rows, path),
        ),
    )


def learning_rates(material: Material) -> Section:
    """Every learning rate of every cell, where a cell was run with several."""
    several = any(cell.settings > 1 for cell in material.study.cells)
    tables = [Captioned(choices_table(material.study))] if several else []
    title = "Sensitivity to the learning rate"
    return Section(
        title,
        Group.COSTS,
        "Means over seeds; bars are 95 % t intervals." if several else "",
        tables,
        by_policy(
            material,
            title,
            "learning_rates",
            lambda _, policies, path: comparison_figures.rate_sensitivity(material.study, policies[0], path),
        )
        if several
        else [],
    )


def speed_and_memory(material: Material) -> Section:
    """Loss against tokens per second, and against the bytes of weights and optimizer state."""
    found = costs(material.study, material.trials)
    policy, unit = material.study.policy, material.study.unit
    path = material.picture("costs", lambda path: comparison_figures.trade_offs(found, policy, unit, path))
    return Section(
        "Loss against speed and memory",
        Group.COSTS,
        "Speed is that of this emulation on this machine, which computes in float32: it says what an experiment costs, "
        "not how fast hardware with the format would be. Bytes are what must be kept of a weight between steps: a "
        "float32 master, or the format's own bits for weights on the grid, and float32 moments.",
        [Captioned(costs_table(material.study, found))],
        [] if path is None else [Picture("Loss against speed and memory", path)],
    )
