"""The W&B runs of a sweep: made again from its records, and the sweep's report made of them."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from altgrad.commands.ledgers import check_margins, print_report
from altgrad.sweep import monitor
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.folder import owned, read_manifest
from altgrad.sweep.wandb_mirror import mode_of, rebuild


def wandb_sync(request: argparse.Namespace) -> int:
    """Exit code 1 where W&B failed; a sweep that is still running is refused, as it mirrors itself."""
    try:
        mode = mode_of(request.wandb)
    except ValueError as error:
        raise SpecError(str(error).replace("--wandb", "--mode")) from None
    if mode == "off":
        raise SpecError(f"--mode: {request.wandb or os.environ.get('WANDB_MODE')!r} is not allowed: offline or online")
    with monitor.open_ledger(request.out) as ledger:
        outcomes = ledger.outcomes()
        trials = {trial_id: outcomes.get(trial_id) for trial_id in ledger.trials()}
    with owned(request.out):
        count = rebuild(request.out, trials, mode, print)
    if count is None:
        return 1
    print(f"{count} runs in {request.out / 'wandb'}" if mode == "offline" else f"{count} runs are online")
    return 0


def report_of_runs(request: argparse.Namespace) -> int:
    """The report of a sweep's W&B runs, written to `--to`, else to a folder here that is named after them.

    The sweep's folder that the runs made stays beside the report, which leads to its trials.
    """
    from altgrad.sweep.wandb_runs import runs_in
    from altgrad.sweep.wandb_sweep import sweep_from

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
