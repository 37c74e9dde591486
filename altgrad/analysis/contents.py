"""The sections of a report, in their order; each is a function of the material, and new ones are added to SECTIONS."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from altgrad import NUMERICS_VERSION
from altgrad.analysis import comparison_sections, layer_sections, pictures, repeats
from altgrad.analysis.methods import methods, sources
from altgrad.analysis.reading import GAIN, how_to_read, words
from altgrad.analysis.records import FINISHED, ending_of
from altgrad.analysis.scores import scores_table
from altgrad.analysis.sections import Builder, Captioned, Group, Material, Section
from altgrad.analysis.tables import cells_table, geometry_table, mutations_table, shifts_table, stops_table
from altgrad.analysis.twins import twin_control
from altgrad.analysis.wording import share
from altgrad.sweep.record.ledger import outdated_text


def the_finding(material: Material) -> Section:
    """The three answers, what has to be known beside them, and what they rest on."""
    finding = material.finding
    answers = [(answer.question, answer.text) for answer in finding.answers]
    paragraphs = [*finding.notes, _trials_text(material), *_settings_text(material)]
    return Section("", Group.ANSWER, facts=answers, paragraphs=paragraphs)


def _trials_text(material: Material) -> str:
    trials = material.trials
    counts = Counter(map(ending_of, trials.to_dict("records"))).most_common()
    texts = [f"{len(trials)} trials: {', '.join(f'{count} {kind}' for kind, count in counts)}."]
    if hours := trials["seconds"].sum() / 3600:
        texts.append(f"{hours:.2f} hours of training.")
    return " ".join([*texts, *_share_texts(material.trials), *_outside_texts(material)])


def _share_texts(trials: pd.DataFrame) -> list[str]:
    """What share of the model's parameters a format rounds, by policy."""
    known = trials[trials["quantized"] & trials["quantized_share"].notna()]
    found = [
        f"{share(own.iloc[0])} of the parameters are quantized under {policy}"
        for policy, own in known.groupby("policy", sort=False)["quantized_share"]
    ]
    return [f"{', '.join(found)}."] if found else []


def _outside_texts(material: Material) -> list[str]:
    """What of the folder is left out, and what of the trials was computed elsewhere or otherwise."""
    records = material.records
    count, mixed = records.outside, _mixed_devices(records.trials)
    texts = [f"{outdated_text(records.outdated)}."] if records.outdated else []
    if own := int((records.trials["numerics"] != NUMERICS_VERSION).sum()):
        texts.append(f"{own} trials of this sweep were computed by an older numerics version than this installation's.")
    if count:
        subject = (
            "1 other trial of earlier sweeps in this folder is"
            if count == 1
            else f"{count} other trials of earlier sweeps in this folder are"
        )
        texts.append(f"{subject} left out; results.csv lists every trial.")
    if mixed:
        texts.append(
            f"Trials of seed {', '.join(map(str, mixed))} ran on different devices (results.csv: device): their paired "
            "differences hold a difference of devices too."
        )
    return texts


def _mixed_devices(trials: pd.DataFrame) -> list[int]:
    """The seeds of which finished trials ran on more than one kind of device."""
    known = trials[(trials["device"] != "") & (trials["state"] == FINISHED)]
    kinds = known.groupby("seed")["device"].nunique()
    return [int(seed) for seed in kinds.index[kinds > 1]]


def _settings_text(material: Material) -> list[str]:
    if not material.others:
        return []
    text = f"This is the report of {material.label}; trials compare within one setting only."
    more = f" {material.unreported} more settings are in results.csv only." if material.unreported else ""
    return [text + more]


def other_settings(material: Material) -> Section:
    """Links to the reports of the sweep's other settings."""
    others = (material.others or {}).items()
    links = [(label, os.path.relpath(path, material.folder)) for label, path in others]
    return Section("Other settings of this sweep", Group.ANSWER, links=links)


def every_cell(material: Material) -> Section:
    """The verdict on every cell, and what it is of."""
    intro = (
        f"{words(material.study)['mean']} over seeds ± half its 95 % interval; the difference from BF16 AdamW is "
        "paired by seed, with its simultaneous interval over this table. The excess over BF16 is what the verdict is "
        "of."
    )
    return Section("Every cell", Group.TRAINING, intro, [Captioned(cells_table(material.study))])


def classification_scores(material: Material) -> Section:
    """Scores of a classifier."""
    scores = scores_table(material.trials, material.study)
    intro = (
        "On test documents, under the threshold that was best on validation documents; means over finished seeds, F1 ± "
        "half its 95 % interval. Formats are judged by the error, 1 − F1 micro: a classifier's loss may rise on new "
        "documents while its decisions improve."
    )
    tables = [] if scores is None else [Captioned(scores)]
    return Section("Classification scores", Group.TRAINING, intro, tables)


def geometry(material: Material) -> Section:
    """Geometry-aware arms against plain ones, and beyond BF16."""
    return Section(
        "Geometry-aware against plain steps",
        Group.GEOMETRY,
        GAIN.format(measure=material.study.measure),
        [Captioned(geometry_table(material.study))],
        nothing="No format was run with both a geometry-aware arm and the plain arm of its residence.",
    )


def control(material: Material) -> Section:
    """Whether one grid under two names gave the same numbers."""
    found = twin_control(material.study.cells)
    texts = []
    if found is not None:
        pairs, difference = found
        texts = [
            f"E0M7 and E1M6, one grid under two names, gave the same {material.study.measure} in all {pairs} pairs of "
            "runs, as they must."
            if difference == 0
            else "Fault in the numerics: E0M7 and E1M6 are one grid under two names, yet differ by up to "
            f"{difference:.3g} {material.study.unit} in {pairs} pairs of runs."
        ]
    return Section("Control", Group.METHODS, paragraphs=texts)


def stops(material: Material) -> Section:
    """Every failed trial with the evidence of its guard."""
    return Section(
        "Why runs stopped",
        Group.FAILURES,
        tables=[Captioned(stops_table(material.trials))],
        nothing="No run was stopped by a guard.",
    )


def shifts(material: Material) -> Section:
    """Every trial of which a layer moved to another format."""
    intro = (
        "A declared intervention moved a failing layer to another format in mid-run. Such a run is left out of every "
        "verdict, gain, choice and picture: its loss is not one of the format that it began in."
    )
    return Section("Runs that needed another format", Group.FAILURES, intro, [Captioned(shifts_table(material.trials))])


def exchanges(material: Material) -> Section:
    """What members of populations took over from others."""
    intro = (
        "Under population-based training a trial took over weights, optimizer state and values from a better one, and "
        "went on with these values times a factor. Its learning rate and rung clip elsewhere are those it began with."
    )
    tables = [Captioned(mutations_table(material.mutations))]
    return Section("Exchanges in populations", Group.COSTS, intro, tables)


def reading(material: Material) -> Section:
    """The meaning of the report's words."""
    return Section("How to read this", Group.METHODS, items=how_to_read(material.study))


def provenance(material: Material) -> Section:
    """The manifest of the sweep."""
    facts = [] if material.manifest is None else [(name, text) for name, text in _flat(material.manifest) if text]
    return Section("Provenance", Group.METHODS, facts=facts)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested value as dotted names and texts; '' for what holds nothing."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [(prefix, json.dumps(item)) for item in value]
    if value is None:
        return [(prefix, "")]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


SECTIONS: tuple[Builder, ...] = (
    the_finding,
    other_settings,
    pictures.heat_map,
    every_cell,
    comparison_sections.best_of_each_width,
    pictures.loss_curves,
    pictures.excess_curves,
    classification_scores,
    geometry,
    comparison_sections.interactions,
    comparison_sections.arms_compared,
    layer_sections.first_signs,
    stops,
    pictures.stop_reasons,
    comparison_sections.survival,
    pictures.flip_yields,
    comparison_sections.gradient_cosine,
    comparison_sections.widths_compared,
    layer_sections.predictions,
    layer_sections.sweet_spots,
    layer_sections.layers_over_training,
    layer_sections.stiffness_field,
    shifts,
    comparison_sections.learning_rates,
    comparison_sections.speed_and_memory,
    exchanges,
    repeats.cells_and_trials,
    reading,
    methods,
    sources,
    control,
    provenance,
)
