"""Sweeps sent from one machine to another: export and import. Each takes the parsed request, returns the exit code."""

from __future__ import annotations

import argparse

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record import monitor
from altgrad.sweep.record.folder import FolderError


def export(request: argparse.Namespace) -> int:
    with monitor.open_ledger(request.out):
        pass
    from altgrad.sweep.record.transfer import FULL, LEAN, export_sweep

    found = export_sweep(request.out, request.folder, LEAN if request.lean else FULL)
    if found.shard is None:
        print(f"{request.folder} has all that {request.out} holds")
        return 0
    print(
        f"{found.shard}: {found.trials} trials that are new or have changed, {found.ended} of them with their ending, "
        f"{found.bytes / 1e6:.2f} MB"
    )
    return 0


def import_(request: argparse.Namespace) -> int:
    from altgrad.sweep.record.transfer import import_sweep

    try:
        found = import_sweep(request.folder, request.out)
    except FolderError as error:
        raise SpecError(str(error)) from None
    print(f"{request.out}: {found.entered} of the export's {found.trials} trials came in with how they ended")
    if found.known:
        print(f"{found.known} have a result here that goes as far, which stays")
    if found.differing:
        print(f"{found.differing} of these ended at the same step with another loss there (another machine, or torch)")
    print("the sweep's own command, with this --out, trains what is missing")
    return 0
