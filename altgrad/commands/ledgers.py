"""What sweeps' ledgers are asked: status, why. Each takes the parsed request, returns the exit code.

They need neither torch nor Ray, so that asking costs nothing beside a sweep that is running.
"""

from __future__ import annotations

import argparse

from altgrad.sweep.record import monitor
from altgrad.sweep.record.monitor import print_table


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
