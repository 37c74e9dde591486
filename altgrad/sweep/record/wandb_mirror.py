"""Weights & Biases as a mirror of the trials' own records, one run per trial. The truth stays `metrics.jsonl`.

The mirror lives in the driver, in a thread of its own, and is told by name which trial has new rows or has ended; the
rows it reads from the trial's folder. So workers never wait for it, a trial that is killed loses nothing, and `rebuild`
makes the same runs again from the files at any time. Whatever W&B raises ends the mirror with one note, and a W&B that
hangs is left behind: neither stops a sweep, and only its end waits for it, `Mirror.patience` seconds at most.

A run has the trial's id, the sweep as its group, and `reference` or `trial` as its job type. Its step is the trial's.
Its configuration holds the sweep's settings too, so that `altgrad report --wandb` needs nothing else (`wandb_sweep`).
Offline, a trial that goes on in a later run of the sweep begins a run folder of its own with the same id; online it
continues the run, and rows that are there already are not sent again.

Measured on two busy cores: 0.17 CPU-s for a trial of the quick sweep (100 rows, ten of them with 450 signals),
1.5 CPU-s once for the import and W&B's process. W&B's list of installed packages alone would take 0.2 CPU-s more for
every run.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from altgrad.sweep.complaints import check_choice
from altgrad.sweep.record.folder import read_manifest
from altgrad.sweep.record.layout import LEDGER
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.wandb_names import (
    DATA,
    MANIFEST,
    MUTATIONS,
    PLACE,
    SIGNS,
    STEP,
    frequent,
    metrics_of,
    summary_of,
)
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import RESULT_KINDS, Outcome
from altgrad.training.record import RowReader, flat

Mode = Literal["off", "offline", "online"]
TEAR_DOWN_SECONDS = 5.0
SUMMARIES = {"val/loss": "min", "val/f1_micro": "max"}
OWN_WORDS = {"disabled": "off", "dryrun": "offline", "run": "online", "shared": "online"}
"""What W&B's own WANDB_MODE calls the modes."""


def mode_of(asked: str | None) -> Mode:
    """The mode by its flag; left out, what WANDB_MODE says, else online where WANDB_API_KEY is set, else offline.

    ValueError for an unknown mode, and for `online` where W&B has no credentials.
    """
    if asked is None:
        own = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        asked, flag = OWN_WORDS.get(own, own), "WANDB_MODE"
    else:
        flag = "--wandb"
    try:
        mode = cast(Mode, check_choice(asked, get_args(Mode), "way to mirror"))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if mode == "online" and not os.environ.get("WANDB_API_KEY"):
        import wandb

        if not wandb.login(prompt=False):
            raise ValueError(f"{flag}: 'online' needs WANDB_API_KEY or a `wandb login`; off and offline need neither")
    return mode


class TrialRun:
    """The W&B run of one trial, begun with its first row.

    Signals of layers are mirrored at checkpoints and at the last step, and those that are measured rarely whenever they
    are: at every check they would be four fifths of all that W&B holds, half a megabyte in 100 steps. Beside the record
    the table of layers has them all.
    """

    def __init__(self, out: Path, trial_id: str, mode: Mode) -> None:
        import wandb

        folder = out / "trials" / trial_id
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sweep = read_manifest(out) or {}
        self._out, self._trial_id = out, trial_id
        self._may_exchange = sweep.get("spec", {}).get("scheduler") == "pbt"
        config = TrainConfig.model_validate(record["config"])
        self._rows = RowReader(folder / "metrics.jsonl")
        self._layers_every = config.checkpoint_interval
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "altgrad"),
            dir=out,
            mode=cast(Any, mode),
            id=trial_id,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            group=sweep.get("spec", {}).get("name", out.name),
            job_type="reference" if config.is_reference else "trial",
            name=f"{config.format} {config.arm} {config.recipe_name} seed {config.seed}",
            config=flat(record["config"])
            | {DATA: record["data_sha256"]}
            | flat({"git": sweep.get("git") or {}})
            | _of_sweep(sweep, trial_id),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        self._next = self._run.step
        self._left_out: dict[str, Any] = {}
        """what was not logged of the last row"""
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        for name, best in SUMMARIES.items():
            self._run.define_metric(name, step_metric=STEP, summary=best)

    def follow(self) -> None:
        """Logs the rows that have been written since; a step that was logged before is not logged again."""
        for row in self._rows.new():
            if row["step"] >= self._next:
                metrics = metrics_of(row)
                at_checkpoint = row["step"] % self._layers_every == 0
                self._left_out = {} if at_checkpoint else {name: metrics.pop(name) for name in frequent(metrics)}
                self._run.log(metrics, step=row["step"])
                self._next = row["step"] + 1

    def end(self, outcome: Outcome | None) -> None:
        """Logs the last rows and how it ended; None for a trial that was only interrupted."""
        self.follow()
        if self._left_out:  # of the same step: W&B puts them into its row
            self._run.log(self._left_out, step=self._next - 1)
        if outcome is not None:
            self._run.summary.update(summary_of(outcome, self._run.summary.keys()) | self._in_ledger())
        is_result = outcome is not None and outcome.kind in RESULT_KINDS
        self._run.finish(exit_code=0 if is_result else 1)

    def _in_ledger(self) -> dict[str, Any]:
        """What the ledger says of a trial that has ended, beside its ending."""
        with Ledger.reading(self._out / LEDGER) as ledger:
            taken = ledger.mutations([self._trial_id])[0] if self._may_exchange else []
            found = {SIGNS: ledger.signs([self._trial_id]).get(self._trial_id)}
        return found | ({MUTATIONS: json.dumps([[*item[1:], 1] for item in taken])} if taken else {})


def _of_sweep(manifest: Mapping[str, Any], trial_id: str) -> dict[str, Any]:
    """What a report needs of the sweep beside its trials: 3 KB, as one text, and the trial's place in the sweep."""
    if not manifest:
        return {}
    kept = {name: value for name, value in manifest.items() if name not in ("trials", "argv")}
    names = manifest.get("trials") or ()
    return {MANIFEST: json.dumps(kept), PLACE: names.index(trial_id) if trial_id in names else None}


class Mirror:
    """Mirrors the trials of the sweep in `out`; `note` is told what whoever watches should know.

    `follow` and `end` return at once.
    """

    patience: float | None = 30.0
    """seconds that the end may wait; None for as long as it takes"""

    def __init__(self, out: Path, mode: Mode, note: Callable[[str], None]) -> None:
        self._out, self._mode, self._note = out.absolute(), mode, note
        self._runs: dict[str, TrialRun] = {}
        self._told: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._before: set[int] = set()
        self.is_broken = False
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        self._thread.start()

    def follow(self, trial_id: str) -> None:
        """The trial has new rows."""
        self._told.put(lambda: self._follow(trial_id))

    def end(self, trial_id: str, outcome: Outcome | None) -> None:
        """The trial has left the machine; without an outcome it was only interrupted."""
        self._told.put(lambda: self._end(trial_id, outcome))

    def close(self) -> None:
        """Waits until everything is mirrored, but no longer than `patience`."""
        self._told.put(None)
        self._thread.join(self.patience)
        if self._thread.is_alive():
            self._break(f"not done {self.patience:g} s after the last trial")

    def _work(self) -> None:
        self._before = _services()
        try:
            while (task := self._told.get()) is not None and not self.is_broken:
                task()
            for trial_id in list(self._runs):
                self._end(trial_id, None)
        except Exception as error:
            self._break(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _follow(self, trial_id: str) -> None:
        if trial_id not in self._runs and (self._out / "trials" / trial_id / "metrics.jsonl").exists():
            self._runs[trial_id] = TrialRun(self._out, trial_id, self._mode)
        if trial_id in self._runs:
            self._runs[trial_id].follow()

    def _end(self, trial_id: str, outcome: Outcome | None) -> None:
        self._follow(trial_id)
        if trial_id in self._runs:
            self._runs.pop(trial_id).end(outcome)

    def _break(self, reason: str) -> None:
        """Leaves W&B behind and ends its process, which W&B would otherwise wait for when the driver exits."""
        if self.is_broken:
            return
        self.is_broken = True
        self._note(
            f"W&B: the mirror has stopped ({reason}); the sweep is not concerned, and "
            f"altgrad wandb-sync {self._out} makes the runs again"
        )
        if own := _services() - self._before:
            import psutil

            for pid in own:
                with contextlib.suppress(psutil.Error):
                    psutil.Process(pid).kill()
            leaving = threading.Thread(target=_tear_down, daemon=True)
            leaving.start()
            leaving.join(TEAR_DOWN_SECONDS)


def _tear_down() -> None:
    """Takes back W&B's hook at exit; that its process is dead is known."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def rebuild(out: Path, outcomes: Mapping[str, Outcome | None], mode: Mode, note: Callable[[str], None]) -> int | None:
    """Makes the runs of these trials from their records, in place of earlier offline ones; returns how many, or None
    where W&B failed.
    """
    recorded = {name: end for name, end in outcomes.items() if (out / "trials" / name / "metrics.jsonl").exists()}
    # Out of the way first: W&B names a run's folder by the second, and a new run could take the old one's.
    aside = {
        path.rename(path.with_name(f"replaced-{path.name}")): path
        for name in recorded
        for path in (out / "wandb").glob(f"offline-run-*-{name}")
    }
    mirror = Mirror(out, mode, note)
    mirror.patience = None
    for trial_id, outcome in recorded.items():
        mirror.end(trial_id, outcome)
    mirror.close()
    for moved, path in aside.items():
        if not mirror.is_broken:
            shutil.rmtree(moved)
        elif not path.exists():
            moved.rename(path)
    return None if mirror.is_broken else len(recorded)


def _services() -> set[int]:
    """W&B's own processes under this one."""
    import psutil

    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                found.add(child.pid)
    return found
