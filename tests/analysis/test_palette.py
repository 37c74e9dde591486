"""Texts and lines of figures can be read on light and dark pages; formats are told apart without their hue."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from synthetic import Plan, stall, write_ledger

from altgrad.analysis.palette import BACK, COLOURS, line_of, marked
from altgrad.analysis.report import write_report
from altgrad.quantization import FORMATS

SIDES = ("light", "dark")
OF = {colour.name: colour for colour in COLOURS}


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("side", SIDES)
def test_contrast(side: str) -> None:
    value = {name: getattr(colour, side) for name, colour in OF.items()}
    areas = {"ink": ("back", "card", "faint", "above", "below"), "soft": ("back", "card"), "mark": ("back", "card")}
    texts = [(text, area) for text, found in (areas | {"warn": ("back",)}).items() for area in found]
    lines = [name for name in OF if re.match(r"e\d|fp", name)]
    low = [pair for pair in texts if contrast(value[pair[0]], value[pair[1]]) < 4.5]
    assert not low and len(lines) == 11
    assert not [name for name in lines if contrast(value[name], value["back"]) < 3]


def test_no_two_formats_look_alike() -> None:
    names = [*FORMATS, "FP32"]
    for one, other in combinations(names, 2):
        a, b = line_of(one), line_of(other)
        assert a["linestyle"] != b["linestyle"] and a["marker"] != b["marker"] and a["color"] != b["color"]
    assert line_of("E5M8")["markerfacecolor"] == BACK != line_of("E5M2")["markerfacecolor"]
    assert len({tuple(marked(100, name)) for name in names}) == 9, "markers of coinciding lines lie apart"


def test_a_drawing_has_no_colour_that_stays_in_the_dark(tmp_path: Path) -> None:
    def result(name: str, *_: object):
        return stall() if name == "E7M0" else 0.1

    write_report(write_ledger(tmp_path, Plan(["FP32", "BF16", "E5M2", "E7M0"], ["adamw", "grid"], 3, 30, result)))
    drawings = sorted((tmp_path / "report" / "figures").glob("*.svg"))
    assert len(drawings) >= 8
    for path in drawings:
        fixed = re.findall(r"(?<!,)#[0-9a-f]{6}\b|rgba?\(", path.read_text(encoding="utf-8"))
        assert not fixed, path.name
    first = {path.name: path.read_bytes() for path in drawings}
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in drawings} == first, "drawn twice, the same bytes"
