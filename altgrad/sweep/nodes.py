"""The nodes of a running Ray: how many trials they hold, now and once grown, and whether each new one can serve.

A cluster that grows has almost nothing when a sweep starts, so neither how much runs at once nor whether all nodes see
the sweep's folder can be settled then: both are asked again as nodes come and go.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from altgrad.sweep.options import RunOptions
from altgrad.sweep.preflight import NOT_SHARED, seen_from
from altgrad.training.devices import STAND_IN, gpu_count, own_device

LOOK_SECONDS = 5.0

Amounts = Mapping[str, float]


def largest() -> Amounts | None:
    """What the cluster can grow to, by its autoscaler's own word; None where none says."""
    # Ray Data sizes itself by the same call; there is no public one.
    try:
        from ray._private.state import state

        found = state.get_max_resources_from_cluster_config()
    except (ImportError, AttributeError):
        return None
    return None if found is None else {name: float(amount) for name, amount in found.items()}


class ClusterSize:
    """The resources that the connected Ray has, and those that it can grow to; asked again every few seconds."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], Amounts] = lambda: ray.cluster_resources(),
        most: Callable[[], Amounts | None] = largest,
    ) -> None:
        self._clock, self._now, self._most = clock, now, most
        self._read: tuple[Amounts, Amounts | None] | None = None
        self._asked = 0.0

    def read(self) -> tuple[Amounts, Amounts | None]:
        """What it has, and what it can grow to or None."""
        if self._read is None or self._clock() - self._asked >= LOOK_SECONDS:
            self._read, self._asked = (self._now(), self._most()), self._clock()
        return self._read


class NodeWatch:
    """Looks at each node that joins: whether it sees the folder that trials write to."""

    def __init__(
        self, folder: Path, nodes: Callable[[], list[dict[str, Any]]] = lambda: ray.nodes(), ask: Any = seen_from
    ) -> None:
        self._nodes, self._ask, self._folder = nodes, ask, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._marker = tempfile.NamedTemporaryFile(prefix=".altgrad-", dir=folder)  # noqa: SIM115 (as long as this)
        self._known: set[str] = set()
        self._asked: dict[Any, str] = {}

    def look(self) -> str | None:
        """Asks nodes that are new, and reads what others have answered since; what is wrong with one, or None."""
        alive = [node for node in self._nodes() if node["Alive"]]
        for node in alive:
            if node["NodeID"] not in self._known:
                self._known.add(node["NodeID"])
                self._asked[self._ask(self._marker.name, node)] = node["NodeManagerAddress"]
        answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for answer in answered:
            address = self._asked.pop(answer)
            try:
                is_seen = ray.get(answer)
            except RayError:
                continue  # the node has gone again
            if not is_seen:
                return NOT_SHARED.format(
                    out=self._folder.parent, address=address, folder=self._folder, count=len(alive)
                )
        return None


def devices_text(options: RunOptions) -> str:
    """What trials compute on, in words."""
    if not options.gpus:
        return "on CPUs"
    each = f"{options.gpus:g} GPU(s) per worker (--gpus-per-trial)"
    if options.address != "local":
        return each
    kind = own_device(options.gpus).kind
    note = f" by {STAND_IN}" if kind.startswith("stand-in") else ""
    return f"{each}; {gpu_count()} x {kind}{note}"
