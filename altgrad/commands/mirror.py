"""The W&B runs of a sweep, made again from its records."""

from __future__ import annotations

import argparse
import os

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record import monitor
from altgrad.sweep.record.folder import owned
from altgrad.sweep.record.wandb_mirror import mode_of, rebuild


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
