"""One trial inside Ray, under either executor, in the one training loop.

One-device trials run in a Tune actor that is reused from trial to trial: a fresh process pays for importing torch each
time, a reused actor pays 1.3 CPU-seconds for a whole trivial trial. Trials of several workers run under Ray Train
(`train_executor.py`). Both take a trial's request and hand out one small result per log interval; the trial's folder,
not the result, is the record. The first worker owns the folder through the Trainer and resumes from the checkpoint
there by itself; Ray's own checkpoints carry nothing, so a retry after a death starts the same way as a first attempt.

An exception in a trial must not cost the others anything: it becomes an outcome (`oom` or `bug`) in the trial's own
folder, with the whole traceback beside it. Out of memory is first answered by halving the micro-batch, once. A folder
that another living process owns, a GPU that is not there or has failed are no bugs of the trial: these errors go to
Ray, which tries again in a fresh process, maybe elsewhere. A trial that hangs can't say so: a watchdog ends its
process, and leaves in the folder where it hung.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ray import tune

from altgrad.sweep.complaints import headline
from altgrad.sweep.record.folder import is_disk_full
from altgrad.training.config import TrainConfig
from altgrad.training.devices import NoGpu, own_device
from altgrad.training.guards import guarded_view
from altgrad.training.outcome import FAILED, HUNG, TRACEBACK, Outcome, OutcomeKind
from altgrad.training.record import read_outcome, to_plain, write_json
from altgrad.training.reference import ReferenceCurve
from altgrad.training.trainer import Trainer
from altgrad.training.workers import ALONE, Workers

REPORTED = ("step", "train_loss", "val_loss", "bits_per_byte", "tokens_per_s", "f1_micro", "samples_per_s", "formats")
GUARDED = "guarded"
"""Where a result carries what the scheduler's own look at the guards needs, as JSON."""
PAUSED = "paused"
"""In a result that ends a trial for now: it has come to the step at which it waits."""


def run_request(
    trial_id: str,
    config: TrainConfig,
    folder: Path,
    reference: str | None = None,
    *,
    own_guards: bool = True,
    interval_timeout: float = 0.0,
    gpus: float = 0.0,
    text_sha256: str = "",
    keep_checkpoints: bool = False,
) -> dict[str, str]:
    """What an executor needs to run a trial; plain strings, so that Ray has nothing to interpret.

    `folder` is the trial's, beside its reference's. Without `own_guards` only the scheduler stops it. Where a log
    interval takes longer than `interval_timeout` seconds, the trial hangs; 0 for no limit. `gpus`: what each of its
    processes asks Ray for. `text_sha256`: of the text that the trial's id stands for. `keep_checkpoints`: all of them,
    not only the newest. A key `until` may be added: the step at which the trial pauses, with a checkpoint.
    """
    return {
        "trial_id": trial_id,
        "config": config.model_dump_json(),
        "folder": str(folder),
        "reference": reference or "",
        "own_guards": "yes" if own_guards else "",
        "interval_timeout": str(interval_timeout),
        "gpus": str(gpus),
        "text_sha256": text_sha256,
        "keep_checkpoints": "yes" if keep_checkpoints else "",
    }


def read_reference(trials: Path, reference: str) -> ReferenceCurve | None:
    """The curve of the reference among these trials' folders, where it ran to its end in its own format."""
    outcome = read_outcome(trials / reference / "outcome.json") if reference else None
    # One of which a layer had to be moved to another format is no healthy run to hold others against.
    is_done = outcome is not None and outcome.kind is OutcomeKind.DONE and outcome.formats is None
    return ReferenceCurve.read(trials / reference) if is_done else None


class TrialRun:
    """A request at work in this process, one of `workers`; `step` trains one log interval."""

    def __init__(self, request: Mapping[str, str], workers: Workers = ALONE) -> None:
        self._request = request
        self._folder = Path(request["folder"])
        self._until = int(request.get("until", 0))
        self._patience = float(request.get("interval_timeout", 0))
        self._reference, self._own_guards = request["reference"], bool(request["own_guards"])
        self._gpus = float(request.get("gpus", 0))
        self._workers = workers
        self._trainer: Trainer | None = None
        self._rows: Iterator[dict[str, Any]] | None = None
        self._reached = 0

    def step(self) -> dict[str, Any]:
        """One log interval's result, or the ending."""
        try:
            with self._watched():
                return self._interval()
        except (TimeoutError, NoGpu):
            raise
        except Exception as error:  # the boundary: whatever a trial raises is that trial's own outcome
            if is_disk_full(error):
                raise
            if not is_out_of_memory(error):
                if isinstance(error, torch.AcceleratorError):
                    raise  # after an error of the device, nothing works in this process any more
                return self._failed(OutcomeKind.BUG, error)
            if not self._can_halve():
                return self._failed(OutcomeKind.OOM, error)
        # Beyond the error, whose traceback holds the model and all that filled the memory.
        self.release()
        self._workers = replace(self._workers, micro_batches=2)
        return self.step()

    def release(self) -> None:
        """Closes the generator, which unlocks the folder, and drops the model."""
        if self._rows is not None:
            self._rows.close()  # type: ignore[attr-defined]
        self._rows = self._trainer = None

    def _interval(self) -> dict[str, Any]:
        if self._trainer is None or self._rows is None:
            self._trainer = Trainer(
                TrainConfig.model_validate_json(self._request["config"]),
                folder=self._folder,
                reference=read_reference(self._folder.parent, self._reference),
                guarded=self._own_guards,
                workers=self._workers,
                device=own_device(self._gpus),
                text_sha256=self._request.get("text_sha256") or None,
                keep_checkpoints=bool(self._request.get("keep_checkpoints")),
            )
            self._rows = self._trainer.intervals()
        row = next(self._rows, None)
        outcome = self._trainer.outcome
        if outcome is None:
            assert row is not None, "a run without an outcome goes on"
            self._reached = row["step"]
            reported = {name: row[name] for name in REPORTED if name in row}
            reported |= {GUARDED: json.dumps(to_plain(guarded_view(row, self._trainer.config.guards)))}
            if self._until and row["step"] >= self._until and row["step"] % self._trainer.config.eval_interval == 0:
                self._trainer.checkpoint()
                self.release()
                return {PAUSED: True, "done": True, **reported}
            return reported
        self.release()
        (self._folder / TRACEBACK).unlink(missing_ok=True)
        return _ending(outcome)

    def _can_halve(self) -> bool:
        """Whether smaller pieces are possible and not tried yet."""
        batch = TrainConfig.model_validate_json(self._request["config"]).data.batch
        shares = batch // self._workers.world
        return self._workers.micro_batches == 1 and self._workers.world == 1 and shares % 2 == 0

    def _failed(self, kind: OutcomeKind, error: BaseException) -> dict[str, Any]:
        formats = None if self._trainer is None else self._trainer.interventions.formats
        self.release()
        if self._workers.world > 1:
            # Those that wait for this worker in a collective learn of it at once.
            torch.distributed.destroy_process_group()
        outcome = Outcome(
            kind=kind, step=self._reached, message=f"{headline(error)} {_place(error)}", formats=formats or None
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._workers.world > 1:
            try:
                (self._folder / FAILED).touch(exist_ok=False)
            except FileExistsError:
                return _ending(outcome)  # another worker failed first, and this one of it
        (self._folder / TRACEBACK).write_text(
            "".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace"
        )
        write_json(self._folder / "outcome.json", outcome.to_dict())
        return _ending(outcome)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Ends this process, its stack left in the folder, where the body takes longer than the patience."""
        if not self._patience:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{HUNG}.{os.getpid()}"
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback_later(self._patience, exit=True, file=file)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                path.unlink()


class TrialActor(tune.Trainable):
    """Runs trials one after another on one device."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._run = TrialRun(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._run.release()
        self._run = TrialRun(new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        return self._run.step()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the Trainer keeps its own checkpoint in the trial's folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the Trainer resumes by itself."""

    def cleanup(self) -> None:
        self._run.release()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the host or of a device, was what lacked."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def hung_at(folder: Path) -> str | None:
    """Where a trial hung when its watchdog ended it last: a line of its stack; None where it did not."""
    left = [path.read_text(encoding="utf-8", errors="replace") for path in folder.glob(f"{HUNG}.*")]
    lines = [line.strip() for text in left for line in text.splitlines() if line.startswith("  File")]
    return lines[0] if lines else None


def _ending(outcome: Outcome) -> dict[str, Any]:
    return {"step": outcome.step, "outcome": str(outcome.kind), "done": True}


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
