"""Which trials are members of one population, and their ids: they take over from each other, so no member's numbers
follow from its own configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from altgrad.sweep.space.declaration import Declaration
from altgrad.training.config import TrainConfig

FIELDS = ("lr", "rung_clip")
PREFIX = "pbt-"


def named(spec: Declaration, trials: Sequence[TrainConfig], data_sha256: str) -> dict[str, TrainConfig]:
    """The sweep's trials by id; members of populations have ids of their own kind."""
    found = {}
    populations: dict[str, list[TrainConfig]] = {}
    for config in trials:
        populations.setdefault(population_of(config), []).append(config)
    for config in trials:
        members = populations[population_of(config)]
        if config.is_reference or len(members) < 2:
            found[config.trial_id(data_sha256)] = config
            continue
        identity = {
            "trial": config.trial_id(data_sha256),
            "population": sorted(member.trial_id(data_sha256) for member in members),
            "pbt": spec.pbt.model_dump(mode="json") | {"interval": spec.exchange_every},
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        found[PREFIX + digest[:12]] = config
    return found


def population_of(config: TrainConfig) -> str:
    """Equal for members of one population: everything but what they exchange."""
    own = config.model_dump(mode="json")
    own["optimizer"] = {name: value for name, value in own["optimizer"].items() if name not in FIELDS}
    return json.dumps(own, sort_keys=True)
