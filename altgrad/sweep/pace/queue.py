"""The trials in their order, handed to Ray Tune one by one, each when what it waits for has come.

Tune's own grid would start every trial as soon as a slot is free, and would hold all of them in memory from the
start. This is a searcher only in name: its order is the sweep's, and what a search adds comes from `more`. A trial
waits for its reference to end and, in a race, at a rung for its rivals; a waiting trial holds no slot.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.tune.search import Searcher

from altgrad.sweep.engine.executors import PAUSED
from altgrad.sweep.engine.placement import Placement
from altgrad.sweep.pace.pace import Pace


class TrialQueue(Searcher):
    """`requests`: what the executor needs, by trial, in order; `waits`: the trial that must have ended first.

    `more`: asked when a slot is free and nothing is ready; enters new trials in both and names them. `slots`: how many
    may be under way now, which changes as nodes come and go. `placement`: on which kind of GPU each may run.
    """

    def __init__(
        self,
        requests: Mapping[str, dict[str, Any]],
        waits: Mapping[str, str],
        pace: Pace | None = None,
        more: Callable[[], Iterable[str]] = tuple,
        slots: Callable[[], int] = lambda: sys.maxsize,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self._more, self._slots, self._placement = more, slots, placement
        self._requests = requests
        self._left = list(requests)
        self._waits, self._pace = waits, pace or Pace()
        self._running: dict[str, str] = {}
        self._kinds: dict[str, str | None] = {}
        """of GPU, that trials were handed out with"""

    def __reduce__(self) -> tuple[type[TrialQueue], tuple[dict[str, Any], dict[str, str]]]:
        """Tune pickles its searcher for a restore that is never used; what `more` holds can't go along."""
        return TrialQueue, ({}, {})

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's request; None while all that are left wait, or no slot is free."""
        if self._running and len(self._running) >= self._slots():
            return None
        self._left = [name for name in self._left if self._pace.verdict(name) is None]
        ready = self._ready()
        if ready is None:
            self._left += self._more()
            ready = self._ready()
        if ready is None:
            return None if self._left or self._running else str(Searcher.FINISHED)
        self._left.remove(ready)
        self._running[trial_id] = ready
        request, until = self._pace.adjusted(ready, self._requests[ready]), self._pace.pause_step(ready)
        kind = None if self._placement is None else self._placement.kind(ready)
        self._kinds[trial_id] = kind
        added = {"until": until and str(until), "accelerator": kind}
        return {"trial": request | {key: value for key, value in added.items() if value is not None}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        name, kind = self._running.pop(trial_id, None), self._kinds.pop(trial_id, None)
        if name is not None and not error and PAUSED in (result or {}):
            # Before those that have not begun: its cell is the nearest to an answer.
            self._left.insert(0, name)
        elif name is not None and not error and result is None and self._is_gone(kind):
            # Taken back while it waited; it asks for another.
            self._left.insert(0, name)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger knows what is left."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger knows what is left."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the ledger knows what is left."""

    def _is_gone(self, kind: str | None) -> bool:
        return self._placement is not None and self._placement.is_gone(kind)

    def _ready(self) -> str | None:
        open_trials = {*self._left, *self._running.values()}
        return next((name for name in self._left if self._is_ready(name, open_trials)), None)

    def _is_ready(self, name: str, open_trials: set[str]) -> bool:
        return not self._pace.is_waiting(name) and self._waits.get(name) not in open_trials
