"""A trial's guards, judged once more by the driver on what the worker reports.

They must count as the worker's own do, or they would stop what those let run on. The worker forgets its counts where a
layer moves to another format, and where an attempt begins it takes them from the checkpoint: after a death from an
earlier step, after a pause from the same step, after an exchange in a population from another member. So counts are
kept by step, and a check goes on from those of the check before it. Where that one was never seen (its result died
with the worker), they start again: too late a stop is the worker's to forestall, too early a one nobody's to undo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from altgrad.training.config import TrainConfig
from altgrad.training.guards import Counts, GuardPanel, GuardRule, Verdict


class Backstop:
    """The guards of one trial, with the counts behind every check that was seen."""

    def __init__(self, config: TrainConfig) -> None:
        self._panel = GuardPanel(backstop_rules(config))
        self._interval = config.log_interval
        self._counts: dict[int, Counts] = {}

    def check_before(self, step: int) -> int:
        """The step of the check before the one at `step`."""
        return (step - 1) // self._interval * self._interval

    def check(self, row: Mapping[str, Any], weights_of: Backstop | None = None) -> Verdict | None:
        """What the guards say of a log interval's last row.

        `weights_of`: the trial from which the attempt took its checkpoint, where that was not its own.
        """
        step = int(row["step"])
        counts = (weights_of or self)._counts.get(self.check_before(step))
        self._panel.forget()
        if "shifts" in row:
            verdict = None  # the worker's guards did not judge this interval
        else:
            self._panel.counts = self._panel.counts if counts is None else counts
            verdict = self._panel.check([row])
        self._counts[step] = self._panel.counts
        return verdict


def backstop_rules(config: TrainConfig) -> tuple[GuardRule, ...]:
    """The trial's own rules that end a run, with the patience of one more check: the worker answers first."""
    return tuple(
        rule.model_copy(update={"checks": rule.checks + 1}) for rule in config.guards if rule.kind != "warning"
    )
