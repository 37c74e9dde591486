"""The study's sweeps, as sweeps/study.md has them: what each trains, at rates that were settled on other seeds."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from altgrad.sweep import SweepSpec

SWEEPS = Path(__file__).parents[2] / "sweeps"
NAMES = ("main", "long", "twins", "original", "wider", "layers", "law", "large", "classify")


@pytest.fixture(scope="module")
def sweeps() -> Iterator[dict[str, SweepSpec]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SWEEPS))
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


def test_rates_are_settled_on_seeds_that_judge_nothing(sweeps: dict[str, SweepSpec]) -> None:
    spec = sweeps["main"]
    assert all(max(other.seed_range) < 1000 for other in sweeps.values())
    chosen = {trial.optimizer.lr for trial in spec.expand()}
    assert chosen <= {5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2} and len(chosen) > 2
