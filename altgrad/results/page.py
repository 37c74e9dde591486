"""Chapters as Markdown: paragraphs, tables, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from altgrad.analysis.tables import Table

WIDTH = 120


@dataclass(frozen=True)
class Figure:
    """A drawing in the folder of figures, under `name`, with what is said of it."""

    name: str
    caption: str


Block = str | Table | Figure


@dataclass
class Chapter:
    """A heading and what stands under it, in order."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """Where drawings go, and their address from the page."""

    folder: Path
    address: str

    def draw(self, name: str, caption: str, drawing: Callable[[Path], bool]) -> list[Block]:
        """The figure, drawn; nothing where there is nothing to draw."""
        return [Figure(name, caption)] if drawing(self.folder / f"{name}.png") else []


def page(title: str, chapters: Sequence[Chapter], figures: Figures) -> str:
    """The whole page."""
    blocks = [f"# {title}"]
    for chapter in chapters:
        blocks.append(f"## {chapter.title}")
        blocks += [_text(block, figures) for block in chapter.blocks if not isinstance(block, Table) or block.lines]
    return "\n\n".join(blocks) + "\n"


def _text(block: Block, figures: Figures) -> str:
    if isinstance(block, Table):
        return markdown(block)
    if isinstance(block, Figure):
        return f"![{block.caption}]({figures.address}/{block.name}.png)\n\n*{block.caption}*"
    return block


def markdown(table: Table) -> str:
    """The table; its texts are the study's own, and may hold Markdown."""
    rules = ("---:" if place in table.numeric else "---" for place in range(len(table.columns)))
    lines = [table.columns, list(rules), *table.lines]
    return "\n".join(f"| {' | '.join(text.replace('|', '∣') for text in line)} |" for line in lines)
