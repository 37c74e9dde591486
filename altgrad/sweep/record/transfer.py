"""A sweep on its way from one machine to another: `export_sweep` writes a shard, `import_sweep` makes a sweep of them.

What is exported of a trial is what its ledger and its record say when it has ended, however it ended; a trial that is
on its way is only named, and starts anew where the sweep goes on. An import writes the files that a worker would have
left and takes them into the ledger as any driver does, so a sweep that was sent is no other than one that ran here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record import read_only
from altgrad.sweep.record.folder import check_folder, owned, read_manifest
from altgrad.sweep.record.layer_table import read_layers
from altgrad.sweep.record.layout import LEDGER, MANIFEST, shards
from altgrad.sweep.record.ledger import Ledger, outcome_of
from altgrad.sweep.record.ledger_schema import OUTCOME_FIELDS, TRIAL_FIELDS
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.record.shards import (
    AT_EVERY_STEP,
    IN_CHECKS,
    OF_LAYERS,
    OF_SWEEP,
    TABLES,
    Export,
    alone,
    step_rows,
    to_table,
    write_shard,
)
from altgrad.training.catalogue import CLASSIFICATION_SIGNALS
from altgrad.training.config import BASELINE, TrainConfig
from altgrad.training.outcome import RESULT_KINDS, Outcome
from altgrad.training.record import TrialFolder, read_config, write_json


@dataclass(frozen=True)
class Detail:
    """How much of a trial is exported beside how it ended and its evaluations, which always are, exactly.

    `checks`: ends of log intervals with a value of a signal; in a lean export those of HEADLINE have all. `points`:
    steps with a signal of layers: the last, the first measured, checkpoints between. `bits`: significant bits of
    signals and of the training losses (off by 2^-bits of their value at most); None for all that there are.
    """

    checks: int
    points: int
    bits: int | None


FULL, LEAN = Detail(24, 4, None), Detail(8, 1, 12)
HEADLINE = ("flip_yield", "stall_ratio", "rank_drop", "critical_rank_drop", "gradient_cosine")
"""Signals of which a lean export has every value: what warnings and expectations are judged by."""
EVALUATED = ("val_loss", "perplexity", "bits_per_byte", *CLASSIFICATION_SIGNALS)
REFERENCE_SIGNALS = ("stable_rank", "spectral_norm")
"""What other trials are held against: of references these are exported exactly, at every check."""
GROWS = {"spend": "hours", "mutations": "applied"}
"""What grows in a row of these tables: of two with one key the one with more is newer."""
AT_A_TIME = 200
"""Trials whose rows are in memory together."""


@dataclass(frozen=True)
class Exported:
    """`trials` are those in the shard, `ended` those that have ended; no `shard` where the export had everything."""

    shard: Path | None
    trials: int
    ended: int
    bytes: int


@dataclass(frozen=True)
class Imported:
    """Trials that the export names, those whose ending came in, those whose result here stays, and of these those that
    have another loss in the export at the same step."""

    trials: int
    entered: int
    known: int
    differing: int


def export_sweep(out: Path, folder: Path, detail: Detail = FULL) -> Exported:
    """Adds what the export in `folder` lacks of the sweep in `out`, which may be running, as one shard.

    SpecError where `folder` holds other things, or `out` is an export itself.
    """
    if shards(out):
        raise SpecError(f"{out} is an export; the folder of a sweep is expected")
    _check_place(folder)
    manifest = read_manifest(out)
    said = None if manifest is None else json.dumps(manifest, indent=1)
    with alone(folder), read_only.current(out / LEDGER) as connection:
        connection.execute("BEGIN")  # one state of a ledger that others write
        trials = connection.execute(f"SELECT {','.join(TRIAL_FIELDS)} FROM trials ORDER BY created, rowid").fetchall()
        names = ",".join(TABLES["outcomes"])
        endings = {row[0]: row for row in connection.execute(f"SELECT {names} FROM outcomes")}
        counts = dict(connection.execute("SELECT trial_id, COUNT(*) FROM rows GROUP BY trial_id"))
        prints = {row[0]: _fingerprint(row, endings.get(row[0]), counts.get(row[0], 0)) for row in trials}
        of_sweep = {
            table: connection.execute(f"SELECT {','.join(TABLES[table])} FROM {table}").fetchall() for table in OF_SWEEP
        }
        new = trials
        if shards(folder):
            before = Export(folder)
            known = before.fingerprints()
            new = [row for row in trials if known.get(row[0]) != prints[row[0]]]
            is_known = all(set(rows) <= set(before.rows(table)) for table, rows in of_sweep.items())
            if not new and is_known and (manifest is None or manifest == read_manifest(folder)):
                return Exported(None, 0, 0, 0)
        ended = [row[0] for row in new if row[0] in endings]
        configs = {row[0]: TrainConfig.model_validate_json(row[1]) for row in new if row[0] in endings}
        tables: dict[str, pa.Table | Iterable[Sequence[Any]]] = {
            "trials": [(*row, _heading(out / "trials" / row[0]), prints[row[0]]) for row in new],
            "outcomes": [endings[trial_id] for trial_id in ended],
            "steps": _cut(to_table("steps", _rows(connection, ended, AT_EVERY_STEP, "")), detail),
            "checks": _cut(
                to_table("checks", _checks(_rows(connection, ended, IN_CHECKS, f"AND ({_IS_CHECK})"), detail)), detail
            ),
            "layers": _layers(out / "trials", configs, detail),
            **of_sweep,
        }
        shard = write_shard(folder, tables, said)
    size = sum(path.stat().st_size for path in shard.iterdir())
    return Exported(shard, len(new), len(ended), size)


def import_sweep(folder: Path, out: Path) -> Imported:
    """Takes an export into the sweep in `out`, which is made where it is none.

    What has gone as far here, or further, stays as it is; a population of which not all members have a result starts
    anew, for their checkpoints are not exported. SpecError where `folder` is no export; FolderError where `out` is no
    place for a sweep, or a driver owns it.
    """
    export = Export(folder)
    check_folder(out)
    headings = {row[0]: row[1:] for row in export.rows("trials", ("trial_id", "config", "record"))}
    outcomes = {row[0]: outcome_of(row[1:]) for row in export.rows("outcomes", ("trial_id", *OUTCOME_FIELDS))}
    signs: dict[str, str | None] = dict(export.rows("outcomes", ("trial_id", "signs")))
    rows, manifest = step_rows(export), read_manifest(folder)
    begun = {_population(name) for name in headings if name not in outcomes or outcomes[name].kind not in RESULT_KINDS}
    begun -= {None}
    with owned(out), Ledger(out / LEDGER) as ledger:
        ledger.suit_file_system()
        recorder = Recorder(ledger, out / "trials")
        recorder.ingest(ledger.trials())
        known, reached = ledger.outcomes(), ledger.row_counts()
        wanted = [
            name
            for name, outcome in outcomes.items()
            if _population(name) not in begun and _goes_further(outcome, known.get(name), reached.get(name, 0))
        ]
        ledger.restore("trials", export.rows("trials", TRIAL_FIELDS), TRIAL_FIELDS)
        for table in OF_SWEEP:
            exported = [row for row in export.rows(table) if table != "mutations" or _population(row[0]) not in begun]
            ledger.restore(table, exported, TABLES[table], unless_more=GROWS.get(table))
        for trial_id in wanted:
            path = out / "trials" / trial_id
            shutil.rmtree(path / "checkpoint", ignore_errors=True)
            config, heading = headings[trial_id]
            write_record(path, config, heading, rows.get(trial_id, []), outcomes[trial_id])
        recorder.ingest(wanted)
        for trial_id in wanted:
            if (seen := signs[trial_id]) is not None:  # at every check; of layers few came in
                ledger.record_signs(trial_id, seen)
        own = read_manifest(out)
        if manifest is not None and (own is None or set(own.get("trials") or ()) <= set(manifest.get("trials") or ())):
            write_json(out / MANIFEST, manifest)
    stays = [name for name in outcomes if name in known and name not in wanted and known[name].kind in RESULT_KINDS]
    # As texts, in which NaN equals itself.
    differing = [
        name
        for name in stays
        if known[name].step == outcomes[name].step and str(known[name].val_loss) != str(outcomes[name].val_loss)
    ]
    return Imported(len(headings), len(wanted), len(stays), len(differing))


def _goes_further(theirs: Outcome, own: Outcome | None, rows: int) -> bool:
    """Whether an exported ending takes the place of what stands here: a result before none, else more steps."""
    if theirs.kind not in RESULT_KINDS:
        return own is None and not rows
    return own is None or own.kind not in RESULT_KINDS or theirs.step > own.step


def _population(trial_id: str) -> str | None:
    """What members of a population have in common in their ids; None for a trial that is none."""
    return trial_id.partition("-")[0] if "-" in trial_id else None


def _check_place(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise SpecError(f"{folder} is a link to nothing; a folder is expected")
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder} is a file; a folder is expected")
    others = [item.name for item in folder.iterdir() if not item.name.startswith(".")] if folder.is_dir() else []
    if others and not shards(folder):
        raise SpecError(
            f"{folder} holds other things ({', '.join(sorted(others)[:3])}) and no export; "
            "an empty or new folder is expected"
        )
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(standing, os.W_OK):
        raise SpecError(f"{folder} can't be written: no permission on {standing}")


def _fingerprint(trial: Sequence[Any], ending: Sequence[Any] | None, rows: int) -> str:
    """Changes with all that a later shard would have to say of the trial; an import leaves it as it is."""
    config, numerics = json.loads(trial[TRIAL_FIELDS.index("config")]), trial[TRIAL_FIELDS.index("numerics")]
    for name in ("source", "revision"):  # where the text lies, which its sha256 tells better
        config["data"].pop(name, None)
    recorded = TABLES["outcomes"].index("recorded")
    parts = [] if ending is None else [[*ending[1:recorded], *ending[recorded + 1 :]], rows]
    text = json.dumps([config, numerics, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _heading(folder: Path) -> str:
    """What the trial's record says of itself beside the configuration, as JSON: data, devices, workers."""
    return json.dumps({key: value for key, value in read_config(folder).items() if key != "config"})


_IS_CHECK = " OR ".join(
    f"{name} IS NOT NULL" for name in ("tokens_per_s", "samples_per_s", "val_loss", "flips", "stable_rank", "events")
)


def _rows(connection: Any, trial_ids: Sequence[str], columns: Sequence[str], more: str) -> Iterator[Sequence[Any]]:
    for start in range(0, len(trial_ids), AT_A_TIME):
        part = trial_ids[start : start + AT_A_TIME]
        yield from connection.execute(
            f"SELECT trial_id, step, {','.join(columns)} FROM rows "
            f"WHERE trial_id IN ({','.join('?' * len(part))}) {more} ORDER BY trial_id, step",
            part,
        )


def _checks(rows: Iterable[Sequence[Any]], detail: Detail) -> Iterator[Sequence[Any]]:
    """Of each signal so many values of each trial, the first and the last among them, and all evaluations and words."""
    names = ("trial_id", "step", *IN_CHECKS)
    whole = {place for place, name in enumerate(names) if name in (*EVALUATED, "formats", "events")}
    for _, own in groupby(rows, key=itemgetter(0)):
        found = [list(row) for row in own]
        for column in set(range(2, len(names))) - whole:
            measured = [place for place, row in enumerate(found) if row[column] is not None]
            most = len(measured) if detail == LEAN and names[column] in HEADLINE else detail.checks
            for place in set(measured) - set(_evenly(measured, most)):
                found[place][column] = None
        yield from (row for row in found if any(value is not None for value in row[2:]))


def _evenly(items: Sequence[int], most: int) -> list[int]:
    """At most so many of the items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, most)]


def _cut(table: pa.Table, detail: Detail) -> pa.Table:
    """The table with its signals and training losses in so many bits."""
    if detail.bits is None:
        return table
    for place, name in enumerate(table.column_names):
        if pa.types.is_floating(table.schema.field(name).type) and name not in EVALUATED:
            column = table[name].combine_chunks()
            cut = pa.array(
                to_bits(column.to_numpy(zero_copy_only=False), detail.bits), mask=np.asarray(column.is_null())
            )
            table = table.set_column(place, name, cut)
    return table


def to_bits(value: np.ndarray, bits: int) -> np.ndarray:
    """Rounded to so many significant bits, to nearest; infinities and NaN stay."""
    mantissa, exponent = np.frexp(value)
    with np.errstate(over="ignore"):
        found: np.ndarray = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return found


def _layers(trials: Path, configs: Mapping[str, TrainConfig], detail: Detail) -> pa.Table:
    """Layer signals as they are exported, like values beside each other."""
    found = [OF_LAYERS.empty_table()]
    for trial_id, config in configs.items():
        table = read_layers(trials / trial_id)
        kept = pc.is_in(_moments(table), _moments(_chosen(table, config.checkpoint_interval, detail.points)))
        exact = REFERENCE_SIGNALS if config.is_reference and config.format == BASELINE else ()
        is_exact = pc.is_in(table["signal"], pa.array(exact, pa.string()))
        table = table.append_column("is_exact", is_exact).filter(pc.or_(kept, is_exact))
        value = table["value"].to_numpy()
        short = _rounded(value) if detail.bits is None else to_bits(value, detail.bits)
        stored = np.where(table["is_exact"].to_numpy(), value, short)
        names = pa.array([trial_id] * len(table), pa.string())
        columns = [names, *(table[name] for name in ("step", "layer", "signal")), pa.array(stored)]
        found.append(pa.table(columns, schema=OF_LAYERS))
    order = [(name, "ascending") for name in ("signal", "layer", "trial_id", "step")]
    return pa.concat_tables(found).sort_by(order)


def _chosen(table: pa.Table, checkpoint_interval: int, most: int) -> pa.Table:
    """(signal, step) of what is exported of a trial: signals are measured at different checks."""
    measured = table.group_by(["signal", "step"]).aggregate([]).sort_by("signal")
    rows = zip(measured["signal"].to_pylist(), measured["step"].to_pylist(), strict=True)
    chosen = [
        (signal, step)
        for signal, own in groupby(rows, key=itemgetter(0))
        for step in points([step for _, step in own], checkpoint_interval, most)
    ]
    signals, steps = zip(*chosen, strict=True) if chosen else ((), ())
    return pa.table({"signal": pa.array(signals, pa.string()), "step": pa.array(steps, pa.int64())})


def _moments(table: pa.Table) -> pa.Array:
    return pc.binary_join_element_wise(table["signal"], table["step"].cast(pa.string()), " ")


def points(steps: Iterable[int], checkpoint_interval: int, most: int) -> list[int]:
    """At most so many of the steps at which a signal was measured: the last, the first, and evenly between them, of
    checkpoints where there are enough."""
    measured = sorted(steps)
    if most == 1:
        return measured[-1:]
    at_checkpoints = [step for step in measured[1:-1] if step % checkpoint_interval == 0]
    if len(at_checkpoints) >= most - 2:
        measured = [measured[0], *at_checkpoints, measured[-1]]
    return _evenly(measured, most)


def _rounded(value: np.ndarray) -> np.ndarray:
    """To float32, but for what would overflow it."""
    with np.errstate(over="ignore"):
        short = value.astype(np.float32).astype(np.float64)
    return np.where(np.isfinite(short), short, value)


def write_record(path: Path, config: str, heading: str, rows: list[dict[str, Any]], outcome: Outcome | None) -> None:
    """What a worker that trained the trial here would have left, as far as it is known elsewhere."""
    with TrialFolder(path) as folder:
        folder.begin({"config": json.loads(config)} | json.loads(heading), after_step=0)
        folder.append(rows)
        if outcome is not None:
            folder.finish(outcome)
