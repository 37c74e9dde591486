"""Tables and pictures that compare cells, on planted ones."""

from __future__ import annotations

import struct
from pathlib import Path

import pandas as pd
import pytest
from planted import BASE, cell, planted

from altgrad.analysis.comparison_figures import forest, rate_sensitivity, survival, trade_offs
from altgrad.analysis.comparisons import best_table, costs, costs_table, widths, widths_table
from altgrad.analysis.study import Study, study_of
from altgrad.training import ARMS, TrainConfig

SEEDS = range(6)


def ends(above: float) -> dict[int, float]:
    return {seed: BASE + above + 0.002 * ((7 * seed) % 5) for seed in SEEDS}


def study() -> Study:
    """E5M2 loses precision and E4M3 nothing; E7M0 fails at 8 bits alone, and stops at both widths to nearest."""
    return study_of(
        [
            cell(ends(0), format="BF16"),
            cell(ends(0.05), format="E5M2"),
            cell(ends(0), format="FP16"),
            cell(ends(0), format="E4M3"),
            cell(dict(zip(SEEDS, reversed(ends(0).values()), strict=True)), format="E4M11"),
            cell(ends(1.0), format="E7M0"),
            cell(ends(0.001), format="E7M8"),
            cell({}, tuple(SEEDS), format="E7M0", arm="adamw_nearest"),
            cell({}, tuple(SEEDS), format="E7M8", arm="adamw_nearest"),
        ]
    )


def test_range_is_told_from_precision() -> None:
    found = study()
    table = widths_table(found, widths(found))
    said = {(line[0], line[2]): (line[1], line[-1]) for line in table.lines}
    assert said == {
        ("E5M2", "adamw"): ("FP16", "mantissa bits cost, decided"),
        ("E4M3", "adamw"): ("E4M11", "no difference decided"),
        ("E7M0", "adamw"): ("E7M8", "precision: with more mantissa bits it does not fail"),
        ("E7M0", "adamw_nearest"): ("E7M8", "fails at 16 bits too: mantissa bits are not what is missing"),
    }


def test_the_best_of_each_width_leave_out_what_stopped() -> None:
    table = best_table(study())
    firsts = {line[1]: line[0] for line in reversed(table.lines)}
    assert firsts == {"8": "E4M3", "16": "BF16"}
    assert all("adamw_nearest" not in line for line in table.lines)


def trials_of(found: Study) -> tuple[Study, pd.DataFrame]:
    cells, rows = [], []
    for place, item in enumerate(found.cells):
        config = TrainConfig(format=item.format, optimizer=ARMS[item.family])
        ids = tuple(f"{place}-{seed}" for seed in SEEDS)
        cells.append(cell(dict(item.losses), tuple(item.stops), format=item.format, arm=item.arm, trial_ids=ids))
        rows += [(name, config.model_dump_json(), 1000.0 + place, float("nan")) for name in ids]
    return study_of(cells), pd.DataFrame(rows, columns=["trial_id", "config", "tokens_per_s", "samples_per_s"])


def test_costs_are_those_of_the_arm_and_the_format(tmp_path: Path) -> None:
    found, trials = trials_of(planted(["BF16", "E5M2"], ["adamw", "adamw_sr"], {}, 6))
    table = costs(found, trials)
    kept = {(row["format"], row["arm"]): (row["weight_bytes"], row["state_bytes"]) for row in table.to_dict("records")}
    assert kept == {
        ("BF16", "adamw"): (4, 8),
        ("BF16", "adamw_sr"): (2, 8),
        ("E5M2", "adamw"): (4, 8),
        ("E5M2", "adamw_sr"): (1, 8),
    }
    assert len(costs_table(found, table).lines) == 4 and set(table["speed"]) == {1000.0, 1001.0, 1002.0, 1003.0}
    assert trade_offs(table, "uniform", "nats", tmp_path / "costs.png")
    assert not trade_offs(table, "classic", "nats", tmp_path / "none.png")


def test_pictures_are_drawn_where_there_is_something_to_show(tmp_path: Path) -> None:
    with_arms = planted(["BF16", "E5M2", "E7M0"], ["adamw", "manifold"], {("E5M2", "manifold"): -0.1}, 6)
    rates = tuple(cell(ends(above), lr=lr) for lr, above in ((1e-3, 0.0), (2e-3, 0.1)))
    several = study_of([cell(ends(0), format="BF16"), cell(ends(0), tried=rates)])
    drawn = {
        "forest": lambda path: forest(with_arms, path),
        "survival": lambda path: survival(study(), "uniform", 300, path),
        "rates": lambda path: rate_sensitivity(several, "uniform", path),
    }
    for name, draw in drawn.items():
        assert draw(tmp_path / f"{name}.png"), name
        width, height = struct.unpack(">II", (tmp_path / f"{name}.png").read_bytes()[16:24])
        assert width == 1170 and 150 < height < 1200, name
    assert not forest(study(), tmp_path / "none.png") and not survival(with_arms, "uniform", 300, tmp_path / "none.png")
    assert not rate_sensitivity(study(), "uniform", tmp_path / "none.png")


@pytest.mark.parametrize("name", ["interactions", "survival"])
def test_no_picture_is_left_where_there_is_none(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.png"
    empty = study_of([cell(ends(0), format="BF16")])
    assert not (forest(empty, path) if name == "interactions" else survival(empty, "uniform", 300, path))
    assert not path.exists()
