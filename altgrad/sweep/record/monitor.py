"""What a sweep's folder says about it, while it runs and afterwards: how far it is, and why trials stopped.

Only the ledger is read, never Ray, so the answers are the same on another machine and after everything has
ended.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from altgrad.sweep.complaints import SpecError, nearest
from altgrad.sweep.record.folder import FolderError, check_ledger, damaged_text, has_driver, is_locked
from altgrad.sweep.record.held import READER_SECONDS
from altgrad.sweep.record.layout import shards
from altgrad.sweep.record.ledger import WAITING, Ledger, outdated_text
from altgrad.sweep.record.progress import ending_name
from altgrad.training.outcome import RESULT_KINDS, TRACEBACK, Outcome, OutcomeKind

WHY_COLUMNS = ("trial", "format", "arm", "policy", "seed", "ending", "layer", "step", "message")


@contextlib.contextmanager
def open_ledger(out: Path) -> Iterator[Ledger]:
    """The ledger in `out`, for reading; SpecError, with the nearest sweep beside it, for none or a damaged one."""
    path = out / "ledger.sqlite"
    try:
        is_recorded = check_ledger(path, READER_SECONDS) or bool(shards(out))
    except (FolderError, OSError) as error:
        raise SpecError(str(error)) from None
    if path.exists() and not is_recorded:
        raise SpecError(f"{path} is empty: no sweep has been recorded in it")
    if not is_recorded:
        beside = [item.parent.name for item in out.absolute().parent.glob("*/ledger.sqlite")]
        raise SpecError(f"{out}: no sweep in this folder (no ledger.sqlite){nearest(out.name, beside)}")
    try:
        with Ledger.reading(path) as ledger:
            yield ledger
    except sqlite3.DatabaseError as error:
        raise SpecError(damaged_text(path, error)) from None


def notices(out: Path) -> list[str]:
    """What the driver has said of the cluster, a line each: removed groups and, while it runs, what trials wait for."""
    with open_ledger(out) as ledger:
        found = ledger.notices()
    waiting = found.pop(WAITING, None)
    return [*found.values(), *([f"waiting for resources: {waiting}"] if waiting and has_driver(out) else [])]


def status(out: Path) -> tuple[str, list[tuple[str, str]]]:
    """One line on how far the sweep is, and how many trials are in which state."""
    with open_ledger(out) as ledger:
        outdated = ledger.outdated()
        trials, outcomes, rows = ledger.trials(), ledger.outcomes(), ledger.row_counts()
    for name in outdated:
        for found in (trials, outcomes, rows):
            found.pop(name, None)
    started = sum(1 for trial_id in trials if trial_id not in outcomes and trial_id in rows)
    counts = Counter(ending_name(outcome) for outcome in outcomes.values())
    counts.update({"started": started, "waiting": len(trials) - len(outcomes) - started})
    driver = "a driver is running" if has_driver(out) else "no driver is running"
    headline = f"{out}: {len(outcomes)} of {len(trials)} trials ended, {sum(rows.values())} steps recorded; {driver}"
    headline += f"; {outdated_text(len(outdated))}" if outdated else ""
    return headline, [(name, str(count)) for name, count in counts.items() if count]


def why(out: Path, trial: str | None = None) -> list[tuple[str, ...]]:
    """Rows of WHY_COLUMNS: every trial that began and did not run to its end in its own format.

    With `trial` those whose id begins so.
    """
    with open_ledger(out) as ledger:
        trials, outcomes, steps = ledger.trials(), ledger.outcomes(), ledger.row_counts()
    wanted = {trial_id: found for trial_id, found in trials.items() if trial_id.startswith(trial or "")}
    if not wanted:
        raise SpecError(f"{trial!r} is no trial of {out}{nearest(str(trial), trials)}")
    if trial is None:
        wanted = {
            trial_id: found
            for trial_id, found in wanted.items()
            if (trial_id in outcomes and not _is_own(outcomes[trial_id]))
            or (trial_id not in outcomes and (trial_id in steps or (out / "trials" / trial_id).exists()))
        }
    is_driven = has_driver(out)
    return [
        _line(found, outcomes.get(trial_id), steps.get(trial_id, 0), out / "trials" / trial_id, is_driven)
        for trial_id, found in wanted.items()
    ]


def _is_own(outcome: Outcome) -> bool:
    """Whether the trial ran to its end, in its own format."""
    return outcome.kind is OutcomeKind.DONE and not outcome.formats


def mutations(out: Path, trial: str | None = None) -> list[str]:
    """What members of populations took over, a line each: of all trials, or of those whose id begins with `trial`."""
    with open_ledger(out) as ledger:
        found, _ = ledger.mutations([name for name in ledger.trials() if name.startswith(trial or "")])
    return [
        f"{name} at step {step}: {field} {before:g} -> {after:g}, weights of {source}"
        for name, step, field, before, after, source in found
    ]


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _line(trial: dict[str, Any], outcome: Outcome | None, steps: int, folder: Path, is_driven: bool) -> tuple[str, ...]:
    if outcome is None:
        ending = ("unfinished", "", str(steps), _unfinished(folder, is_driven))
    else:
        shifted = f"shifted: {outcome.formats}" if outcome.formats else ""
        message = "; ".join(filter(None, (outcome.message, shifted)))
        ending = (ending_name(outcome), outcome.layer or "", str(outcome.step), message)
    text = folder / TRACEBACK
    if text.exists() and (outcome is None or outcome.kind not in RESULT_KINDS):
        ending = (*ending[:3], "; ".join(filter(None, (ending[3], f"traceback: {text}"))))
    return (folder.name, trial["format"], trial["arm"], trial["policy"], str(trial["seed"]), *ending)


def _unfinished(folder: Path, is_driven: bool) -> str:
    """What can be seen of a trial that has no ending."""
    if not folder.exists():
        return "has not begun" if is_driven else "has not begun; no driver is running"
    if not is_driven:
        return "its driver is gone; the same command goes on from the last checkpoint"
    if is_locked(folder / ".lock"):
        return "is at work"
    return "began, and nothing that this machine sees is at work on it now: it waits, or runs on another node"
