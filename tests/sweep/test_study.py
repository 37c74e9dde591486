"""The study's sweeps, as sweeps/study.md has them: what each trains, at rates that were settled on other seeds."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import altgrad.analysis
from altgrad.analysis import settled_lrs
from altgrad.sweep import SweepSpec
from altgrad.training import ARMS

SWEEPS = Path(__file__).parents[2] / "sweeps"
NAMES = ("main", "long", "twins", "original", "wider", "layers", "law", "large", "classify")


FORMATS = ("FP32", "BF16", "E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
STAND_IN = {name: {arm: dict.fromkeys(("uniform", "uniform_full"), 1e-3) for arm in ARMS} for name in FORMATS}
"""What a sweep trains does not hang on its rates, which may not be settled yet."""


@pytest.fixture(scope="module")
def sweeps() -> Iterator[dict[str, SweepSpec]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SWEEPS))
        patch.setattr(altgrad.analysis, "settled_lrs", lambda folder: STAND_IN)
        yield {name: importlib.import_module(f"study_{name}").SWEEP for name in NAMES}
        for name in [name for name in sys.modules if name.startswith("study_")]:
            del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_trains_as_many_trials_as_the_plan_says(name: str, sweeps: dict[str, SweepSpec]) -> None:
    plan = (SWEEPS / "study.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| study_{name}\.py \|.*\|$", plan, re.M)
    seeds, trials = (text.strip() for text in line.strip("|").split("|")[2:])
    first, last = (int(text) for text in seeds.split("–"))
    spec = sweeps[name]
    assert list(spec.seed_range) == list(range(first, last + 1))
    assert len(spec.expand()) == int(trials.replace(" ", ""))


def test_what_judges_shares_no_seed_with_what_settles(sweeps: dict[str, SweepSpec]) -> None:
    assert all(max(spec.seed_range) < 1000 for spec in sweeps.values())


def test_every_cell_has_a_settled_rate() -> None:
    """Of the committed export; the sweep that settles them may be on its way."""
    try:
        rates = settled_lrs(SWEEPS / "study" / "rates")
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))
    chosen = {lr for arms in rates.values() for own in arms.values() for lr in own.values()}
    assert chosen <= {5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2} and len(chosen) > 2
    assert set(rates) == set(FORMATS)
