"""The money guard: what a cluster costs now and has cost, and whether one more pod is allowed.

RunPod states each pod's price per hour. What was spent is that price over the time between two looks, from a pod's
creation on (`record` keeps it). Pods that are being created count with their list price from before the request until
they are seen, so that threads that create at the same time can't each take what is left for one.

Looking never fails for a disk. Where the record can't be read, what the pods that are up have cost by their ages counts
instead, and nothing is created under `max_cost_total` until a person has decided.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad_cluster.errors import ClusterError
from altgrad_cluster.record import Damaged, Pods, Record

RESERVED_S = 120.0
"""How long a reservation may last whose pod is never seen."""


@dataclass(frozen=True)
class Limits:
    """Caps in USD; None for no cap."""

    per_hour: float | None = None
    total: float | None = None


class OverBudget(ClusterError):
    """One more pod would cost too much."""


class Purse:
    """Spending of one cluster; safe to use from several threads and processes."""

    def __init__(
        self, path: Path, limits: Limits, clock: Callable[[], float] = time.time, *, copy: Path | None = None
    ) -> None:
        self._record = Record(path, copy)
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._reserved: dict[str, tuple[float, float]] = {}
        self._rates: dict[str, float] = {}

    def observe(self, pods: Iterable[dict[str, Any]]) -> None:
        """Adds what these pods, which are all there are, cost since they were last seen."""
        now, pods = self._clock(), list(pods)
        seen = {pod["id"]: (float(pod.get("cost") or 0.0), _created(pod, now)) for pod in pods}
        with self._lock:
            self._rates = {pod.get("name", ""): float(pod.get("cost") or 0.0) for pod in pods}
            for name in self._rates:
                self._reserved.pop(name, None)

        def edit(known: Pods) -> None:
            for pod_id, (rate, created) in seen.items():
                last = known.get(pod_id, {"at": created, "rate": 0.0, "usd": 0.0})
                # A moment ago the price may have been another: the higher of the two is assumed.
                paid = max(rate, last["rate"]) * max(0.0, now - last["at"]) / 3600
                known[pod_id] = {"at": now, "rate": rate, "usd": last["usd"] + paid}
            for pod_id in set(known) - set(seen):
                known[pod_id]["rate"] = 0.0

        self._record.change(edit)

    def count_on(self) -> None:
        """Adds what the pods that were there at the last look cost since, where nobody can look."""
        now = self._clock()

        def edit(known: Pods) -> None:
            for entry in known.values():
                paid = entry["rate"] * max(0.0, now - entry["at"]) / 3600
                entry.update(at=now if entry["rate"] else entry["at"], usd=entry["usd"] + paid)

        self._record.change(edit)

    def spent(self) -> float:
        """USD so far, over all pods that were ever seen; of a damaged record, what this process has seen."""
        try:
            pods = self._record.read()
        except Damaged:
            pods = self._record.known()
        return sum(pod["usd"] for pod in pods.values())

    def reserve(self, name: str, price: float) -> None:
        """Sets `price` (USD an hour) aside for the pod of that name.

        OverBudget where a cap forbids it, Damaged where a cap is set and what was spent can't be known.
        """
        with self._lock:
            now = self._clock()
            self._reserved = {other: kept for other, kept in self._reserved.items() if now - kept[1] < RESERVED_S}
            rate = sum(self._rates.values()) + sum(kept for kept, _ in self._reserved.values())
            spent, per_hour, total = self.spent(), self._limits.per_hour, self._limits.total
            if total is not None:
                self._record.read()
            if total is not None and spent >= total:
                raise OverBudget(f"cost cap reached: ${spent:.2f} spent of max_cost_total ${total:.2f}")
            if per_hour is not None and rate + price > per_hour:
                raise OverBudget(
                    f"cost cap reached: ${rate:.2f}/h now and ${price:.2f}/h more would exceed "
                    f"max_cost_per_hour ${per_hour:.2f}"
                )
            self._reserved[name] = (price, now)

    def release(self, name: str) -> None:
        """Gives back what was set aside for a pod that was not created."""
        with self._lock:
            self._reserved.pop(name, None)

    @property
    def is_exhausted(self) -> bool:
        return self._limits.total is not None and self.spent() >= self._limits.total


def _created(pod: dict[str, Any], now: float) -> float:
    try:
        text = str(pod["createdAt"]).replace("Z", "+00:00")
        return min(now, datetime.datetime.fromisoformat(text).timestamp())
    except (KeyError, ValueError):
        return now
