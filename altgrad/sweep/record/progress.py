"""What a person sees while a sweep runs: how far it is, what ended and why, and when it will be over.

On a terminal a small table is redrawn in place; into a pipe or a file goes a plain line, at most every ten
seconds. The estimate is measured, not modelled: the time since the first result over the share of the work
settled since then. A trial that a guard ended counts as whole, so the estimate learns from early endings;
starting Ray is not extrapolated.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from altgrad.training.outcome import AFTER_SHIFT, Outcome, OutcomeKind

if TYPE_CHECKING:
    from rich.table import Table

    from altgrad.training.config import TrainConfig

LINE_EVERY_SECONDS = 10.0


class Progress:
    """A context manager that shows the course of `trials`, the trials that this run has to do.

    A search adds to them, about `to_come` in all. `total` counts all trials of the sweep so far.
    """

    def __init__(
        self, trials: Mapping[str, TrainConfig], total: int, *, to_come: int = 0, live: bool | None = None
    ) -> None:
        self._trials = trials
        self._to_come = to_come + len(trials)
        self._before = total - len(trials)
        self._running: dict[str, int] = {}
        self._paused: dict[str, int] = {}
        self._ended: dict[str, Outcome] = {}
        self._base: tuple[float, float] | None = None
        """time and settled share at the first result"""
        self._last_line = time.monotonic()
        self._dashboard: str | None = None
        self.lacks: str | None = None
        """what trials wait for that can't start, in words"""
        self._live = None
        if (sys.stdout is not None and sys.stdout.isatty()) if live is None else live:
            from rich.live import Live

            self._live = Live(get_renderable=self._table, refresh_per_second=2, transient=True)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def watch(self, dashboard: str | None, *, asks_token: bool = False) -> None:
        """Ray is up, and can be watched at `dashboard`, which takes no token in its address."""
        self._dashboard = dashboard
        print(f"{self._planned} trials to run" + (f"; Ray dashboard: {dashboard}" if dashboard else ""), flush=True)
        if dashboard and asks_token:
            ray = Path(sys.executable).with_name("ray")
            print(
                f"it asks for the token that this prints: {ray} get-auth-token\n"
                f"actors in a terminal: RAY_AUTH_MODE=token {ray} list actors --address {dashboard}",
                flush=True,
            )

    def note(self, text: str) -> None:
        """Something that whoever watches should know."""
        print(text, flush=True)

    def reached(self, trial_id: str, step: int) -> None:
        """A running trial has done `step` steps."""
        self._paused.pop(trial_id, None)
        self._running[trial_id] = step
        if self._base is None:
            self._base = time.monotonic(), self.settled_share()
        self._line_if_due()

    def tick(self) -> None:
        """Time goes by, even where nothing happens."""
        self._line_if_due()

    def ended(self, trial_id: str, outcome: Outcome | None) -> None:
        """A trial has left the machine; without an outcome it was only interrupted."""
        self._running.pop(trial_id, None)
        self._paused.pop(trial_id, None)
        if outcome is not None:
            self._ended[trial_id] = outcome
        self._line_if_due()

    def waits(self, trial_id: str, step: int) -> None:
        """A trial pauses at `step`, until its rivals have come there."""
        self._running.pop(trial_id, None)
        self._paused[trial_id] = step
        self._line_if_due()

    def settled_share(self) -> float:
        """The share of this run's work that is behind it, in [0, 1]."""
        steps = sum(step / self._trials[trial_id].steps for trial_id, step in (self._running | self._paused).items())
        return (len(self._ended) + steps) / max(1, self._planned)

    def seconds_left(self) -> float | None:
        """Seconds per share, measured since the first result, times the share left; None before that."""
        share = self.settled_share()
        if self._base is None or share <= self._base[1]:
            return None
        return (time.monotonic() - self._base[0]) * (1 - share) / (share - self._base[1])

    def line(self) -> str:
        """The state in one line."""
        left = self.seconds_left()
        endings = ", ".join(f"{count} {name}" for name, count in self._endings().most_common())
        eta = "measuring" if left is None else f"about {duration(left)} left"
        return (
            f"{self._before + len(self._ended)}/{self._before + self._planned} trials ended"
            f"{f' ({endings})' if endings else ''}, {len(self._running)} running, "
            f"{self._planned - len(self._ended) - len(self._running)} waiting"
            f"{f' (for resources: {self.lacks})' if self.lacks else ''}; {eta}"
        )

    @property
    def _planned(self) -> int:
        """Trials of this run, with those that a search is to add."""
        return max(self._to_come, len(self._trials))

    def _endings(self) -> Counter[str]:
        return Counter(ending_name(outcome) for outcome in self._ended.values())

    def _line_if_due(self) -> None:
        now = time.monotonic()
        if self._live is None and now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            print(self.line(), flush=True)

    def _table(self) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_row(
            "ended",
            f"{self._before + len(self._ended)} of {self._before + self._planned}",
            ", ".join(f"{count} {name}" for name, count in self._endings().most_common()),
        )
        for trial_id, step in list(self._running.items()):
            trial = self._trials[trial_id]
            table.add_row(
                "running",
                f"{step}/{trial.steps}",
                f"{trial.format} {trial.arm} {trial.recipe_name} seed {trial.seed}  {trial_id}",
            )
        if self.lacks:
            table.add_row("waiting", "for", self.lacks)
        left = self.seconds_left()
        table.add_row(
            "left",
            "measuring" if left is None else duration(left),
            f"dashboard {self._dashboard}" if self._dashboard else "starting Ray",
        )
        return table


def ending_name(outcome: Outcome) -> str:
    """'done', or the kind with the signal that decided it; and whether a layer had moved to another format."""
    shifted = AFTER_SHIFT if outcome.formats else ""
    if outcome.signal is None or outcome.kind is OutcomeKind.DONE:
        return f"{outcome.kind}{shifted}"
    return f"{outcome.kind}{shifted} by {outcome.signal}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
