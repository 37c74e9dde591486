"""Sections as a page of HTML and as Markdown; text from outside (a path, a message, a name) stays text in both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from altgrad.analysis.palette import stylesheet
from altgrad.analysis.sections import Group, Section, grouped
from altgrad.analysis.wording import anchor_of

PAGES = ("report.html", "report.md")


def write_pages(folder: Path, name: str, sections: Sequence[Section]) -> None:
    """Writes report.html and report.md of the sections into the folder."""
    context = {"name": name, "groups": grouped(sections), "answer": Group.ANSWER, "colours": stylesheet()}
    for page in PAGES:
        (folder / page).write_text(_render(f"{page}.jinja", context), encoding="utf-8")


def _render(template: str, context: Mapping[str, Any]) -> str:
    is_html = template.startswith("report.html")
    environment = Environment(
        loader=PackageLoader("altgrad.analysis", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=is_html,
        finalize=None if is_html else _inert,
    )
    environment.filters |= {"plain": _plain, "anchor": anchor_of, "inline": _inline}
    return environment.get_template(template).render(context)


def _inert(value: object) -> object:
    """A value in Markdown, where HTML would come to life: whoever reads the report trusts it."""
    return value.replace("&", "&amp;").replace("<", "&lt;") if isinstance(value, str) else value


def _plain(value: object) -> str:
    """A text from outside in Markdown: one line, no links, pictures or new cells."""
    # Some readers make links of bare addresses too.
    return re.sub(r"(?i)([|`\\]|\](?=[(\[:])|:(?=//)|(?<=www)\.)", r"\\\1", " ".join(str(value).split()))


def _inline(path: Path, title: str, description: str) -> Markup:
    """The drawing beside a PNG, as an image with a name and a description for those who do not see it."""
    svg, name = path.with_suffix(".svg").read_text(encoding="utf-8"), path.stem
    labelled = f'role="img" aria-labelledby="{name}-title {name}-text"'
    said = Markup('<title id="{}-title">{}</title><desc id="{}-text">{}</desc>').format(name, title, name, description)
    tag, _, rest = svg.partition(">")
    return Markup(f"{tag} {labelled}>{said}{rest}")
