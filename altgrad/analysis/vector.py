"""A figure as SVG for a page: matplotlib's own, with the page's colours in place of its own, and much less of it.

Colours become variables of the stylesheet, ids are the figure's own (a page holds many figures, and clip paths are
found by id), coordinates are rounded to a hundredth of a point, and what only an editor needs goes.
"""

from __future__ import annotations

import re

from altgrad.analysis.palette import VARIABLES

_FONT = re.compile(r"(font:[^;\"]*?\d+(?:\.\d+)?px) [^;\"]*")
_PLACES = re.compile(r' (?:d|x|y|x1|x2|y1|y2|points|transform)="[^"]*"')
_LONG = re.compile(r"(\d\.\d\d)\d+")
_REFERENCE = re.compile(r'url\(#([^)]+)\)|href="#([^"]+)"')


def themed(svg: str, name: str) -> str:
    """The drawing with the colours of the page's theme; `name` tells its ids from those of other figures."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = _PLACES.sub(lambda match: _LONG.sub(r"\1", match[0]), svg)
    svg = _FONT.sub(r"\1 inherit", svg).replace(' xml:space="preserve"', "")
    used = {match[1] or match[2] for match in _REFERENCE.finditer(svg)}

    def own_id(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r'(?<!xml:) id="([^"]*)"', own_id, svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: VARIABLES.get(match[0], match[0]), svg)
    svg = re.sub(r">\s+<", "><", svg)
    return re.sub(r"<svg ([^>]*)>", r'<svg fill="currentColor" \1>', svg, count=1)
