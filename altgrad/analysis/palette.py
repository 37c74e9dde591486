"""The colours of a report, each with a value for light and for dark pages, and how lines of formats are told apart.

Figures are drawn with the light values, which is what their PNGs hold. In the page a figure's colours are variables
of the stylesheet, so it follows the page into the dark. A line has at least 3:1 against either page and a text 4.5:1
(WCAG 2.2, 1.4.11 and 1.4.3). Hues survive colour blindness (after Okabe & Ito; Tol), but nothing relies on hue: a
format has its own dashes and its own marker too, by its exponent bits, and keeps all three in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from altgrad.analysis.cells import format_order

INK, SOFT, GRID, FAINT, BACK = "#1a1a1a", "#5c5c5c", "#e4e6e9", "#ededee", "#ffffff"
"""Text and axes; what is said softly; grid lines; areas that mean nothing; the page."""
CARD, LINE, MARK = "#f5f6f8", "#d9dce1", "#0b62a4"
WARN, ABOVE, BELOW = "#b00020", "#f1a340", "#a99ad6"
"""A limit that was crossed; higher and lower than what is compared with."""
BY_EXPONENT = ("#332288", "#0072b2", "#2f8fc4", "#00855f", "#7a7a10", "#b37400", "#c65300", "#882255", "#aa4499")
"""Of formats with 0 to 8 exponent bits."""
NEUTRAL = {"BF16": INK, "FP16": "#5a5a5a", "FP32": "#757575"}
SERIES = (
    BY_EXPONENT[6],
    BY_EXPONENT[1],
    BY_EXPONENT[5],
    BY_EXPONENT[7],
    BY_EXPONENT[3],
    BY_EXPONENT[2],
    BY_EXPONENT[0],
    BY_EXPONENT[4],
)
"""Of things that are no formats."""
HATCHES = ("", "///", "...", "xx", "\\\\\\", "--", "++", "oo")
"""Of areas beside each other, in the order of SERIES."""
DASHES: tuple[tuple[float, ...], ...] = (
    (6, 2),
    (1.2, 1.5),
    (6, 2, 1.2, 2),
    (3, 1.5),
    (9, 2, 1.2, 2, 1.2, 2),
    (),
    (10, 3),
    (3, 1.5, 1.2, 1.5),
    (5, 4),
)
"""Lengths of ink and gap, points, by exponent bits; () is a solid line."""
MARKERS = ("o", "s", "^", "D", "v", "p", "<", "d", "h")
NEUTRAL_LINES: Mapping[str, tuple[tuple[float, ...], str]] = {
    "BF16": ((4, 2), "*"),
    "FP16": ((2, 1), "8"),
    "FP32": ((7, 2, 2, 2), ">"),
}


@dataclass(frozen=True)
class Colour:
    """A variable of the stylesheet with its values."""

    name: str
    light: str
    dark: str


COLOURS = (
    Colour("ink", INK, "#e8e8e8"),
    Colour("soft", SOFT, "#a9adb3"),
    Colour("grid", GRID, "#30343b"),
    Colour("faint", FAINT, "#2b2f36"),
    Colour("back", BACK, "#16181c"),
    Colour("card", CARD, "#22252b"),
    Colour("line", LINE, "#3a3f47"),
    Colour("mark", MARK, "#7cc0f2"),
    Colour("warn", WARN, "#ff7b88"),
    Colour("above", ABOVE, "#8f4a00"),
    Colour("below", BELOW, "#5b3f99"),
    Colour("fp16", NEUTRAL["FP16"], "#b0b0b0"),
    Colour("fp32", NEUTRAL["FP32"], "#909090"),
    *(
        Colour(f"e{bits}", light, dark)
        for bits, (light, dark) in enumerate(
            zip(
                BY_EXPONENT,
                ("#a79bff", "#4fa8e8", "#9adbff", "#35c99b", "#cfcf5a", "#ffc24d", "#ff8c42", "#ee6fa8", "#dc9bd8"),
                strict=True,
            )
        )
    ),
)
VARIABLES = {
    colour.light: "currentColor" if colour.name == "ink" else f"var(--{colour.name},{colour.light})"
    for colour in COLOURS
}
"""What stands for a light value in a drawing; outside a page the value itself."""


def stylesheet() -> str:
    """The variables, for light pages and, on a screen that asks for it, dark ones."""
    light, dark = (
        " ".join(f"--{colour.name}: {getattr(colour, side)};" for colour in COLOURS) for side in ("light", "dark")
    )
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def colour_of(name: str) -> str:
    """The format's colour, the same in every picture."""
    return NEUTRAL.get(name) or BY_EXPONENT[format_order(name)[1]]


def line_of(name: str) -> dict[str, Any]:
    """Colour, dashes and marker of the format's line, as arguments of `Axes.plot`; wide formats have hollow markers."""
    bits, exponent, _ = format_order(name)
    dashes, marker = NEUTRAL_LINES.get(name) or (DASHES[exponent], MARKERS[exponent])
    hollow = bits > 8 and name not in NEUTRAL
    return {
        "color": colour_of(name),
        "linestyle": (0, dashes) if dashes else "solid",
        "marker": marker,
        "markersize": 5 if marker != "*" else 7,
        "markeredgewidth": 1.0 if hollow else 0.6,
        "markeredgecolor": colour_of(name) if hollow else BACK,
        "markerfacecolor": BACK if hollow else colour_of(name),
    }


def marked(points: int, name: str, count: int = 4) -> list[int]:
    """Where a line of so many points has its few markers: formats at different places, for lines that coincide."""
    if points <= count:
        return list(range(points))
    order = 8 if name in NEUTRAL else format_order(name)[1]
    step = points / count
    return [min(points - 1, int(step * (k + (order + 0.5) / 9))) for k in range(count)]
