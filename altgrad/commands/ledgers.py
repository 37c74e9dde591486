"""What a sweep's ledger is asked: status, why, report. Each takes the parsed request and returns the exit code.

The first two need neither torch nor Ray, so that asking costs nothing beside a sweep that is running.
"""

from __future__ import annotations

import argparse

from altgrad.sweep import monitor
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


def report(request: argparse.Namespace) -> int:
    monitor.open_ledger(request.out).close()
    from altgrad.analysis.report import write_report

    finding = write_report(request.out)
    print(f"{finding.headline}\n{finding.certainty}\nreport: {finding.path}")
    return 0
