"""The placement groups of a sweep: what one that finds no place waits for, and those that outlive their trial.

Ray says of a trial that can't start no more than PENDING, for ever. Here stands what it asks for, and what the cluster
has and uses. And Ray Train leaves its workers' group behind where a trial's driver died and the cleaner did not learn
of it: GCS removes a group only once the whole job is over, so that the next trial would wait for resources that nobody
uses. Such a group is removed after a grace time.

A group's id ends in its job's, so no other sweep's groups are touched. Whose it is, its workers say with their results;
until then it may be that of any trial that ran when it was first seen.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from altgrad.sweep.engine.placement import ACCELERATOR

LOOK_SECONDS = 5.0
PATIENCE_SECONDS = 10.0
"""How long a group may find no place before it is worth a word."""
GRACE_SECONDS = 30.0
"""How long a group may outlive its trial; Ray's own cleaner takes 2 to 3 seconds."""

Amounts = Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """A placement group that is not removed; `bundles` are what it asks for, one per process."""

    id: str
    bundles: tuple[Amounts, ...]
    is_placed: bool


def own_groups() -> list[Group]:
    """The groups of the job that this process drives."""
    job = ray.get_runtime_context().get_job_id()
    return [
        Group(row["placement_group_id"], tuple(row["bundles"].values()), row["state"] == "CREATED")
        for row in placement_group_table().values()
        if row["placement_group_id"].endswith(job) and row["state"] != "REMOVED"
    ]


def remove_group(group_id: str) -> None:
    """Removes it, whoever made it."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))


def cluster() -> tuple[Amounts, Amounts]:
    """What the cluster has, and what of it is free."""
    return ray.cluster_resources(), ray.available_resources()


class GroupWatch:
    """Looks at the groups now and then. `worker`: what each process of a trial's own group asks for; None: no trial
    has one, and nothing is ever removed."""

    def __init__(
        self,
        worker: Amounts | None = None,
        *,
        grace: float = GRACE_SECONDS,
        patience: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        read: Callable[[], Iterable[Group]] = own_groups,
        remove: Callable[[str], None] = remove_group,
        sizes: Callable[[], tuple[Amounts, Amounts]] = cluster,
    ) -> None:
        self._worker, self._grace, self._patience, self._clock = worker, grace, patience, clock
        self._read, self._remove, self._sizes = read, remove, sizes
        self._looked = -LOOK_SECONDS
        self._trials: dict[str, frozenset[str]] = {}
        self._unplaced: dict[str, float] = {}
        self._over: dict[str, float] = {}
        self.waiting: str | None = None
        """what trials wait for, in words"""

    def started(self, trial_id: str) -> None:
        """The trial begins, or begins again: what was there before is none of its groups."""
        self._trials = {group: trials - {trial_id} for group, trials in self._trials.items()}

    def belongs(self, group_id: str, trial_id: str) -> None:
        """A worker of the trial has said that it lives in this group."""
        self._trials[group_id] = frozenset({trial_id})

    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return self._clock() - self._looked >= LOOK_SECONDS

    def look(self, running: Collection[str]) -> dict[str, str]:
        """Removes what has outlived its trial, the `running` ones given; returns a line for each group removed."""
        now = self._looked = self._clock()
        groups = {group.id: group for group in self._read()}
        self._unplaced = {name: self._unplaced.get(name, now) for name, group in groups.items() if not group.is_placed}
        self.waiting = self._waiting(
            [groups[name] for name, since in self._unplaced.items() if now - since >= self._patience]
        )
        own = [name for name, group in groups.items() if self._is_of_workers(group)]
        self._trials = {name: self._trials.get(name, frozenset(running)) for name in own}
        self._over = {name: self._over.get(name, now) for name in own if not self._trials[name] & set(running)}
        freed = [name for name, since in self._over.items() if now - since >= self._grace]
        for name in freed:
            self._remove(name)
        return {
            name: f"placement group {name} of {_asked(groups[name])} had outlived its trial by "
            f"{now - self._over[name]:.0f} s and was removed"
            for name in freed
        }

    def _is_of_workers(self, group: Group) -> bool:
        if self._worker is None:
            return False
        bundles = (
            {name: bundle[name] for name in bundle if not name.startswith(ACCELERATOR)} for bundle in group.bundles
        )
        return all(bundle == dict(self._worker) for bundle in bundles)

    def _waiting(self, groups: list[Group]) -> str | None:
        if not groups:
            return None
        asked = Counter(map(_asked, groups))
        whole, free = self._sizes()
        names = dict.fromkeys(name for group in groups for bundle in group.bundles for name in bundle)
        has = ", ".join(
            f"{whole[name]:g} {name} ({whole[name] - free.get(name, 0.0):g} in use)"
            if whole.get(name)
            else f"no {name}"
            for name in names
        )
        return f"{' and '.join(f'{count} times {text}' for text, count in asked.items())}; the cluster has {has}"


def _asked(group: Group) -> str:
    """'2 x (0.9 CPU + 1 GPU)'."""
    found = Counter(" + ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in group.bundles)
    return ", ".join(f"{count} x ({text})" for text, count in found.items())
