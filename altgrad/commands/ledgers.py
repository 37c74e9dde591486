"""What sweeps' ledgers are asked: status, why, report, compare. Each takes the parsed request, returns the exit code.

The first two need neither torch nor Ray, so that asking costs nothing beside a sweep that is running.
"""

from __future__ import annotations

import argparse
import math
import os
import sqlite3
from pathlib import Path

from altgrad.sweep import monitor
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.folder import damaged_text
from altgrad.sweep.monitor import print_table


def status(request: argparse.Namespace) -> int:
    headline, counts = monitor.status(request.out)
    print(headline)
    print_table(counts)
    for line in monitor.notices(request.out):
        print(line)
    return 0


def why(request: argparse.Namespace) -> int:
    table = monitor.why(request.out, request.trial)
    if table:
        print_table([monitor.WHY_COLUMNS, *table])
    else:
        print("no trial was stopped")
    for line in monitor.mutations(request.out, request.trial):
        print(line)
    return 0


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
        from altgrad.commands.mirror import report_of_runs

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
