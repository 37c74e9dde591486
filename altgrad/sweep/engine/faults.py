"""Trials that could not end themselves, and what ends a sweep.

What a trial raises it answers itself. Here is what reaches the driver through Ray instead: processes and nodes that
died, and errors from before or beside the trial's own code (a module that a node lacks, a GPU that is not there, a
collective that can't start). Only Ray's text is left of them, with the true error inside. The text is kept beside the
trial, and its first true line is the outcome's message.

An error that comes back is not cured by more trials: three alike end the sweep.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ray import tune

from altgrad.sweep.engine.executors import hung_at
from altgrad.sweep.record.budget import Meter
from altgrad.training.devices import NoGpu
from altgrad.training.outcome import RESULT_KINDS, TRACEBACK, Outcome, OutcomeKind

EQUAL_ERRORS = 3
MESSAGE = 200
"""Characters of Ray's text that a message holds."""
FAILURES = {OutcomeKind.BUG, OutcomeKind.OOM, OutcomeKind.NODE_LOST, OutcomeKind.TIMEOUT}
VARYING = re.compile(r"\bon [\w.-]+(?=: )|\b0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+")
"""What differs between errors that are the same: hosts, addresses, ids, numbers."""
FRAME = re.compile(r'(\s*)File ".+", line \d+')


class Breaker(tune.Stopper):
    """Ends the sweep when more trials would fail alike, or the budget is used up."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._bugs: Counter[str] = Counter()
        self._alike: tuple[str, int] = ("", 0)
        self._meter = meter
        self.reason: str | None = None
        """what ends the sweep, or None"""

    def __reduce__(self) -> tuple[type[Breaker], tuple[()]]:
        """As for `Follower`: the meter's ledger can't go along."""
        return Breaker, ()

    def count(self, outcome: Outcome) -> None:
        """A trial has ended so.

        A bug counts wherever it stands. Other errors (memory, a node, a time limit) may be one cell's or one node's
        own: they count while nothing but the same comes. Numbers, names of hosts and addresses may differ.
        """
        if outcome.kind in RESULT_KINDS:
            self._alike = ("", 0)
        if outcome.kind not in FAILURES:
            return
        error = f"{outcome.kind}: {VARYING.sub('#', outcome.message)}"
        self._alike = (error, self._alike[1] + 1 if self._alike[0] == error else 1)
        self._bugs[error] += outcome.kind is OutcomeKind.BUG
        if max(self._alike[1], self._bugs[error]) >= EQUAL_ERRORS:
            self.end(f"{EQUAL_ERRORS} trials failed alike: {outcome.message}")

    def end(self, reason: str) -> None:
        """Ends the sweep for a reason, in words; the first one stays."""
        self.reason = self.reason or reason

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.reason is not None or (self._meter is not None and self._meter.exceeded is not None)


def fault(trial: Any, folder: Path) -> Outcome:
    """What ended a trial that could not end itself, from Ray's own words, which are left in its folder."""
    file = None if trial.error_file is None else Path(trial.error_file)
    text = (
        file.read_text(encoding="utf-8", errors="replace").strip() if file is not None and file.exists() else ""
    ) or "the actor died"
    step = int((trial.last_result or {}).get("step", 0))
    hung = hung_at(folder)
    if hung is not None:
        return Outcome(OutcomeKind.TIMEOUT, step, message=f"a log interval did not end in time: {hung}")
    return told(text, step, folder)


def told(text: str, step: int, folder: Path) -> Outcome:
    """The ending that a text with tracebacks tells of; the text is left in the trial's folder."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRACEBACK).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    error = raised(text)
    return Outcome(_kind(text, error), step, message=(error or text.splitlines()[-1])[:MESSAGE])


def raised(text: str) -> str | None:
    """The line that names the innermost Python error in a text with tracebacks; None where there is no such error.

    A pydantic error is told by the line that says why. What Ray itself raises when processes die is no such error.
    """
    lines = text.splitlines()
    frames = [(i, found[1]) for i, line in enumerate(lines) if (found := FRAME.match(line))]
    if not frames:
        return None
    place, indent = frames[-1]
    # Code and marks below a frame stand further in than the frame; the error further out.
    after = [line for line in lines[place + 1 :] if line.strip()]
    while after and after[0].startswith(indent):
        del after[0]
    if not after:
        return None
    if "validation error" in after[0] and len(after) > 2:
        return f"{after[1].strip()}: {after[2].strip().split(' [type=')[0]}"
    name, _, said = after[0].strip().partition(": ")
    short = name.rpartition(".")[2]
    return None if name.startswith("ray.") else f"{short}: {said}" if said else short


def _kind(text: str, error: str | None) -> OutcomeKind:
    name = (error or "").partition(":")[0]
    if "OutOfMemory" in text or "low on memory" in text or name == "MemoryError":
        return OutcomeKind.OOM
    if name == "TimeoutError" or (error is None and "TimeoutError" in text):
        return OutcomeKind.TIMEOUT
    return OutcomeKind.NODE_LOST if error is None or name == NoGpu.__name__ else OutcomeKind.BUG
