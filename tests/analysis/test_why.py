"""First signs of failure in words and in a picture."""

from __future__ import annotations

import math
import struct
from pathlib import Path

from planted import BASE, cell

from altgrad.analysis.failures import reason
from altgrad.analysis.signs import Sign
from altgrad.analysis.study import study_of
from altgrad.analysis.why import signs_table, timeline

SWALLOWED = Sign(10, "optimizer", "flip_yield", "transformer.h.1.mlp.c_fc", 0.1, 0.4, "steps that rounding swallows")
LOST = Sign(40, "forward", "weight_sqnr", "lm_head", 8.0, 10.0, "weights lost in rounding noise")
BROKEN = Sign(50, "backward", "grad_norm", "transformer.h.0.attn.c_attn", math.nan, math.nan, "gradients that are none")


def study():
    good = dict.fromkeys(range(3), BASE)
    return study_of(
        [
            cell(good, format="BF16"),
            cell(good),
            cell({}, (0, 1, 2), arm="adamw_nearest", signs={0: (SWALLOWED, LOST), 1: (SWALLOWED,), 2: (BROKEN,)}),
            cell(dict.fromkeys(good, 2 * BASE), format="E7M0"),
        ]
    )


def test_the_commonest_first_sign_stands_for_a_cell() -> None:
    table = signs_table(study())
    lines = [dict(zip(table.columns, line, strict=True)) for line in table.lines]
    assert [(line["format"], line["arm"]) for line in lines] == [("E5M2", "adamw_nearest"), ("E7M0", "adamw")]
    first, other = lines
    assert (first["runs that show it"], first["direction"], first["step"]) == ("2 of 3", "optimizer", "10")
    assert (first["layer type"], first["layer"]) == ("MLP up", "transformer.h.1.mlp.c_fc")
    assert first["later"] == "forward: weight_sqnr in head, step 40"
    assert first["stopped by"] == "flip_yield in lm_head, 3 of 3"
    assert set(list(other.values())[2:-1]) == {"–"}, "it fails without a sign: above BF16 from the start"


def test_the_answer_names_the_first_sign() -> None:
    found = study()
    text = reason(found, found.cells[2])
    assert "first sign in the optimizer: flip_yield of MLP up, step 10" in text


def test_the_timeline_is_drawn_where_there_are_signs(tmp_path: Path) -> None:
    assert timeline(study(), ["uniform"], 100, tmp_path / "timeline.png")
    width, height = struct.unpack(">II", (tmp_path / "timeline.png").read_bytes()[16:24])
    assert width == 1170 and 150 < height < 600
    assert not timeline(study_of([cell({0: BASE}, format="BF16")]), ["uniform"], 100, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
