"""Reports and comparisons of sweeps, from their folders or their W&B runs. Each takes the parsed request, returns the
exit code.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record import monitor
from altgrad.sweep.record.folder import damaged_text, read_manifest
from altgrad.sweep.record.monitor import print_table


def margin_of(text: str | None) -> float | None:
    """The margin that a flag gives; SpecError for what is none."""
    return _amount("--margin", text, 10.0, "a part of BF16's loss above 0 (.1 is 10 %)")


def distance_of(text: str | None) -> float | None:
    """The distance that --equal-within gives; SpecError for what is none."""
    return _amount("--equal-within", text, math.inf, "nats above 0")


def _amount(flag: str, text: str | None, most: float, allowed: str) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value <= most and value < math.inf):
        raise SpecError(f"{flag}: {text!r} is not allowed: {allowed} is expected")
    return value


def compare(request: argparse.Namespace) -> int:
    margin, equal_within = margin_of(request.margin), distance_of(request.equal_within)
    for out in (request.out, request.other):
        with monitor.open_ledger(out):
            pass
    from altgrad.analysis.compare import compare as compared

    found = compared(request.out, request.other, margin=margin, equal_within=equal_within)
    for line in found.lines:
        print(line)
    if found.table.lines:
        print_table([tuple(found.table.columns), *map(tuple, found.table.lines)])
    return 0


def report(request: argparse.Namespace) -> int:
    if request.wandb is not None:
        return report_of_runs(request)
    if request.group is not None:
        raise SpecError("--group: chooses a sweep among W&B runs; --wandb PROJECT or FOLDER is expected with it")
    if request.out is None:
        raise SpecError("a sweep's folder is expected, or --wandb with a project or folder of W&B")
    check_margins(request)
    with monitor.open_ledger(request.out):
        pass
    to = request.to
    if to is None and not os.access(request.out, os.W_OK):
        to = Path(f"{request.out.resolve().name}-report")
        print(f"{request.out} can't be written: the report goes to {to}; --to DIR chooses another place")
    return print_report(request, request.out, to)


def check_margins(request: argparse.Namespace) -> None:
    """SpecError where a margin or a distance asked for is none."""
    margin_of(request.margin)
    distance_of(request.equal_within)


def print_report(request: argparse.Namespace, out: Path, to: Path | None) -> int:
    """Writes the report of the sweep in `out` as the request has it, and prints its finding."""
    from altgrad.analysis.report import write_report

    margin, equal_within = margin_of(request.margin), distance_of(request.equal_within)
    try:
        finding = write_report(out, margin=margin, equal_within=equal_within, to=to)
    except sqlite3.DatabaseError as error:
        raise SpecError(damaged_text(out / "ledger.sqlite", error)) from None
    except OSError as error:
        raise SpecError(f"{to or out / 'report'}: can't be written ({error.strerror or error})") from None
    print(f"{finding}\nreport: {finding.path}")
    return 0


def report_of_runs(request: argparse.Namespace) -> int:
    """The report of a sweep's W&B runs, written to `--to`, else to a folder here that is named after them.

    The sweep's folder that the runs made stays beside the report, which leads to its trials.
    """
    from altgrad.sweep.record.wandb_runs import runs_in
    from altgrad.sweep.record.wandb_sweep import sweep_from

    if request.out is not None:
        raise SpecError(f"{request.out} and --wandb: a report is of a sweep's folder, or of its W&B runs")
    check_margins(request)
    runs = runs_in(request.wandb)
    name = "-".join([runs.title, *([request.group] if request.group else []), "report"])
    to = request.to or Path(name)
    place = to / "sweep"
    if place.exists() and "wandb" not in (read_manifest(place) or {}):
        raise SpecError(f"--to: {place} is not of an earlier report of W&B runs, and stays; another folder is expected")
    with tempfile.TemporaryDirectory(prefix="altgrad-") as folder:
        made = Path(folder) / "sweep"
        for note in sweep_from(runs, request.group, made):
            print(note)
        try:
            shutil.rmtree(place, ignore_errors=True)
            to.mkdir(parents=True, exist_ok=True)
            shutil.move(made, place)
        except OSError as error:
            raise SpecError(f"{to}: can't be written ({error.strerror or error})") from None
    return print_report(request, place, to)
