"""What a report is made of: groups of sections, each a title, a few sentences, tables, pictures, and a line for when
there is nothing to show.

A section is declared once, in Python; the HTML and the Markdown loop over the same list, so they cannot say different
things. A builder is a function from `Material` to a `Section`; `altgrad.analysis.contents` lists them in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from altgrad.analysis import sweet_spots
from altgrad.analysis.finding import Finding
from altgrad.analysis.layer_figures import OVER_TRAINING
from altgrad.analysis.layer_signals import layers_of, signals_by_kind
from altgrad.analysis.records import Records
from altgrad.analysis.study import Study
from altgrad.analysis.tables import Table
from altgrad.analysis.wording import anchor_of

LAYER_SIGNALS = tuple(dict.fromkeys((*sweet_spots.SIGNALS, *OVER_TRAINING)))
"""Signals of layers of which a report says something."""
Mutation = tuple[str, int, str, float, float, str]
"""(trial, step, field, before, after, source) of what a member of a population took over."""


class Group(StrEnum):
    """The parts of a report, in their order."""

    ANSWER = "The answer"
    TRAINING = "Which formats train"
    GEOMETRY = "Which benefit from geometry"
    FAILURES = "Why others fail"
    COSTS = "Costs and choices"
    CELLS = "Every cell and its trials"
    METHODS = "How this was computed"


@dataclass(frozen=True)
class Picture:
    """A figure's title, what is said of it beside the section's intro, and its PNG."""

    title: str
    path: Path
    caption: str = ""


@dataclass(frozen=True)
class Captioned:
    """A table with what is said of it; `heading` and `anchor` where it is linked to, `command` that makes its numbers.

    `caption` stands above the table. A table without lines is left out, with all that is said of it.
    """

    table: Table
    caption: str = ""
    heading: str = ""
    anchor: str = ""
    command: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report; without a title it stands under its group's heading alone.

    Shown in this order: `intro`, `facts` (a name and a text each), `paragraphs`, `items` (a list), `links`, `pictures`,
    `tables`. Where all of these but the intro are empty, `nothing` is said instead, and where that is empty too, there
    is no section.
    """

    title: str
    group: Group
    intro: str = ""
    tables: Sequence[Captioned] = ()
    pictures: Sequence[Picture] = ()
    nothing: str = ""
    facts: Sequence[tuple[str, str]] = ()
    paragraphs: Sequence[str] = ()
    items: Sequence[str] = ()
    links: Sequence[tuple[str, str]] = ()
    """A name and a relative address each."""

    @property
    def shown_tables(self) -> list[Captioned]:
        return [item for item in self.tables if item.table.lines]

    @property
    def is_empty(self) -> bool:
        filled = (self.shown_tables, self.facts, self.paragraphs, self.items, self.links, self.pictures)
        return not any(filled)

    @property
    def is_cards(self) -> bool:
        """Whether its tables are many small ones, each under a heading of its own."""
        return bool(self.shown_tables) and all(item.heading for item in self.shown_tables)

    @property
    def anchor(self) -> str:
        return anchor_of(self.title)


@dataclass(frozen=True)
class Material:
    """What sections are made from; `folder` is the report's, `label` tells its setting from the `others`."""

    out_dir: Path
    folder: Path
    name: str
    manifest: Mapping[str, Any] | None
    records: Records
    study: Study
    finding: Finding
    label: str = ""
    others: Mapping[str, Path] | None = None
    """The reports of the sweep's other settings."""
    unreported: int = 0
    """Settings without a report of their own."""
    mutations: Sequence[Mutation] = ()

    @property
    def trials(self) -> pd.DataFrame:
        return self.records.trials

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(cell.policy for cell in self.study.cells))

    @cached_property
    def by_kind(self) -> pd.DataFrame:
        """LAYER_SIGNALS of the cells' trials, by kind of layer (`layer_signals.signals_by_kind`)."""
        steps = dict(zip(self.trials["trial_id"], self.trials["steps"], strict=True))
        shown = {name: steps[name] for cell in self.study.cells for name in cell.trial_ids}
        return signals_by_kind(self.out_dir, shown, LAYER_SIGNALS)

    @cached_property
    def prospects(self) -> pd.DataFrame:
        """What the reference's layers show of other formats (`observers.prospects`): OF_LAYERS."""
        shown = [] if self.study.reference is None else self.study.reference.trial_ids
        found: pd.DataFrame = layers_of(self.out_dir, shown).to_pandas()
        return found[found["signal"].str.contains("@")]

    def picture(self, name: str, draw: Callable[[Path], bool]) -> Path | None:
        """figures/NAME.png, drawn by `draw`; None where that has nothing to show."""
        path = self.folder / "figures" / f"{name}.png"
        return path if draw(path) else None


Builder = Callable[[Material], Section]


def grouped(sections: Sequence[Section]) -> list[tuple[Group, list[Section]]]:
    """The sections that say anything by group, in the groups' order, each in its own."""
    told = [section for section in sections if not section.is_empty or section.nothing]
    return [(group, own) for group in Group if (own := [section for section in told if section.group is group])]
