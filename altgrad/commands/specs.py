"""What is done with the specs of sweeps: their schema, and the one that a sweep found best."""

from __future__ import annotations

import argparse
import json

from altgrad.sweep import best, monitor
from altgrad.sweep.schema import json_schema


def schema(request: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=1))
    return 0


def show_best(request: argparse.Namespace) -> int:
    with monitor.open_ledger(request.out) as ledger:
        winner = best.find_best(ledger, best.asked_in(request.out))
        config = winner.config
        values = ", ".join(f"{name} {value}" for name, value in config.optimizer.model_dump().items() if name != "kind")
        print(
            f"{config.format} {config.arm} {config.policy}: {winner.measure} {winner.mean:.4f} over "
            f"{len(winner.scores)} seeds, the best of {winner.rivals} configurations"
        )
        print(f"{values}\ntrials: {', '.join(winner.trial_ids)}")
        if request.export is not None:
            best.export(winner, ledger, request.export)
            print(f"altgrad run {request.export} trains it again")
    return 0
