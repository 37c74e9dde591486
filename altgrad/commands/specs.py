"""What is done with the specs of sweeps: their schema, and the one that a sweep found best."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from altgrad.sweep.complaints import SpecError, check_choice
from altgrad.sweep.record import best, monitor
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.monitor import print_table
from altgrad.sweep.space.schema import json_schema


def schema(request: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=1))
    return 0


def show_best(request: argparse.Namespace) -> int:
    fields = _groups_of(request.per)
    if fields and request.export is not None:
        raise SpecError("--export: with --per there are several; one of both is expected")
    with monitor.open_ledger(request.out) as ledger:
        asked = best.asked_in(request.out)
        if fields:
            _print_each(best.find_best_per(ledger, fields, asked), fields)
            _print_shifted(ledger, asked)
            return 0
        winner = best.find_best(ledger, asked)
        config = winner.config
        values = ", ".join(f"{name} {value}" for name, value in config.optimizer.model_dump().items() if name != "kind")
        print(
            f"{config.format} {config.arm} {config.policy}: {winner.measure} {winner.mean:.4f} over "
            f"{len(winner.scores)} seeds, the best of {winner.rivals} configurations"
        )
        print(f"{values}\ntrials: {', '.join(winner.trial_ids)}")
        _print_shifted(ledger, asked)
        if request.export is not None:
            best.export(winner, ledger, request.export)
            print(f"altgrad run {request.export} trains it again")
    return 0


def _print_shifted(ledger: Ledger, asked: list[str] | None) -> None:
    if said := best.shifted_text(ledger, asked):
        print(said)


def _groups_of(text: str | None) -> list[str]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    try:
        return list(dict.fromkeys(check_choice(name, best.GROUPS, "field") for name in names))
    except ValueError as error:
        raise SpecError(f"--per: {error}") from None


def _print_each(winners: Sequence[best.Winner], fields: Sequence[str]) -> None:
    """The best of each group, in the order of the ledger."""
    measure = winners[0].measure
    others = [name for name in best.GROUPS if name not in fields]
    lines = [(*fields, measure, "seeds", "lr", *others, "best of")]
    for winner in winners:
        config = winner.config
        own = [str(getattr(config, name)) for name in fields]
        rest = [str(getattr(config, name)) for name in others]
        lines.append(
            (*own, f"{winner.mean:.4f}", str(len(winner.scores)), f"{config.optimizer.lr:g}", *rest, str(winner.rivals))
        )
    print_table(lines)
