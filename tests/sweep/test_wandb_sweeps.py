"""Which sweep W&B runs make: the one that the latest of them were part of, as the ledger would have it.

Runs are written down here as W&B gives them, so nothing is trained.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from altgrad import NUMERICS_VERSION
from altgrad.analysis.records import mutations
from altgrad.analysis.sweeps import Sweep, read_sweep
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.wandb_names import DATA, MANIFEST, MUTATIONS, PLACE, metrics_of, summary_of
from altgrad.sweep.record.wandb_runs import WandbRun
from altgrad.sweep.record.wandb_sweep import sweep_from
from altgrad.sweep.space.sampling import OptunaSearch
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import flat

SHA = "d" * 64
SPEC = SweepSpec.model_validate({"name": "some", "formats": ["E5M2"], "optimizers": ["adamw"], "seeds": 2, "steps": 20})
WIDER = SPEC.changed(formats=("E5M2", "E3M4"), steps=40, margin=0.3)
POPULATION = SweepSpec.model_validate(
    SPEC.model_dump() | {"scheduler": "pbt", "lrs": [1e-3, 2e-3], "steps": 60, "seeds": 1}
)
SEARCH = SweepSpec.model_validate(
    SPEC.model_dump() | {"search": "optuna", "num_samples": 2, "seeds": 1, "optimizers": ["adamw", "grid"]}
)


class Told:
    """Runs that are given."""

    name = title = "here"

    def __init__(self, *runs: WandbRun) -> None:
        self._runs, self.others = runs, 0
        self.notes: list[str] = []

    def groups(self) -> Mapping[str, int]:
        return Counter(run.group for run in self._runs)

    def runs(self, group: str) -> Iterator[WandbRun]:
        return (run for run in self._runs if run.group == group)


def manifest(spec: SweepSpec, hour: int = 1, **more: Any) -> dict[str, Any]:
    started = f"2026-01-01T{hour:02d}:00:00+0000"
    return {"spec": spec.model_dump(mode="json"), "numerics": NUMERICS_VERSION, "started": started} | more


def run_of(name: str, config: TrainConfig, sweep: Mapping[str, Any], place: int = 0, **summary: Any) -> WandbRun:
    """A trial's run that has ended at its last step."""
    values = flat(config.model_dump(mode="json")) | {DATA: SHA, MANIFEST: json.dumps(sweep), PLACE: place}
    row = {"step": config.steps, "train_loss": 3.0, "val_loss": 2.0 + place}
    done = Outcome(OutcomeKind.DONE, config.steps, val_loss=2.0 + place)
    return WandbRun(name, "some", float(place), values, [metrics_of(row)], summary_of(done, ()) | summary)


def runs_of(spec: SweepSpec, sweep: Mapping[str, Any], **summary: Any) -> list[WandbRun]:
    trials = spec.trials(SHA)
    return [run_of(name, trials[name], sweep, place, **summary) for place, name in enumerate(trials)]


def sweep_of(runs: list[WandbRun], out: Path) -> tuple[Sweep, list[str]]:
    notes = sweep_from(Told(*runs), None, out)
    return read_sweep(out), notes


def test_the_last_sweep_is_made_with_what_it_had_still_to_run(tmp_path: Path) -> None:
    earlier, later = runs_of(SPEC, manifest(SPEC)), runs_of(WIDER, manifest(WIDER, hour=2))
    last = next(run for run in later if run.config["format"] == "E3M4")
    found, notes = sweep_of([last, *reversed(earlier)], tmp_path)
    assert list(found.selected.trials["trial_id"]) == list(WIDER.trials(SHA)) and notes == []
    states = dict(zip(found.selected.trials["trial_id"], found.selected.trials["outcome"], strict=True))
    assert [name for name, state in states.items() if state == "done"] == [last.id], "of 40 steps the others lack 20"
    assert (found.margin(None), found.selected.outside) == (0.3, 0)
    narrower, _ = sweep_of([*later, *runs_of(SPEC, manifest(SPEC, hour=3))[:1]], tmp_path / "narrower")
    assert list(narrower.selected.trials["trial_id"]) == list(SPEC.trials(SHA))
    assert narrower.selected.outside == len(WIDER.trials(SHA)) - len(SPEC.trials(SHA)), "they are told of, not mixed in"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"numerics": NUMERICS_VERSION + 1}, "another version of the numerics", id="numerics"),
        pytest.param({"spec": manifest(SPEC)["spec"] | {"flavour": 1}}, "(flavour: ", id="unknown_setting"),
        pytest.param({"spec": None}, "earlier AltGrad", id="no_spec"),
    ],
)
def test_a_sweep_of_another_version_holds_all_its_runs_in_their_order(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    sweep = {name: value for name, value in (manifest(SPEC) | change).items() if value is not None}
    trials = [run_of(f"trial{4 - place}", c, sweep, place) for place, c in enumerate(SPEC.expand())]
    found, [note] = sweep_of(trials[::-1], tmp_path)
    assert list(found.selected.trials["trial_id"]) == [run.id for run in trials] and said in note
    assert set(found.selected.trials["numerics"]) == {sweep["numerics"]}


def test_a_search_holds_what_it_chose(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        search = OptunaSearch(SEARCH, SHA, ledger)
        for _ in range(2):
            assert search.propose()
    chosen = SEARCH.trials(SHA) | search.trials
    own = [run_of(name, config, manifest(SEARCH), place) for place, (name, config) in enumerate(chosen.items())]
    other = SEARCH.model_copy(update={"formats": ("E3M4",)})
    [stranger, *_] = [c for c in SPEC.changed(formats=("E3M4",)).expand() if c.format == "E3M4"]
    found, _ = sweep_of([*own[::-1], run_of("stranger", stranger, manifest(other, hour=0), 9)], tmp_path / "back")
    assert list(found.selected.trials["trial_id"]) == list(chosen)
    assert found.selected.outside == 1


def test_a_population_holds_what_its_members_took_over(tmp_path: Path) -> None:
    taken = [[20, "lr", 1e-3, 2e-3, "another", 1]]
    runs = runs_of(POPULATION, manifest(POPULATION))
    member = next(run for run in runs if "-" in run.id)
    runs[runs.index(member)] = WandbRun(**vars(member) | {"summary": {**member.summary, MUTATIONS: json.dumps(taken)}})
    found, _ = sweep_of(runs, tmp_path)
    assert list(found.selected.trials["trial_id"]) == list(POPULATION.trials(SHA))
    assert mutations(tmp_path, [member.id]) == [(member.id, 20, "lr", 1e-3, 2e-3, "another")]


BROKEN = {
    "format": ({"format": "E9M9"}, "format: "),
    "unknown": ({"model.flavour": 1}, "model.flavour: "),
    "nested": ({"format.name": "E5M2"}, "'format.name' is below a value"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_says_no_trial_is_named_and_left_out(name: str, tmp_path: Path) -> None:
    change, said = BROKEN[name]
    runs = runs_of(SPEC, manifest(SPEC))
    broken = WandbRun(**vars(runs[0]) | {"config": {**runs[0].config, **change}})
    found, [note] = sweep_of([broken, *runs[1:]], tmp_path / "back")
    assert note.startswith(f"run {broken.id} is left out") and said in note
    states = found.selected.trials.set_index("trial_id")["outcome"]
    assert states.pop(broken.id) == "pending" and set(states) == {"done"}
    with pytest.raises(SpecError, match=f"no run of 'some' can be read: run {broken.id} is left out"):
        sweep_from(Told(broken), None, tmp_path / "nothing")


def test_an_unknown_ending_is_one_too(tmp_path: Path) -> None:
    [first, *rest] = runs_of(SPEC, manifest(SPEC))
    first = WandbRun(**vars(first) | {"summary": {"outcome/kind": "vanished", "outcome/step": 3}})
    _, [note] = sweep_of([first, *rest], tmp_path)
    assert first.id in note and "'vanished'" in note


def test_metrics_that_are_unknown_are_named(tmp_path: Path) -> None:
    [first, *rest] = runs_of(SPEC, manifest(SPEC))
    first.metrics[0].update({f"train/new_{number}": 1.0 for number in range(7)})
    _, [note] = sweep_of([first, *rest], tmp_path)
    assert note.startswith("7 metrics are left out") and "train/new_0, " in note and note.endswith("...")
