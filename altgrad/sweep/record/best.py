"""The one configuration that a sweep found best, and the sweep of one that trains it again.

Best by validation score, averaged over seeds: the loss of language modelling, F1 micro of a classifier, both on
validation documents, at the last step asked for. A configuration competes when all its seeds have run to their end;
one with a seed that a guard stopped does not, nor one with a seed of which a layer had to be moved to another format:
what it reached is not its own. The references (AdamW in BF16 and FP32) are what others are compared
with and compete only where there is nothing else.

The sweep of one spells every value out, so that it means the same whatever the defaults become. Its trials have the ids
of the winner's, and its reference the winner's learning rate where both have the same unit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.pace.objectives import OBJECTIVES, value_of
from altgrad.sweep.record.folder import read_manifest
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.axes import arm_fields
from altgrad.sweep.space.declaration import TEMPLATE
from altgrad.sweep.space.resolve import SUFFIXES
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import OutcomeKind

MEASURES = {"lm": "val_loss", "classify": "val_f1_micro"}


@dataclass(frozen=True)
class Winner:
    """A configuration (of its first seed), its score by seed, and among how many it is the best."""

    config: TrainConfig
    measure: str
    scores: Mapping[int, float]
    trial_ids: tuple[str, ...]
    rivals: int

    @property
    def mean(self) -> float:
        return math.fsum(self.scores.values()) / len(self.scores)


GROUPS = ("format", "arm", "policy")
"""What the best may be asked for each of."""


def find_best(ledger: Ledger, asked: list[str] | None = None) -> Winner:
    """The best of the trials asked for, or of all in the ledger; SpecError where none has run to its end."""
    whole = _whole(ledger, asked)
    return _best_of([winner for winner in whole if not winner.config.is_reference] or whole)


def find_best_per(ledger: Ledger, fields: Sequence[str], asked: list[str] | None = None) -> list[Winner]:
    """The best of each group of equal `fields`, of GROUPS, references among them; SpecError as for `find_best`."""
    groups: dict[tuple[str, ...], list[Winner]] = {}
    for winner in _whole(ledger, asked):
        groups.setdefault(tuple(str(getattr(winner.config, name)) for name in fields), []).append(winner)
    return [_best_of(group) for group in groups.values()]


def _best_of(competing: Sequence[Winner]) -> Winner:
    sign = 1 if OBJECTIVES[competing[0].measure].direction == "minimize" else -1
    best = min(competing, key=lambda winner: sign * winner.mean)
    return replace(best, rivals=len(competing))


def _whole(ledger: Ledger, asked: list[str] | None) -> list[Winner]:
    """Every configuration that has run to its end with all its seeds, in their order."""
    whole = [winner for group in _groups(ledger, asked) if (winner := _scored(ledger, group)) is not None]
    if not whole:
        shifted = shifted_text(ledger, asked)
        raise SpecError(
            f"{ledger.path.parent}: no configuration has run to its end with all its seeds yet"
            f"{f'; {shifted}' if shifted else ''}"
        )
    return whole


def shifted_text(ledger: Ledger, asked: list[str] | None = None) -> str:
    """How many configurations do not compete for a shift of formats, or nothing."""
    groups = [list(group.items()) for group in _groups(ledger, asked)]
    count = sum(any(ledger.formats_at(name, config.steps) for name, config in group) for group in groups)
    if not count:
        return ""
    return (
        f"{count} configuration{'s' if count > 1 else ''} left out: a layer had to be moved to another format "
        "(altgrad why)"
    )


def _groups(ledger: Ledger, asked: list[str] | None) -> list[dict[str, TrainConfig]]:
    """The seeds of each configuration, by id."""
    groups: dict[str, dict[str, TrainConfig]] = {}
    for trial_id, config in ledger.configs(None if asked is None else set(asked)).items():
        pooled = trial_id.partition("-")[0] if "-" in trial_id else ""
        groups.setdefault(pooled + config.model_dump_json(exclude={"seed"}), {})[trial_id] = config
    return list(groups.values())


def _scored(ledger: Ledger, group: Mapping[str, TrainConfig]) -> Winner | None:
    first = next(iter(group.values()))
    measure = MEASURES[first.task]
    outcomes = ledger.outcomes_of(list(group))
    scores = {}
    for trial_id, config in group.items():
        value = value_of(ledger, trial_id, config, measure)
        is_done = trial_id in outcomes and outcomes[trial_id].kind is OutcomeKind.DONE
        if not is_done or value is None or value == OBJECTIVES[measure].worst:
            return None
        scores[config.seed] = value
    return Winner(first, measure, scores, tuple(group), 1)


def asked_in(out: Path) -> list[str] | None:
    """The trials of the sweep that the folder ran last; None where it does not say."""
    return (read_manifest(out) or {}).get("trials")


def sweep_of_one(config: TrainConfig, seeds: Collection[int], name: str = "best") -> SweepSpec:
    """A sweep that trains the configuration, from the least of these seeds to the greatest, and its reference."""
    arm = config.arm if config.arm in ARMS else _nearest_arm(config)
    base, optimizer = ARMS[arm], config.optimizer
    differing = {
        field: getattr(optimizer, field)
        for field in arm_fields(arm)
        if getattr(optimizer, field) != getattr(base, field)
    }
    shared_lr = not base.has_own_lr_unit and not optimizer.has_own_lr_unit
    if shared_lr:
        differing.pop("lr", None)
    return SweepSpec.model_validate(
        {
            "name": name,
            "formats": (config.format,),
            "optimizers": (arm,),
            "policies": (config.policy,),
            "lrs": (optimizer.lr,) if shared_lr else (),
            "first_seed": min(seeds),
            "seeds": max(seeds) - min(seeds) + 1,
            "axes": {f"{arm}.{field}": [value] for field, value in differing.items()},
            **{field: getattr(config, field) for field in TEMPLATE},
        }
    )


def _nearest_arm(config: TrainConfig) -> str:
    """The arm from which the fewest fields differ, among those of the same kind."""
    own = config.optimizer.model_dump()

    def distance(name: str) -> int:
        return sum(value != own[field] for field, value in ARMS[name].model_dump().items())

    return min((name for name in ARMS if ARMS[name].kind == config.optimizer.kind), key=distance)


def export(winner: Winner, ledger: Ledger, path: Path) -> None:
    """Writes the sweep of one as YAML or JSON; SpecError where there is no such sweep, or the file exists."""
    if path.suffix.lower() not in SUFFIXES:
        raise SpecError(f"--export: {path}: allowed are {', '.join(SUFFIXES)} files")
    if path.exists():
        raise SpecError(f"--export: {path} exists; a new file is expected")
    exchanged, _ = ledger.mutations(winner.trial_ids)
    if exchanged:
        raise SpecError(
            f"--export: {exchanged[0][0]} took over weights and values from others (pbt) at step "
            f"{exchanged[0][1]}: no single configuration trains it again"
        )
    try:
        write(sweep_of_one(winner.config, winner.scores, path.stem), path)
    except OSError as error:
        raise SpecError(f"--export: {path} can't be written: {error.strerror}") from None


def write(spec: SweepSpec, path: Path) -> None:
    """Writes the sweep of one as JSON or, by any other ending, YAML."""
    plain: dict[str, Any] = spec.model_dump(mode="json")
    for name in ("search", "num_samples", "objectives", "search_seed", "constraints", "scheduler", "race", "pbt"):
        del plain[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    # In C where PyYAML was built so: a report writes one for every cell.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    is_json = path.suffix.lower() == ".json"
    text = json.dumps(plain, indent=1) if is_json else yaml.dump(plain, Dumper=dumper, sort_keys=False)
    path.write_text(text, encoding="utf-8")
