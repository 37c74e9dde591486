"""A sweep folder's ledger as two tables: one line per trial, one per trial and step.

The ledger is opened read-only, so a report can be written beside a running sweep. Non-finite numbers stand in
it as the texts 'nan', 'inf' and '-inf' (SQLite would store NaN as NULL); they become floats again here, which
costs the distinction between "measured, and not a number" and "never measured". `state` keeps what that
distinction was for:

    finished      all steps trained, and a finite validation loss: the only trials whose loss is ever averaged
    failed        stopped by a guard, or trained to the end with a loss that is no number: censored, a result
    shifted       ended, with a layer that an intervention had moved to another format: a result, but not one of the
                  format under which the trial stands, of which it says only that a layer failed in it
    unresolved    not run yet, interrupted, pruned, or not evaluated at the last step: says nothing of the format

Trials compare at equal steps only. A folder may hold a trial that an earlier sweep trained for longer than was
asked for last: it is read at exactly the steps asked, losses from the row of that step and rows up to it. Where
that row has no validation loss, the trial is unresolved at this length (`unevaluated` counts those).

A folder may also hold trials of several sweeps. A report is of the last one: `of_sweep` keeps its trials, by
their ids. `setting` is everything two trials must share to be comparable (task, model, data, schedule,
clipping, steps): where the ids are not known, `newest_setting` keeps at least the settings apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from altgrad import NUMERICS_VERSION
from altgrad.sweep.record import layout
from altgrad.sweep.record.ledger import as_asked, is_current, outcome_of
from altgrad.sweep.record.ledger_schema import OUTCOME_FIELDS, ROW_SIGNALS
from altgrad.sweep.record.reader import Entry, reading
from altgrad.training.catalogue import CLASSIFICATION_SIGNALS
from altgrad.training.config import UNQUANTIZED, TrainConfig
from altgrad.training.metrics import perplexity
from altgrad.training.outcome import AFTER_SHIFT, GUARD_KINDS, Outcome, OutcomeKind
from altgrad.training.record import flat, from_plain

PENDING = "pending"
FINISHED, FAILED, SHIFTED, UNRESOLVED = "finished", "failed", "shifted", "unresolved"
FINAL_SIGNALS = (
    "flip_yield",
    "stall_ratio",
    "stable_rank",
    "flip_rate",
    "flip_rate_per_epoch",
    "gradient_cosine",
    "tokens_per_s",
    "quantized_share",
    *CLASSIFICATION_SIGNALS,
)
"""Of these a trial's last measured value stands beside its losses."""
RESULT_COLUMNS = (
    "trial_id",
    "task",
    "format",
    "optimizer",
    "policy",
    "lr",
    "rung_clip",
    "seed",
    "steps",
    "outcome",
    "signal",
    "layer",
    "step",
    "value",
    "limit",
    "message",
    "formats",
    "train_loss",
    "val_loss",
    "perplexity",
    "bits_per_byte",
    "seconds",
    "device",
    "driver",
    "hostname",
    *FINAL_SIGNALS,
    "numerics",
    "state",
)


@dataclass(frozen=True)
class Records:
    """`trials` (RESULT_COLUMNS, config, options, geometry, setting, created, first_loss, signs) and `rows`
    (trial_id, step, signals), up to the steps asked of each trial. `first_loss` is the training loss of the
    first row, nats; `signs` when rules of failure first held, as `sweep.signs.as_text` says it.

    `outside` counts the folder's trials of other sweeps, which `trials` and `rows` leave out, `outdated` those among
    them that an older version of the numerics computed.
    """

    trials: pd.DataFrame
    rows: pd.DataFrame
    outside: int = 0
    outdated: int = 0


def load(out_dir: Path) -> Records:
    """The folder's trials and rows, of all its sweeps; FileNotFoundError where there is no ledger."""
    folder = Path(out_dir)
    path = folder / layout.LEDGER
    if not path.is_file() and not layout.shards(folder):
        raise FileNotFoundError(f"{path} does not exist: {out_dir} is not the folder of a sweep that has run")
    with reading(folder) as ledger:
        entries, endings, moved = ledger.trials(), ledger.outcomes(), ledger.moved()
        evaluated = {(line["trial_id"], line["step"]): line for line in ledger.evaluations()}
        rows = _rows_frame(ledger.rows())
    records = [
        _trial(entry, endings.get(entry["trial_id"]), evaluated, moved.get(entry["trial_id"])) for entry in entries
    ]
    if not records:
        return Records(pd.DataFrame(columns=list(RESULT_COLUMNS)), rows)
    trials = pd.DataFrame(records)
    asked = rows["trial_id"].map(trials.set_index("trial_id")["steps"])
    rows = rows[rows["step"] <= asked].reset_index(drop=True)
    return Records(_with_row_signals(trials, rows), rows)


def of_sweep(records: Records, trial_ids: Sequence[str]) -> Records:
    """The records of the trials named, in that order, with a count of the others."""
    by_id = records.trials.set_index("trial_id", drop=False)
    return kept(records, by_id.loc[[name for name in trial_ids if name in by_id.index]])


def by_setting(records: Records) -> dict[str, Records]:
    """The records of each setting, in their order, under what tells it from the others ('' for a single one)."""
    trials = records.trials
    values = {setting: setting_words(setting) for setting in dict.fromkeys(trials["setting"])}
    names = dict.fromkeys(name for value in values.values() for name in value)
    varied = [name for name in names if len({value.get(name) for value in values.values()}) > 1]
    found = {}
    for setting, value in values.items():
        label = ", ".join(f"{name}={value[name]}" for name in varied if name in value)
        found[label] = kept(records, trials[trials["setting"] == setting])
    return found


def setting_words(setting: str) -> dict[str, str]:
    """What trials of a setting share, as dotted names and texts."""
    return {name: str(value) for name, value in flat(json.loads(setting)).items()}


def newest_setting(records: Records) -> Records:
    """The records of the setting that was entered last, with a count of the others."""
    trials = records.trials
    if trials.empty or trials["setting"].nunique() == 1:
        return records
    newest = trials.sort_values("created", kind="stable")["setting"].iloc[-1]
    return kept(records, trials[trials["setting"] == newest])


def kept(records: Records, trials: pd.DataFrame) -> Records:
    """The records of these of its trials, with a count of the others."""
    names = set(trials["trial_id"])
    rows = records.rows[records.rows["trial_id"].isin(names)].reset_index(drop=True)
    dropped = records.trials[~records.trials["trial_id"].isin(names)]
    outdated = int((dropped["numerics"] != NUMERICS_VERSION).sum()) if len(dropped) else 0
    return Records(trials.reset_index(drop=True), rows, records.outside + len(dropped), records.outdated + outdated)


def mutations(out_dir: Path, trial_ids: Sequence[str]) -> list[tuple[str, int, str, float, float, str]]:
    """(trial, step, field, before, after, source) of what members of populations took over, by step."""
    with reading(Path(out_dir)) as ledger:
        found = ledger.mutations()
    return [row for row in found if row[0] in set(trial_ids)]


def unevaluated(trials: pd.DataFrame) -> int:
    """How many trials were trained through the last step asked for without an evaluation at it."""
    return int(((trials["outcome"] == OutcomeKind.DONE) & (trials["state"] == UNRESOLVED)).sum())


def ending_of(trial: Mapping[Hashable, Any]) -> str:
    """How the trial ended, in the word that counts it."""
    return f"{trial['outcome']}{AFTER_SHIFT if trial['state'] == SHIFTED else ''}"


def _rows_frame(values: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    frame = pd.DataFrame.from_records(list(values), columns=["trial_id", "step", *ROW_SIGNALS])
    return frame.assign(**{name: _floats(frame[name]) for name in ROW_SIGNALS})


def _floats(column: pd.Series) -> pd.Series:
    """NULL and 'nan' as NaN, 'inf' as an infinity."""
    if pd.api.types.is_numeric_dtype(column):
        return column.astype(float)
    return pd.to_numeric(column.where(column != "nan")).astype(float)


def _number(value: Any) -> float:
    plain = from_plain(value)
    return math.nan if plain is None else float(plain)


def _trial(
    entry: Entry, ending: Entry | None, evaluated: Mapping[tuple[str, int], Entry], moved: str | None
) -> dict[str, Any]:
    """The trial's line; `moved`: which layers have moved to another format so far, for one that has not ended."""
    config = TrainConfig.model_validate_json(entry["config"])
    row = evaluated.get((entry["trial_id"], config.steps))
    at_step = None if row is None else {name: from_plain(value) for name, value in row.items()}
    outcome = as_asked(
        None if ending is None else outcome_of([ending[name] for name in OUTCOME_FIELDS]), config, at_step
    )
    known = {} if outcome is None else outcome.to_dict()
    numerics = _numerics(entry)
    loss = _number(known.get("val_loss"))
    return {
        "trial_id": entry["trial_id"],
        "task": config.task,
        "format": config.format,
        "optimizer": config.arm,
        "policy": config.recipe_name,
        "lr": config.optimizer.lr,
        "rung_clip": getattr(config.optimizer, "rung_clip", math.nan),
        "seed": config.seed,
        "outcome": PENDING if outcome is None else str(outcome.kind),
        "signal": known.get("signal") or "",
        "layer": known.get("layer") or "",
        "step": known.get("step", math.nan),
        "value": _number(known.get("value")),
        "limit": _number(known.get("limit")),
        "message": known.get("message") or "",
        "formats": (known.get("formats") if outcome is not None else moved) or "",
        "train_loss": _number(known.get("train_loss")),
        "val_loss": loss,
        "perplexity": perplexity(loss) if config.task == "lm" else math.nan,
        "bits_per_byte": _number(known.get("bits_per_byte")),
        "seconds": _number(known.get("seconds")),
        **{name: known.get(name) or "" for name in ("device", "driver", "hostname")},
        "config": entry["config"],
        "signs": (None if ending is None else ending["signs"]) or "",
        "state": _state(outcome),
        "options": config.optimizer.model_dump_json(),
        "geometry": config.use_manifold_aware,
        "quantized": config.format != UNQUANTIZED and config.optimizer.rounds_operands,
        "plain_arm": config.optimizer.plain_arm,
        "control_arm": config.optimizer.control_arm,
        "rules": config.precision.model_dump_json(),
        "lr_unit": config.arm if config.optimizer.has_own_lr_unit else "weight",
        "setting": _setting(config, entry["data_sha256"], numerics),
        "scope": _scope(config),
        "steps": config.steps,
        "created": entry["created"],
        "numerics": numerics,
    }


def _state(outcome: Outcome | None) -> str:
    if outcome is None:
        return UNRESOLVED
    if outcome.formats and outcome.kind in GUARD_KINDS | {OutcomeKind.DONE}:
        return SHIFTED
    if outcome.kind in GUARD_KINDS:
        return FAILED
    if outcome.kind is not OutcomeKind.DONE or outcome.val_loss is None:
        return UNRESOLVED
    return FINISHED if math.isfinite(outcome.val_loss) else FAILED


def _numerics(entry: Entry) -> int:
    """The version that computed the trial; 0 for an older one that was not recorded."""
    recorded = entry.get("numerics")
    if recorded is not None:
        return int(recorded)
    is_ours = is_current(entry["trial_id"], entry["config"], entry["data_sha256"], None)
    return NUMERICS_VERSION if is_ours else 0


def _setting(config: TrainConfig, data_sha256: str, numerics: int) -> str:
    identity = config.identity(data_sha256) | {"steps": config.steps, "numerics": numerics}
    varied = ("format", "policy", "recipe", "optimizer", "seed")
    return json.dumps({key: value for key, value in identity.items() if key not in varied}, sort_keys=True)


def _scope(config: TrainConfig) -> str:
    """What is trained on what, for how long: what a finding holds for."""
    model, data = config.model, config.data
    size = f"{model.layers} × {model.width}"
    name = f"encoder {model.encoder or size}" if config.task == "classify" else f"GPT {size}"
    unit = f"{data.batch} documents" if config.task == "classify" else f"{data.batch} × {model.block} tokens"
    return f"{config.task} on {Path(data.source).name}, {name}, {config.steps} steps of {unit}"


def _with_row_signals(trials: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Adds the last measured value of each of FINAL_SIGNALS, and `first_loss`."""
    if rows.empty:
        return trials.assign(**dict.fromkeys((*FINAL_SIGNALS, "first_loss"), math.nan))
    final = rows.groupby("trial_id")[list(FINAL_SIGNALS)].last()
    first = rows.drop_duplicates("trial_id").set_index("trial_id")["train_loss"].rename("first_loss")
    return trials.join(final, on="trial_id").join(first, on="trial_id")
