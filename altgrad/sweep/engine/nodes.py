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
import yaml
from ray.exceptions import RayError

from altgrad.sweep.engine.preflight import NOT_SHARED, seen_from
from altgrad.sweep.options import RunOptions
from altgrad.training.devices import STAND_IN, gpu_count, own_device

LOOK_SECONDS = 5.0
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` puts a cluster's configuration on its head."""

Amounts = Mapping[str, float]


def largest() -> Amounts | None:
    """What the cluster can grow to; None where nobody says.

    Ray's own call for it (`get_max_resources_from_cluster_config`) knows nothing, for nothing in Ray 2.60 reports to
    it. The head of a cluster of `ray up` has the file that its autoscaler reads.
    """
    address = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    if address != ray.util.get_node_ip_address():
        return None
    try:
        return grown(yaml.safe_load(BOOTSTRAP.expanduser().read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, yaml.YAMLError):
        return None


def grown(config: Mapping[str, Any]) -> Amounts | None:
    """The most of each resource that a configuration of `ray up` allows for; None where a type of node says nothing."""
    total, head = int(config.get("max_workers", 0)), config.get("head_node_type")
    kinds: dict[str, Any] = config.get("available_node_types") or {}
    if not kinds or any(not kind.get("resources") for kind in kinds.values()):
        return None
    found: dict[str, float] = {}
    for name in sorted({name for kind in kinds.values() for name in kind["resources"]}):
        left, amount = total, float(kinds.get(str(head), {"resources": {}})["resources"].get(name, 0))
        workers = [(float(kind["resources"].get(name, 0)), key) for key, kind in kinds.items() if key != head]
        for each, key in sorted(workers, reverse=True):
            count = min(left, int(kinds[key].get("max_workers", total)))
            amount, left = amount + each * count, left - count
        found[name] = amount
    return found


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
