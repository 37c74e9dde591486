"""The ledger: what was asked, what happened, and therefore what is left to do.

One SQLite file per sweep folder, written by the driver alone, from the records that workers leave. Trials are keyed
by the hash of their configuration and rows by (trial, step), so recording something twice changes nothing, and
starting a sweep again means running what the ledger lacks.

SQLite stores NaN as NULL, which would make a diverged run look like one that was never measured. Non-finite numbers
are kept as the texts 'nan', 'inf' and '-inf' (a column of a REAL affinity keeps a text that is no number).
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from altgrad import NUMERICS_VERSION
from altgrad.sweep.record import file_systems, held, read_only
from altgrad.sweep.record.ledger_schema import (
    EVENTS,
    OUTCOME_FIELDS,
    ROW_SIGNALS,
    TRIAL_FIELDS,
    bring_up_to_date,
    trial_values,
)
from altgrad.sweep.record.spend import Spend
from altgrad.training.outcome import GUARD_KINDS, RESULT_KINDS, Outcome, OutcomeKind
from altgrad.training.record import from_plain, to_plain

if TYPE_CHECKING:
    from altgrad.training.config import TrainConfig
    from altgrad.training.guards import GuardRule

logger = logging.getLogger(__name__)

WAITING = "waiting"
"""The subject of the notice that holds while a driver runs: what trials wait for."""


class Ledger:
    """Opens or creates the ledger at `path`; a context manager. One process writes, any number may read.

    Where another program holds it, every method waits and says so (`held`).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = held.connect(self.path)
        if self._connection.execute("PRAGMA page_count").fetchone()[0] == 0:
            self.suit_file_system()
        bring_up_to_date(self._connection)

    @classmethod
    @contextlib.contextmanager
    def reading(cls, path: Path) -> Iterator[Ledger]:
        """The ledger at `path`, of which nothing is changed: one of an earlier version is brought up to date in memory.

        sqlite3.DatabaseError where it is none, or damaged.
        """
        with read_only.current(path) as connection:
            ledger = cls.__new__(cls)
            ledger.path, ledger._connection = path, connection
            yield ledger

    def suit_file_system(self) -> None:
        """Changes the journal of a ledger that came from elsewhere; only for who owns the folder, on its machine."""
        journal_mode = file_systems.journal_mode(self.path)
        (current,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        if current != journal_mode:
            # In use, or no shared memory here: as it was, it works.
            with contextlib.suppress(sqlite3.OperationalError), self._connection.impatient():
                self._connection.execute(f"PRAGMA journal_mode={journal_mode}")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hurry(self, seconds: float) -> None:
        """From now on, a ledger that another program holds is waited for no longer than that."""
        self._connection.patience = seconds

    @contextlib.contextmanager
    def unless_held(self) -> Iterator[None]:
        """Leaves out what is entered in it, with a word, where another program holds the ledger for too long."""
        try:
            yield
        except held.HeldError as error:
            logger.warning("%s", error)

    def close(self) -> None:
        self._connection.close()

    def add_trials(self, configs: Mapping[str, TrainConfig], data_sha256: str) -> None:
        """Enters trials by id, all or none; a known trial keeps its first entry but takes the new configuration.

        The configuration says what was asked for last (steps, guards), not what the recorded rows went through.
        """
        now = time.time()
        values = [
            trial_values(trial_id, config, data_sha256, created=now, numerics=NUMERICS_VERSION)
            for trial_id, config in configs.items()
        ]
        with self._connection.transaction():
            self._connection.executemany(
                f"INSERT INTO trials ({','.join(TRIAL_FIELDS)}) VALUES ({','.join('?' * len(TRIAL_FIELDS))}) "
                "ON CONFLICT (trial_id) DO UPDATE SET config = excluded.config, numerics = excluded.numerics",
                values,
            )

    def restore(
        self, table: str, rows: Iterable[Sequence[Any]], columns: Sequence[str], *, unless_more: str | None = None
    ) -> None:
        """Enters rows of another ledger of the sweep, all or none; what is known by its key stays as it is.

        `unless_more`: a column; where a known row has less in it, the new one takes its place.
        """
        newer = f"UPDATE SET {','.join(f'{name}=excluded.{name}' for name in columns)}"
        newer += f" WHERE excluded.{unless_more} > {table}.{unless_more}"
        entry = f"INSERT INTO {table} ({','.join(columns)}) VALUES ({','.join('?' * len(columns))}) ON CONFLICT DO "
        with self._connection.transaction():
            self._connection.executemany(entry + ("NOTHING" if unless_more is None else newer), list(rows))

    def record_rows(self, trial_id: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Enters rows in one transaction; a step that is known is replaced."""
        names = ("trial_id", "step", *ROW_SIGNALS, "formats", "events")
        values = [
            (
                trial_id,
                row["step"],
                *(to_plain(row.get(name)) for name in ROW_SIGNALS),
                row.get("formats"),
                json.dumps(events) if (events := {name: row[name] for name in EVENTS if row.get(name)}) else None,
            )
            for row in rows
        ]
        with self._connection.transaction():
            self._connection.executemany(
                f"INSERT OR REPLACE INTO rows ({','.join(names)}) VALUES ({','.join('?' * len(names))})", values
            )

    def record_outcome(self, trial_id: str, outcome: Outcome) -> Outcome:
        """Enters how the trial ended; a later ending of the same trial replaces an earlier one.

        Returns it with the formats that layers had moved to, which the rows know where the ending does not say.
        """
        outcome = replace(outcome, formats=outcome.formats or self.formats_at(trial_id, outcome.step) or None)
        fields = {"limit_" if name == "limit" else name: to_plain(value) for name, value in outcome.to_dict().items()}
        names = ("trial_id", *OUTCOME_FIELDS, "recorded")
        self._connection.execute(
            f"INSERT OR REPLACE INTO outcomes ({','.join(names)}) VALUES ({','.join('?' * len(names))})",
            (trial_id, *(fields[name] for name in OUTCOME_FIELDS), time.time()),
        )
        return outcome

    def record_signs(self, trial_id: str, signs: str) -> None:
        """Enters when each rule of failure first held in a trial that has ended (`signs.as_text`)."""
        self._connection.execute("UPDATE outcomes SET signs = ? WHERE trial_id = ?", (signs, trial_id))

    def signs(self, trial_ids: Sequence[str] | None = None) -> dict[str, str | None]:
        """What was entered so, by trial: of all that have ended, or of these; None where nothing was."""
        where = "" if trial_ids is None else f" WHERE trial_id IN ({','.join('?' * len(trial_ids))})"
        return dict(self._connection.execute(f"SELECT trial_id, signs FROM outcomes{where}", trial_ids or ()))

    def add_sample(self, search: str, number: int, params: Mapping[str, Any], trial_ids: Sequence[str]) -> None:
        """Enters what a search chose, and the trials that are to tell what it is worth."""
        self._connection.execute(
            "INSERT OR REPLACE INTO samples VALUES (?,?,?,?)",
            (search, number, json.dumps(params), json.dumps(list(trial_ids))),
        )

    def samples(self, search: str) -> list[dict[str, Any]]:
        """The parameters of every sample of a search, in their order."""
        found = self._connection.execute("SELECT params FROM samples WHERE search = ? ORDER BY number", (search,))
        return [json.loads(params) for (params,) in found]

    def add_mutations(self, exchange: Iterable[tuple[str, int, str, float, float, str]]) -> None:
        """Enters (trial, step, field, before, after, source), all or none, as not yet done."""
        with self._connection.transaction():
            self._connection.executemany("INSERT OR REPLACE INTO mutations VALUES (?,?,?,?,?,?,0)", list(exchange))

    def mutations_applied(self, exchange: Iterable[tuple[str, int, str, float, float, str]]) -> None:
        """Notes that the trials have taken over what was entered."""
        with self._connection.transaction():
            self._connection.executemany(
                "UPDATE mutations SET applied = 1 WHERE trial_id = ? AND step = ?", [item[:2] for item in exchange]
            )

    def mutations(self, trial_ids: Sequence[str]) -> tuple[list[tuple[Any, ...]], set[int]]:
        """What was entered for these trials, by step, and the steps of which not all is done."""
        found = self._connection.execute(
            "SELECT trial_id,step,field,before,after,source,applied FROM mutations WHERE trial_id IN "
            f"({','.join('?' * len(trial_ids))}) ORDER BY step, rowid",
            trial_ids,
        ).fetchall()
        return [tuple(row[:6]) for row in found], {row[1] for row in found if not row[6]}

    def note(self, subject: str, message: str | None) -> None:
        """Enters what whoever looks after the sweep should know, in place of what was said of the subject; None:
        nothing any more."""
        if message is None:
            self._connection.execute("DELETE FROM notices WHERE subject = ?", (subject,))
        else:
            self._connection.execute("INSERT OR REPLACE INTO notices VALUES (?,?,?)", (subject, time.time(), message))

    def notices(self) -> dict[str, str]:
        """Messages by subject, oldest first."""
        return dict(self._connection.execute("SELECT subject, message FROM notices ORDER BY recorded"))

    def outcomes(self) -> dict[str, Outcome]:
        """Every recorded ending by trial id."""
        return self._endings("")

    def outcomes_of(self, trial_ids: Sequence[str]) -> dict[str, Outcome]:
        """The recorded endings of these trials."""
        return self._endings(f" WHERE trial_id IN ({','.join('?' * len(trial_ids))})", trial_ids)

    def _endings(self, where: str, values: Sequence[str] = ()) -> dict[str, Outcome]:
        names = ",".join(OUTCOME_FIELDS)
        found = self._connection.execute(f"SELECT trial_id,{names} FROM outcomes{where}", values)
        return {trial_id: outcome_of(values) for trial_id, *values in found}

    def trials(self) -> dict[str, dict[str, Any]]:
        """What tells the trials apart (format, arm, policy, lr, rung_clip, seed), by id, oldest first."""
        names = ("format", "arm", "policy", "lr", "rung_clip", "seed")
        found = self._connection.execute(f"SELECT trial_id,{','.join(names)} FROM trials ORDER BY created, rowid")
        return {trial_id: dict(zip(names, values, strict=True)) for trial_id, *values in found}

    def configs(self, asked: Collection[str] | None = None) -> dict[str, TrainConfig]:
        """What trials of the current numerics were asked to be, by id, oldest first: all, or those asked for."""
        from altgrad.training.config import TrainConfig

        outdated = self.outdated()
        found = self._connection.execute("SELECT trial_id, config FROM trials ORDER BY created, rowid")
        return {
            trial_id: TrainConfig.model_validate_json(config)
            for trial_id, config in found
            if trial_id not in outdated and (asked is None or trial_id in asked)
        }

    def outdated(self) -> dict[str, int | None]:
        """Trials of other numerics than this version's, by id, with theirs; None where it was not recorded."""
        found = self._connection.execute(
            "SELECT trial_id, config, data_sha256, numerics FROM trials WHERE numerics IS NOT ?", (NUMERICS_VERSION,)
        )
        return {
            trial_id: numerics
            for trial_id, config, data_sha256, numerics in found
            if not is_current(trial_id, config, data_sha256, numerics)
        }

    def signal(self, trial_id: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of one signal of a trial's rows, where it was measured."""
        if name not in ROW_SIGNALS:
            raise ValueError(f"signal={name!r} is not one of {', '.join(ROW_SIGNALS)}")
        found = self._connection.execute(
            f"SELECT step,{name} FROM rows WHERE trial_id = ? AND {name} IS NOT NULL ORDER BY step", (trial_id,)
        )
        return [(step, float(from_plain(value))) for step, value in found]

    def scores(self, trial_id: str) -> list[tuple[int, float]]:
        """(step, validation loss) as races rank it: infinite from where a layer has moved to another format."""
        found = self._connection.execute(
            "SELECT step, CASE WHEN formats != '' THEN 'inf' ELSE val_loss END FROM rows "
            "WHERE trial_id = ? AND val_loss IS NOT NULL ORDER BY step",
            (trial_id,),
        )
        return [(step, float(from_plain(value))) for step, value in found]

    def formats_at(self, trial_id: str, step: int) -> str | None:
        """Which layers had moved to another format by the step; None or '' for none.

        Where the rows do not say, all that the recorded ending names.
        """
        found = self._connection.execute(
            "SELECT formats FROM rows WHERE trial_id = ? AND step <= ? AND formats IS NOT NULL ORDER BY step DESC",
            (trial_id, step),
        ).fetchone()
        found = (
            found or self._connection.execute("SELECT formats FROM outcomes WHERE trial_id = ?", (trial_id,)).fetchone()
        )
        return None if found is None else found[0]

    def row_counts(self) -> dict[str, int]:
        """How many steps of each trial are recorded."""
        return dict(self._connection.execute("SELECT trial_id, COUNT(*) FROM rows GROUP BY trial_id"))

    def record_spend(self, started: float, spend: Spend) -> None:
        """Enters what the run of a driver that started then (Unix time) has spent so far."""
        self._connection.execute(
            "INSERT OR REPLACE INTO spend VALUES (?,?,?,?)", (started, spend.hours, spend.gpu_hours, spend.usd)
        )

    def spent(self) -> Spend:
        """What all runs together have spent."""
        found = self._connection.execute("SELECT TOTAL(hours), TOTAL(gpu_hours), TOTAL(usd) FROM spend").fetchone()
        return Spend(*found)

    def remaining(self, configs: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
        """The trials that still have something to run, in the order given."""
        outcomes = self.outcomes()
        return {
            trial_id: config for trial_id, config in configs.items() if not is_settled(outcomes.get(trial_id), config)
        }


def outcome_of(values: Sequence[Any]) -> Outcome:
    """From the values of OUTCOME_FIELDS, non-finite numbers as texts or as numbers."""
    found = {"limit" if name == "limit_" else name: value for name, value in zip(OUTCOME_FIELDS, values, strict=True)}
    numbers = ("value", "limit", "train_loss", "val_loss", "bits_per_byte")
    return Outcome.from_dict(found | {name: from_plain(found[name]) for name in numbers})


def is_current(trial_id: str, config: str, data_sha256: str, numerics: int | None) -> bool:
    """Whether a recorded trial was computed by this version's numerics.

    A ledger from before the version was recorded still tells: the version is in the id, so the id comes out again.
    """
    if numerics is not None:
        return numerics == NUMERICS_VERSION
    from altgrad.training.config import TrainConfig

    try:
        return TrainConfig.model_validate_json(config).trial_id(data_sha256) == trial_id
    except ValueError:
        return False


def outdated_text(count: int) -> str:
    """The line that says so, or nothing."""
    if not count:
        return ""
    return (
        f"{count} trial{'s' if count > 1 else ''} of an older numerics version {'are' if count > 1 else 'is'} "
        "in the ledger, not used"
    )


def is_settled(outcome: Outcome | None, config: TrainConfig) -> bool:
    """Whether the ending leaves nothing to run: all steps done, pruned, or stopped by a guard still in force.

    A run that went further than `config.steps` is settled too: its rows hold what it was at that step, and
    running could only take it further away. What it is worth there is for `as_asked` to say.
    """
    if outcome is None:
        return False
    if outcome.kind is OutcomeKind.DONE:
        return outcome.step >= config.steps
    if outcome.kind in GUARD_KINDS:
        return outcome.step >= config.steps or any(_same_rule(rule, outcome) for rule in config.guards)
    return outcome.kind is OutcomeKind.PRUNED


def as_asked(outcome: Outcome | None, config: TrainConfig, row: Mapping[str, Any] | None) -> Outcome | None:
    """The ending that a run of exactly `config.steps` has, where `row` holds its signals at that step.

    Trials compare at equal steps only, so a run that went on is read at the step asked for: whatever ended it
    later is not seen. None where the ending holds no longer: more steps were asked for, or the guard is gone.
    A done trial without an evaluation at that step has no `val_loss`, and its message says so. Where the row does not
    say which layers had moved to another format by then, all that ever did count.
    """
    if outcome is None or outcome.kind not in RESULT_KINDS:
        return outcome
    if not is_settled(outcome, config):
        return None
    if outcome.kind is not OutcomeKind.DONE and outcome.step < config.steps:
        return outcome
    if outcome.step == config.steps and any(_same_rule(rule, outcome) for rule in config.guards):
        return outcome
    at_step = {name: None if row is None else row[name] for name in ("train_loss", "val_loss", "bits_per_byte")}
    missing = at_step["val_loss"] is None
    message = f"not evaluated at step {config.steps} (trained to step {outcome.step})" if missing else ""
    moved = None if row is None else row.get("formats")
    return Outcome(
        OutcomeKind.DONE,
        config.steps,
        **at_step,
        message=message,
        formats=(outcome.formats if moved is None else moved) or None,
        seconds=outcome.seconds,
        **{name: getattr(outcome, name) for name in ("device", "driver", "hostname")},
    )


def _same_rule(rule: GuardRule, outcome: Outcome) -> bool:
    return (rule.kind, rule.signal, rule.limit) == (str(outcome.kind), outcome.signal, outcome.limit)
