"""Published results name only what the registries have, each with a source, and the matrix's marks lead to them."""

from __future__ import annotations

import re

import pytest

from altgrad.analysis.published import PUBLISHED, PublishedResult, bearing_on, mark
from altgrad.analysis.test_matrix import combinations, layer_types, render
from altgrad.quantization import FORMATS, POLICIES
from altgrad.training.arm_configs import ARMS

LAYERS = {layer.short for layer in layer_types() if layer.excluded is None}
SOURCE = re.compile(r".+ (19|20)\d\d, \S.+")
MARK = re.compile(r"~?\[([\d, ]+)\]")


def numbered(entry: PublishedResult) -> str:
    return str(PUBLISHED.index(entry) + 1)


@pytest.mark.parametrize("entry", PUBLISHED, ids=numbered)
def test_an_entry_names_what_exists_and_its_source(entry: PublishedResult) -> None:
    bearing = entry.bearing
    assert bearing.formats and set(bearing.formats) <= set(FORMATS)
    assert bearing.layers and set(bearing.layers) <= LAYERS
    assert bearing.arms or bearing.near
    assert {*bearing.arms, *bearing.near} <= set(ARMS)
    assert not set(bearing.arms) & set(bearing.near), "one arm is either the same case or a near one"
    assert bearing.policy is None or bearing.policy in POLICIES
    assert SOURCE.fullmatch(entry.source), "authors, year, identifier"
    for said in (entry.read, entry.trained, entry.tensors, entry.result):
        assert said and "|" not in said and "\n" not in said
    assert entry.differs or not bearing.near, "a near case says what differs"


def test_every_entry_is_reached_by_a_combination() -> None:
    grades = ("same", "near")
    reached = {
        number
        for item in combinations()
        for grade in grades
        for number in bearing_on(item.format, item.arm, item.layer.short, grade)
    }
    assert reached == set(range(1, len(PUBLISHED) + 1))


def test_no_entry_stands_twice() -> None:
    assert len(set(PUBLISHED)) == len(PUBLISHED)


def test_a_result_bears_only_on_its_own_formats_arms_and_layers() -> None:
    hybrid = next(entry for entry in PUBLISHED if "2209.05433" in entry.source).bearing
    assert hybrid.grade("E4M3", "adamw", "attn.c_attn") == "near"
    for other in (("E5M2", "adamw", "attn.c_attn"), ("E4M3", "adamw_sr", "attn.c_attn"), ("E4M3", "adamw", "lm_head")):
        assert hybrid.grade(*other) is None


def test_a_mark_tells_same_from_near() -> None:
    assert mark("E4M3", "eco", "mlp.c_fc") == f"[{bearing_on('E4M3', 'eco', 'mlp.c_fc', 'same')[0]}]"
    assert mark("E7M0", "madam", "mlp.c_fc").startswith("~[")
    assert mark("E7M0", "grid", "mlp.c_fc") == ""
    assert re.fullmatch(r"\[[\d, ]+\] ~\[[\d, ]+\]", mark("E4M3", "adamw", "mlp.c_fc"))


def test_numbers_in_the_cells_are_those_of_the_table() -> None:
    text = render()
    table, cells = text.split("## Published results\n")[1].split("## Combinations\n")
    listed = [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert listed == list(range(1, len(PUBLISHED) + 1))
    marked = {int(number) for group in MARK.findall(cells) for number in group.split(",")}
    assert marked == set(listed)
    for number, entry in enumerate(PUBLISHED, start=1):
        row = next(line for line in table.splitlines() if line.startswith(f"| {number} |"))
        assert entry.source in row and entry.result in row


def test_the_counts_add_up_and_the_cells_agree() -> None:
    text = render()
    rows = [line for line in text.split("## Combinations\n")[1].splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in row.split(" | ") if "✓" in cell]
    same = sum("✓ [" in cell for cell in cells)
    near = sum("✓ ~[" in cell for cell in cells)
    said = re.search(r"Of the (\d+) combinations (\d+) have .* further (\d+) only .* For (\d+) no published", text)
    assert said is not None
    assert [int(number) for number in said.groups()] == [len(cells), same, near, len(cells) - same - near]
    assert len(cells) == len(combinations())


def test_arms_without_any_published_result_are_named() -> None:
    sentence = re.search(r"every combination of the arms ([\w, ]+)\.", render())
    assert sentence is not None
    named = set(sentence[1].split(", "))
    assert {"manifold", "grid"} <= named and not named & {"adamw", "adamw_sr", "eco"}
