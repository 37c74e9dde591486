"""Trials that are compared by seed run on one kind of GPU.

The same run gives other numbers on another kind, by a little, and a paired difference across kinds holds that too.
Where a cluster has GPUs of several kinds, all trials of a seed therefore ask for the kind that the first of them got,
and seeds are spread over the kinds by how many GPUs each has. A kind that is gone is waited for no longer: the seed
goes on elsewhere, and the report says of which seeds the trials ran on different devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ray

from altgrad.training.config import TrainConfig

ACCELERATOR = "accelerator_type:"
"""How Ray calls the resource that every node with GPUs of a kind has one of."""


def kinds_here(nodes: Callable[[], list[dict[str, Any]]] = lambda: ray.nodes()) -> Counter[str]:
    """Number of GPUs of each kind, over the nodes that are alive; Ray's names of the kinds."""
    found: Counter[str] = Counter()
    for node in nodes():
        resources = node["Resources"] if node["Alive"] else {}
        for name in resources:
            if name.startswith(ACCELERATOR) and (gpus := int(resources.get("GPU", 0))):
                found[name.removeprefix(ACCELERATOR)] += gpus
    return found


class Placement:
    """Which kind of GPU a trial asks for. `ended`: on which device trials of earlier runs were trained."""

    def __init__(
        self,
        trials: Mapping[str, TrainConfig],
        ended: Mapping[str, str | None] | None = None,
        kinds: Callable[[], Counter[str]] = kinds_here,
    ) -> None:
        self._trials, self._kinds = trials, kinds
        self._ended = dict(ended or {})
        self._chosen: dict[int, str] = {}
        self._of_seeds: dict[int, str] = {}
        """device of the first ended trial of each seed, by its full name"""
        for trial_id, device in self._ended.items():
            if device and trial_id in trials:
                self._of_seeds.setdefault(trials[trial_id].seed, device)

    def kind(self, trial_id: str) -> str | None:
        """The kind that this trial has to ask for; None where any will do, or only one is there."""
        here, seed = self._kinds(), self._trials[trial_id].seed
        if len(here) < 2:
            # It asks for no kind, for which no cluster could grow; where it runs is most likely here.
            for only in here:
                self._chosen.setdefault(seed, only)
            return None
        chosen = named_in(self._of_seeds.get(seed, ""), here) or self._chosen.get(seed)
        if chosen is None or chosen not in here:
            used = Counter(self._chosen.values())
            chosen = min(here, key=lambda kind: (used[kind] / here[kind], kind))
        self._chosen[seed] = chosen
        return chosen

    def ended(self, trial_id: str, device: str | None) -> None:
        """A trial has ended on a device, to which the others of its seed go."""
        if device and trial_id in self._trials:
            self._of_seeds.setdefault(self._trials[trial_id].seed, device)

    def is_gone(self, kind: str | None) -> bool:
        """Whether no node has a GPU of this kind any more."""
        return kind is not None and kind not in self._kinds()


def named_in(device: str, kinds: Mapping[str, int]) -> str | None:
    """The kind, in Ray's words ('A100', 'RTX-4090'), of a device's full name ('NVIDIA A100-SXM4-80GB')."""
    words = f" {device.upper().replace('-', ' ')} "
    fitting = [kind for kind in kinds if f" {kind.upper().replace('-', ' ')} " in words]
    return max(fitting, key=len, default=None)
