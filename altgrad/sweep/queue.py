"""The trials in their order, handed to Ray Tune one by one, each when what it waits for has ended.

Tune's own grid would start every trial as soon as a slot is free, and would hold all of them in memory from the
start. This is a searcher only in name: nothing is searched, and its order is the sweep's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.search import Searcher


class TrialQueue(Searcher):
    """`requests`: what the executor needs, by trial, in order; `waits`: the trial that must have ended first."""

    def __init__(self, requests: Mapping[str, Any], waits: Mapping[str, str]) -> None:
        super().__init__()
        self._left = dict(requests)
        self._waits = waits
        self._running: dict[str, str] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's request; None while all that are left wait."""
        if not self._left:
            return str(Searcher.FINISHED)
        open_trials = {*self._left, *self._running.values()}
        ready = next((name for name in self._left if self._waits.get(name) not in open_trials), None)
        if ready is None:
            return None
        self._running[trial_id] = ready
        return {"trial": self._left.pop(ready)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.pop(trial_id, None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger knows what is left."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger knows what is left."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the ledger knows what is left."""
