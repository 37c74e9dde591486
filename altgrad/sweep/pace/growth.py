"""A sweep that grows while it runs: what an Optuna search chooses is entered as it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.sampling import OptunaSearch
from altgrad.training.config import TrainConfig


class Growth:
    """Hands out the trials of new samples that are to be run; `admit` records them first.

    A sample whose trials have all ended before (in a grid that stands in the same folder, say) is told at once.
    """

    def __init__(
        self,
        search: OptunaSearch,
        ledger: Ledger,
        trials: Mapping[str, TrainConfig],
        admit: Callable[[Mapping[str, TrainConfig]], None],
    ) -> None:
        self.trials = trials
        """all of the sweep, by id"""
        self._search, self._ledger, self._admit = search, ledger, admit

    @property
    def planned(self) -> int:
        """Trials that may still come."""
        return self._search.planned

    def more(self) -> dict[str, TrainConfig]:
        """The trials of the next sample that has something to run; empty where there is none."""
        while (new := self._search.propose()) is not None:
            self._admit(new)
            left = self._ledger.remaining(new)
            for trial_id in new:
                if trial_id not in left:
                    self._search.ended(trial_id)
            if left:
                return left
        return {}

    def ended(self, trial_id: str) -> None:
        """A trial's ending stands in the ledger."""
        self._search.ended(trial_id)

    def close(self) -> None:
        self._search.close()
