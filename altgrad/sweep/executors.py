"""One trial inside Ray: a Tune actor, reused from trial to trial, that runs the one training loop.

Reuse is what makes short trials affordable: a fresh process pays for importing torch each time, a reused
actor pays 1.3 CPU-seconds for a whole trivial trial. The actor owns the trial's folder through the Trainer,
resumes from the checkpoint there by itself, and reports one small result per log interval; the folder, not
the result, is the record. Ray's own checkpoints carry nothing, so a retry after an actor's death starts the
same way as a first attempt.

An exception in a trial must not cost the others anything: it becomes an outcome (`oom` or `bug`) in the
trial's own folder, with the whole traceback beside it. A folder that another living process owns is no bug of
the trial: that error goes to Ray, which tries again.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ray import tune

from altgrad.training.config import TrainConfig
from altgrad.training.guards import guarded_view
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import from_plain, to_plain, write_json
from altgrad.training.reference import ReferenceCurve
from altgrad.training.trainer import Trainer

REPORTED = ("step", "train_loss", "val_loss", "bits_per_byte", "tokens_per_s", "f1_micro",
            "samples_per_s")
GUARDED = "guarded"
"""Where a result carries what the scheduler's own look at the guards needs, as JSON."""
PAUSED = "paused"
"""In a result that ends a trial for now: it has come to the step at which it waits."""
TRACEBACK = "traceback.txt"


def run_request(
    trial_id: str, config: TrainConfig, folder: Path, reference: str | None = None, *, own_guards: bool = True
) -> dict[str, str]:
    """What an actor needs to run a trial; plain strings, so that Ray has nothing to interpret.

    `folder` is the trial's, beside its reference's. Without `own_guards` only the scheduler stops it. A key `until`
    may be added: the step at which the trial pauses, with a checkpoint.
    """
    return {"trial_id": trial_id, "config": config.model_dump_json(), "folder": str(folder),
            "reference": reference or "", "own_guards": "yes" if own_guards else ""}


def read_reference(trials: Path, reference: str) -> ReferenceCurve | None:
    """The curve of the reference among these trials' folders, where it ran to its end."""
    ending = trials / reference / "outcome.json"
    if not reference or not ending.exists():
        return None
    outcome = Outcome.from_dict(from_plain(json.loads(ending.read_text())))
    return ReferenceCurve.read(trials / reference) if outcome.kind is OutcomeKind.DONE else None


class TrialActor(tune.Trainable):
    """Runs trials one after another; `step` trains one log interval."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._release()
        self._take(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            return self._interval()
        except TimeoutError:
            raise
        except MemoryError as error:
            return self._failed(OutcomeKind.OOM, error)
        except Exception as error:  # the boundary: whatever a trial raises is that trial's own outcome
            return self._failed(OutcomeKind.BUG, error)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the Trainer keeps its own checkpoint in the trial's folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the Trainer resumes by itself."""

    def cleanup(self) -> None:
        self._release()

    def _take(self, config: dict[str, Any]) -> None:
        request = config["trial"]
        self._config = TrainConfig.model_validate_json(request["config"])
        self._folder = Path(request["folder"])
        self._until = int(request.get("until", 0))
        self._reference, self._own_guards = request["reference"], bool(request["own_guards"])
        self._trainer: Trainer | None = None
        self._rows: Iterator[dict[str, Any]] | None = None
        self._reached = 0

    def _interval(self) -> dict[str, Any]:
        if self._trainer is None or self._rows is None:
            self._trainer = Trainer(
                self._config,
                folder=self._folder,
                reference=read_reference(self._folder.parent, self._reference),
                guarded=self._own_guards,
            )
            self._rows = self._trainer.intervals()
        row = next(self._rows, None)
        outcome = self._trainer.outcome
        if outcome is None:
            assert row is not None, "a run without an outcome goes on"
            self._reached = row["step"]
            if self._until and row["step"] >= self._until and "val_loss" in row:
                self._trainer.checkpoint()
                self._release()
                return {PAUSED: True, "done": True, **{name: row[name] for name in REPORTED if name in row}}
            return {name: row[name] for name in REPORTED if name in row} | {
                GUARDED: json.dumps(to_plain(guarded_view(row, self._config.guards)))
            }
        self._release()
        (self._folder / TRACEBACK).unlink(missing_ok=True)
        return _ending(outcome)

    def _failed(self, kind: OutcomeKind, error: BaseException) -> dict[str, Any]:
        self._release()
        message = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        outcome = Outcome(kind=kind, step=self._reached, message=f"{message} {_place(error)}")
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / TRACEBACK).write_text("".join(traceback.format_exception(error)))
        write_json(self._folder / "outcome.json", outcome.to_dict())
        return _ending(outcome)

    def _release(self) -> None:
        """Closes the generator, which unlocks the folder, and drops the model."""
        if self._rows is not None:
            self._rows.close()  # type: ignore[attr-defined]
        self._rows = self._trainer = None


def _ending(outcome: Outcome) -> dict[str, Any]:
    return {"step": outcome.step, "outcome": str(outcome.kind), "done": True}


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


