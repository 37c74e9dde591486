"""How trials of a sweep are paced: the protocol of what may make a trial wait for others, or end for their sake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome, OutcomeKind


class Pace:
    """No race and no population: nobody waits, and nobody is stopped. Races and populations change what they need.

    It is fed with losses and endings, in whatever order they come, and asked about trials by id.
    """

    most_pauses = 0
    """how often a trial waits at most"""
    hands_over = False
    """whether trials take over each other's checkpoints"""

    def __init__(self) -> None:
        self.stopped: dict[str, Outcome] = {}
        """why, for each trial that has lost"""

    def admit(self, trials: Mapping[str, TrainConfig]) -> None:
        """New trials have come, of a search that chooses as it goes."""

    def observe(self, trial_id: str, step: int, loss: float) -> None:
        """A validation loss of a trial at a step, infinite where it says nothing of its format."""

    def ended(self, trial_id: str, kind: OutcomeKind, step: int) -> None:
        """A trial ended by itself, or was ended by a guard."""

    def lost(self, trial_id: str) -> None:
        """A fault took the trial."""

    def verdict(self, trial_id: str) -> Outcome | None:
        """Why the trial has lost, or None while it goes on."""
        return self.stopped.get(trial_id)

    def pause_step(self, trial_id: str) -> int | None:
        """The step at which the trial waits for others; None where it may run to its end."""
        return None

    def is_waiting(self, trial_id: str) -> bool:
        """Whether the trial has come as far as it may, or must not start yet."""
        return False

    def adjusted(self, trial_id: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request with which the trial goes on, where its values have changed."""
        return dict(request)

    def source(self, trial_id: str, step: int) -> str | None:
        """The trial whose checkpoint this one took over at the step; None where it kept its own."""
        return None
