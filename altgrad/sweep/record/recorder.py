"""From the workers' files to the ledger. Only the driver does this, so SQLite has one writer.

A worker appends to `metrics.jsonl` and renames `outcome.json` into place; the recorder follows each file from
where it last read, or from its start once a worker that resumes has replaced it. Rows are keyed by (trial,
step), and training is deterministic: reading a step twice changes nothing.

`ingest` does the same for everything that an earlier driver left behind when it was killed before recording
it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from altgrad.sweep.record.layer_table import FILE as LAYERS
from altgrad.sweep.record.layer_table import read_layers, write_layers
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.signs import RULES, as_text, first_moments
from altgrad.training.devices import places_of
from altgrad.training.outcome import FAILED, HUNG, Outcome
from altgrad.training.record import RowReader, read_config, read_outcome, to_plain, write_json


class Recorder:
    """Follows the trials under `folder` and keeps the ledger up with them.

    `drops` says of a trial that ended so whether its checkpoint has served its time.
    """

    def __init__(
        self, ledger: Ledger, folder: Path, *, drops: Callable[[str, Outcome], bool] = lambda *_: False
    ) -> None:
        self.ledger = ledger
        self.folder = folder
        self._drops = drops
        self._readers: dict[str, RowReader] = {}

    def expect(self, trial_id: str) -> None:
        """The trial is to begin, or to go on: what an earlier attempt left says nothing of how this one ends.

        The ledger has it.
        """
        folder = self.folder / trial_id
        for path in (folder / "outcome.json", folder / LAYERS, folder / FAILED, *folder.glob(f"{HUNG}.*")):
            path.unlink(missing_ok=True)

    def follow(self, trial_id: str) -> None:
        """Records the rows that have been written since the last call."""
        reader = self._readers.setdefault(trial_id, RowReader(self.folder / trial_id / "metrics.jsonl"))
        if rows := reader.new():
            self.ledger.record_rows(trial_id, rows)

    def finish(self, trial_id: str, stopped: Outcome | None = None) -> Outcome | None:
        """Records the last rows and the ending: the worker's own, else `stopped`, the driver's reason."""
        self.follow(trial_id)
        own = self._left(trial_id)
        if own is not None:
            outcome = self.ledger.record_outcome(trial_id, own)
        elif stopped is not None:
            outcome = self.ledger.record_outcome(trial_id, replace(stopped, **self._places(trial_id)))  # type: ignore[arg-type]
        else:
            return None
        if own is None:
            (self.folder / trial_id).mkdir(parents=True, exist_ok=True)
            write_json(self.folder / trial_id / "outcome.json", outcome.to_dict())
        # Where the driver ended it, a worker may still be saving: its checkpoint goes at the next start.
        self._tidy(trial_id, outcome, drop=own is not None, is_new=True)
        return outcome

    def ingest(self, trial_ids: Iterable[str]) -> int:
        """Records what earlier runs left and the ledger lacks; returns the number of such trials.

        Tables of layer signals that are missing are made again, and what ledgers of earlier versions lack.
        """
        known, counts, signs = self.ledger.outcomes(), self.ledger.row_counts(), self.ledger.signs()
        found = 0
        for trial_id in trial_ids:
            path = self.folder / trial_id / "metrics.jsonl"
            lines = path.read_bytes().count(b"\n") if path.exists() else 0
            outcome = self._left(trial_id)
            new_outcome = outcome is not None and _plain(outcome) != _plain(known.get(trial_id))
            if lines > counts.get(trial_id, 0) or new_outcome:
                found += 1
                self.follow(trial_id)
                if outcome is not None:
                    self.ledger.record_outcome(trial_id, outcome)
            if (ended := outcome or known.get(trial_id)) is not None:
                self._tidy(trial_id, ended, is_new=new_outcome or signs.get(trial_id) is None)
        return found

    def _tidy(self, trial_id: str, outcome: Outcome, *, drop: bool = True, is_new: bool) -> None:
        """Leaves of a trial that has ended what is to stay; of a new ending the ledger gets the first signs."""
        folder = self.folder / trial_id
        record, table = folder / "metrics.jsonl", folder / LAYERS
        if record.exists() and not (table.exists() and table.stat().st_mtime_ns >= record.stat().st_mtime_ns):
            write_layers(folder)
            is_new = True
        if is_new and record.exists():
            self.ledger.record_signs(trial_id, as_text(first_moments(read_layers(folder, RULES))))
        if drop and self._drops(trial_id, outcome):
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)

    def _places(self, trial_id: str) -> dict[str, str]:
        """Where the trial has been at work, for an ending that is not its worker's own."""
        return places_of(read_config(self.folder / trial_id).get("devices", ()))

    def _left(self, trial_id: str) -> Outcome | None:
        return read_outcome(self.folder / trial_id / "outcome.json")


def _plain(outcome: Outcome | None) -> Any:
    return None if outcome is None else to_plain(outcome.to_dict())
