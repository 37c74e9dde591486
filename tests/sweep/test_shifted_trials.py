"""A trial that an emergency shift mended: its scheduler judges as its worker does, and every ending names both formats.

Without Ray: what a `TrialRun` yields is given to the scheduler, the recorder and the ledger.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from altgrad.sweep.engine.executors import PAUSED, TrialRun, run_request
from altgrad.sweep.pace.objectives import OBJECTIVES, value_of
from altgrad.sweep.pace.schedulers import HealthScheduler
from altgrad.sweep.record.ledger import Ledger, as_asked
from altgrad.sweep.record.recorder import Recorder
from altgrad.training import TrainConfig, Trainer
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import read_rows

ALWAYS = "flip_yield/min < 1e9 for 3"
SHIFT = {"kind": "format_shift", "rules": [f"{ALWAYS} after 10"]}


def config(*interventions: dict[str, Any], guard: str = f"{ALWAYS} after 10") -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"layers": 1, "heads": 2, "width": 32, "block": 32},
            "data": {"batch": 4, "eval_batches": 1},
            "steps": 40,
            "log_interval": 5,
            "eval_interval": 10,
            "checkpoint_interval": 10,
            "format": "E4M3",
            "guards": (guard,),
            "interventions": interventions,
        }
    )


def attempt(own: TrainConfig, folder: Path, **rest: str) -> TrialRun:
    return TrialRun(run_request(folder.name, own, folder, own_guards=bool(own.interventions)) | rest)


def tune_trial(folder: Path) -> Any:
    return SimpleNamespace(config={"trial": {"trial_id": folder.name}})


def scheduled(own: TrainConfig, folder: Path, interruption: str) -> tuple[HealthScheduler, dict[str, Any]]:
    """The scheduler behind a trial that ran until it ended or was stopped, and the trial's last result."""
    scheduler, trial = HealthScheduler({folder.name: own}), tune_trial(folder)
    run = attempt(own, folder, **({"until": "20"} if interruption == "pause" else {}))
    deaths = 3 if interruption == "death" else 0
    while True:
        result = run.step()
        if result.get("done"):
            scheduler.on_trial_complete(None, trial, result)
            if PAUSED not in result:
                return scheduler, result
            run = attempt(own, folder)
        elif scheduler.on_trial_result(None, trial, result) == "STOP":
            run.release()
            return scheduler, result
        elif deaths and result["step"] == 25:  # the checkpoint is of step 20
            run.release()
            run, deaths = attempt(own, folder), deaths - 1


@pytest.mark.parametrize("interruption", ["none", "death", "pause"])
def test_the_scheduler_lets_a_mended_run_go_on_and_stops_another_where_its_guards_would(
    tmp_path: Path, interruption: str
) -> None:
    mended, folder = config(SHIFT), tmp_path / "mended"
    scheduler, last = scheduled(mended, folder, interruption)
    assert (last["outcome"], scheduler.verdicts) == ("done", {})
    alone = Trainer(mended)
    outcome = alone.run()
    losses = [row["train_loss"] for row in read_rows(folder / "metrics.jsonl")[0]]
    assert losses == [row["train_loss"] for row in alone.rows], "the same trajectory, bitwise"
    recorded = Outcome.from_dict(json.loads((folder / "outcome.json").read_text()))
    assert recorded.formats == outcome.formats and "E4M3->E3M4" in str(outcome.formats)

    left_to_it, _ = scheduled(config(), tmp_path / "stopped", interruption)
    verdict = left_to_it.verdicts["stopped"]
    assert (verdict.kind, verdict.step, verdict.first_seen, verdict.formats) == ("stalled", 30, 15, None)


@pytest.mark.parametrize(
    "ending", ["stopped by the scheduler", "stopped by its own guard", "pruned", "timeout", "bug", "budget"]
)
def test_every_ending_behind_a_shift_names_both_formats(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = "flip_yield/min < 1e9 for 2" if ending == "stopped by its own guard" else ALWAYS
    own, folder = config(SHIFT, guard=f"{guard} after 25"), tmp_path / "trials" / "t"
    scheduler, run = HealthScheduler({"t": own}), attempt(own, folder)
    result: dict[str, Any] = {}
    while result.get("step", 0) < 30:  # the shift is at 25
        result = run.step()
        scheduler.on_trial_result(None, tune_trial(folder), result)
    made: Outcome | None = None
    if ending == "stopped by its own guard":
        run.step()
    elif ending == "bug":
        monkeypatch.setattr(run._trainer, "_interval", lambda: {}["planted"])
        assert run.step()["outcome"] == "bug"
    elif ending == "stopped by the scheduler":
        row = json.loads(result["guarded"])
        for step in (35, 40, 45, 50):
            result |= {"guarded": json.dumps(row | {"step": step})}
            scheduler.on_trial_result(None, tune_trial(folder), result)
        made = scheduler.verdicts["t"]
        assert made.formats and "stopped by the scheduler" in made.message
    else:
        made = Outcome(OutcomeKind(ending), 30)
    run.release()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials({"t": own}, "0" * 64)
        assert Recorder(ledger, tmp_path / "trials").finish("t", made) is not None
        kept = ledger.outcomes()["t"]
        assert str(kept.kind) in ("stalled", "pruned", "timeout", "bug", "budget")
        assert kept.formats is not None and kept.formats.endswith(": E4M3->E3M4")
        told = Outcome.from_dict(json.loads((folder / "outcome.json").read_text()))
        assert told.formats == kept.formats, "the trial's folder says what the ledger says"


MOVED = "lm_head: E4M3->E5M2"


def test_a_shifted_run_counts_as_shifted_from_its_shift_on(tmp_path: Path) -> None:
    own = TrainConfig(steps=100, format="E4M3", interventions=({"kind": "format_shift"},))
    whole = Outcome(OutcomeKind.DONE, 100, val_loss=2.0, formats=f"{MOVED}, lm_head: E5M2->BF16")
    values = {"train_loss": 2.5, "val_loss": 2.5, "bits_per_byte": 3.6}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials({"t": own}, "0" * 64)
        for step, moved in ((20, ""), (50, MOVED), (100, whole.formats)):
            ledger.record_rows("t", [values | {"step": step, "formats": moved}])
        ledger.record_outcome("t", whole)
        assert ledger.scores("t") == [(20, 2.5), (50, float("inf")), (100, float("inf"))]
        for steps, moved in ((20, None), (50, MOVED), (100, whole.formats)):
            short = own.model_copy(update={"steps": steps})
            asked = as_asked(whole, short, values | {"formats": ledger.formats_at("t", steps)})
            assert asked == replace(whole, step=steps, formats=moved, **values)
            assert value_of(ledger, "t", short, "val_loss") == (2.5 if moved is None else OBJECTIVES["val_loss"].worst)
    old = as_asked(whole, own.model_copy(update={"steps": 50}), values)
    assert old is not None and old.formats == whole.formats, "rows of an earlier version do not say when"
