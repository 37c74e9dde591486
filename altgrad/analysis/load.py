"""A sweep folder's ledger as two tables: one line per trial, one per trial and step.

The ledger is opened read-only, so a report can be written beside a running sweep. Non-finite numbers stand in
it as the texts 'nan', 'inf' and '-inf' (SQLite would store NaN as NULL); they become floats again here, which
costs the distinction between "measured, and not a number" and "never measured". `state` keeps what that
distinction was for:

    finished      all steps trained, and a finite validation loss: the only trials whose loss is ever averaged
    failed        stopped by a guard, or trained to the end with a loss that is no number: censored, a result
    unresolved    not run yet, interrupted, pruned, or ended without an evaluation: says nothing of the format

`setting` is everything two trials must share to be comparable (task, model, data, schedule, clipping, steps):
a folder used for two different studies holds two settings, and they are never mixed.
"""

from __future__ import annotations

import json
import math
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from altgrad.sweep.ledger import OUTCOME_FIELDS, ROW_SIGNALS, is_settled
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import GUARD_KINDS, RESULT_KINDS, Outcome, OutcomeKind
from altgrad.training.record import from_plain

PENDING = "pending"
FINISHED, FAILED, UNRESOLVED = "finished", "failed", "unresolved"
FINAL_SIGNALS = ("flip_yield", "stall_ratio", "stable_rank")
RESULT_COLUMNS = ("trial_id", "task", "format", "optimizer", "policy", "lr", "rung_clip", "seed", "outcome",
                  "signal", "layer", "step", "value", "limit", "message", "train_loss", "val_loss",
                  "bits_per_byte", "seconds", *FINAL_SIGNALS)


@dataclass(frozen=True)
class Records:
    """`trials` (RESULT_COLUMNS, state, options, geometry, setting, steps, created) and `rows` (trial_id,
    step, signals).

    `outside` counts the folder's trials of other settings, which `trials` and `rows` leave out.
    """

    trials: pd.DataFrame
    rows: pd.DataFrame
    outside: int = 0


def load(out_dir: Path) -> Records:
    """The folder's trials and rows, of all settings; FileNotFoundError where there is no ledger."""
    path = Path(out_dir) / "ledger.sqlite"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {out_dir} is not the folder of a sweep that has run")
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)) as connection:
        connection.row_factory = sqlite3.Row
        entries = connection.execute("SELECT * FROM trials ORDER BY created, trial_id").fetchall()
        endings = {row["trial_id"]: row for row in connection.execute("SELECT * FROM outcomes")}
        names = ", ".join(("trial_id", "step", *ROW_SIGNALS))
        found = connection.execute(f"SELECT {names} FROM rows ORDER BY trial_id, step")
        rows = _rows_frame([tuple(row) for row in found])
    records = [_trial(entry, endings.get(entry["trial_id"])) for entry in entries]
    trials = pd.DataFrame(records, columns=list(records[0]) if records else list(RESULT_COLUMNS))
    return Records(_with_final_signals(trials, rows), rows)


def newest_setting(records: Records) -> Records:
    """The records of the setting that was entered last, with a count of the others."""
    trials = records.trials
    if trials.empty or trials["setting"].nunique() == 1:
        return records
    newest = trials.sort_values("created", kind="stable")["setting"].iloc[-1]
    kept = trials[trials["setting"] == newest].reset_index(drop=True)
    rows = records.rows[records.rows["trial_id"].isin(set(kept["trial_id"]))].reset_index(drop=True)
    return Records(kept, rows, outside=len(trials) - len(kept))


def results_table(trials: pd.DataFrame) -> pd.DataFrame:
    """One line per trial with the public columns, in their order."""
    return trials.reindex(columns=list(RESULT_COLUMNS))


def _rows_frame(values: list[tuple[Any, ...]]) -> pd.DataFrame:
    frame = pd.DataFrame(values, columns=["trial_id", "step", *ROW_SIGNALS])
    for name in ROW_SIGNALS:
        frame[name] = frame[name].map(_number).astype(float)
    return frame


def _number(value: Any) -> float:
    plain = from_plain(value)
    return math.nan if plain is None else float(plain)


def _trial(entry: sqlite3.Row, ending: sqlite3.Row | None) -> dict[str, Any]:
    config = TrainConfig.model_validate_json(entry["config"])
    outcome = None if ending is None else _outcome(ending)
    if outcome is not None and outcome.kind in RESULT_KINDS and not is_settled(outcome, config):
        outcome = None  # its ending holds no longer: more steps were asked for, or the guard is gone
    known = {} if outcome is None else outcome.to_dict()
    return {
        "trial_id": entry["trial_id"], "task": config.task, "format": config.format, "optimizer": config.arm,
        "policy": config.policy, "lr": config.optimizer.lr,
        "rung_clip": getattr(config.optimizer, "rung_clip", math.nan), "seed": config.seed,
        "outcome": PENDING if outcome is None else str(outcome.kind), "signal": known.get("signal") or "",
        "layer": known.get("layer") or "", "step": known.get("step", math.nan),
        "value": _number(known.get("value")), "limit": _number(known.get("limit")),
        "message": known.get("message") or "", "train_loss": _number(known.get("train_loss")),
        "val_loss": _number(known.get("val_loss")), "bits_per_byte": _number(known.get("bits_per_byte")),
        "seconds": _number(known.get("seconds")), "state": _state(outcome),
        "options": config.optimizer.model_dump_json(), "geometry": config.use_manifold_aware,
        "setting": _setting(config, entry["data_sha256"]), "steps": config.steps, "created": entry["created"],
    }


def _outcome(ending: sqlite3.Row) -> Outcome:
    values = {"limit" if name == "limit_" else name: ending[name] for name in OUTCOME_FIELDS}
    numbers = ("value", "limit", "train_loss", "val_loss", "bits_per_byte")
    return Outcome.from_dict(values | {name: from_plain(values[name]) for name in numbers})


def _state(outcome: Outcome | None) -> str:
    if outcome is None:
        return UNRESOLVED
    if outcome.kind in GUARD_KINDS:
        return FAILED
    if outcome.kind is not OutcomeKind.DONE or outcome.val_loss is None:
        return UNRESOLVED
    return FINISHED if math.isfinite(outcome.val_loss) else FAILED


def _setting(config: TrainConfig, data_sha256: str) -> str:
    identity = config.identity(data_sha256) | {"steps": config.steps}
    varied = ("format", "policy", "optimizer", "seed")
    return json.dumps({key: value for key, value in identity.items() if key not in varied}, sort_keys=True)


def _with_final_signals(trials: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Adds the last measured value of each of FINAL_SIGNALS."""
    final = rows.groupby("trial_id")[list(FINAL_SIGNALS)].last()
    joined = trials.drop(columns=list(FINAL_SIGNALS), errors="ignore")
    if final.empty:
        return joined.assign(**dict.fromkeys(FINAL_SIGNALS, math.nan))
    return joined.join(final, on="trial_id")
