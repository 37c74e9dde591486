"""Creating one pod: candidates in turn, money first, and never two pods for one request.

A creation whose answer got lost is the dangerous case: the pod may exist, may come into existence in a moment, or may
not. Its name is kept as a doubt. The pod is looked for by that name before anything else is created for the same node
type, and while the doubt is fresh nothing is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from altgrad_cluster.api import Api, Pod
from altgrad_cluster.candidates import Availability, Candidate
from altgrad_cluster.errors import ApiError, ClusterError
from altgrad_cluster.naming import GPU_COUNT_VARIABLE, TAGS_VARIABLE, PodName, fixed_tags
from altgrad_cluster.registry import LockedFile
from altgrad_cluster.settings import NodeConfig, Settings
from altgrad_cluster.spending import OverBudget, Purse
from altgrad_cluster.start_command import start_command

logger = logging.getLogger(__name__)
DOUBT_S = 30.0
"""How long a pod may take to show up whose creation was not confirmed."""
LOOKS = (0.5, 1.0, 2.0, 4.0)
PRICES_S = 600.0


class NoPod(ClusterError):
    """No pod was created; the text says why, for every candidate."""


class Launcher:
    """Creates pods for one cluster; safe to use from several threads.

    `doubts` and `refusals` keep, for other processes, what was never confirmed and why nothing starts. `pods` lists the
    cluster's pods afresh and lets the purse observe them.
    """

    def __init__(
        self,
        api: Api,
        settings: Settings,
        purse: Purse,
        doubts: LockedFile,
        refusals: LockedFile,
        *,
        pods: Callable[[], list[Pod]],
        availability: Availability | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api = api
        self._settings = settings
        self._purse = purse
        self._doubts = doubts
        self._own_doubts: dict[str, float] = {}
        """The same as far as this process made them, for a full disk"""
        self._refusals = refusals
        self._pods = pods
        self._availability = availability or Availability(settings.cooldown_s)
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._prices: tuple[float, dict[str, float]] = (float("-inf"), {})
        self._taken: set[str] = set()

    def launch(self, config: NodeConfig, name: PodName, tags: Mapping[str, str]) -> Pod:
        """The new pod, or one that an earlier, unconfirmed request made. NoPod where none could be had."""
        try:
            pod = self._launch(config, name, tags)
        except ClusterError as error:
            said = " ".join(str(error).split())
            with contextlib.suppress(OSError):
                refusal = {name.node_type: {"at": self._clock(), "why": said}}
                self._refusals.change(lambda content: content.update(refusal))
            raise
        with contextlib.suppress(OSError):
            self._refusals.change(lambda content: content.pop(name.node_type, None))
        return pod

    def avoid(self, pod: Pod, reason: str) -> None:
        """Leaves this pod's GPU in this pod's data centre alone for a while."""
        place = pod.get("dataCenterId")
        gpu = str((pod.get("gpu") or {}).get("id"))
        for candidate in (Candidate(gpu, place), Candidate(gpu, None)):
            self._availability.avoid(candidate, reason)

    def _launch(self, config: NodeConfig, name: PodName, tags: Mapping[str, str]) -> Pod:
        lost = self._found_again(name)
        if lost is not None:
            return lost
        paused = self._availability.paused()
        if paused is not None:
            raise NoPod(paused)
        self._pods()
        reasons, dear = [], []
        for candidate in config.candidates(self._settings.volume):
            reason = self._availability.blocked(candidate)
            if reason is None:
                try:
                    pod = self._create(config, name, tags, candidate)
                except OverBudget as error:
                    # Another GPU may be cheap enough.
                    dear.append((self._price(candidate.gpu), f"{candidate}: {error}"))
                    continue
                except ApiError as error:
                    goes_on = self._availability.refused(candidate, error)
                    reason = f"{candidate}: {error.detail}" if goes_on else str(error)
                    logger.warning("no pod: %s", reason)
                    if not goes_on:
                        raise NoPod(self._availability.paused() or reason) from None
                else:
                    self._availability.succeeded(candidate)
                    logger.info("created pod %s (%s, $%s/h)", pod["id"], candidate, pod.get("cost"))
                    return pod
            reasons.append(reason)
        if dear:
            # What the cheapest would have cost says all about the others.
            reasons.insert(0, min(dear)[1])
        text = _summary(reasons)
        logger.warning("no pod of type %s: %s", name.node_type, text)
        raise NoPod(text)

    def _create(self, config: NodeConfig, name: PodName, tags: Mapping[str, str], candidate: Candidate) -> Pod:
        price = self._price(candidate.gpu) * config.gpu_count
        self._purse.reserve(str(name), price)
        try:
            return self._api.create_pod(self._body(config, name, tags, candidate))
        except ApiError as error:
            if error.is_transient:
                self._own_doubts[str(name)] = self._clock()
                with contextlib.suppress(OSError):
                    self._doubts.change(lambda doubts: doubts.update({str(name): self._clock()}))
                pod = self._look_for(str(name), LOOKS)
                if pod is not None:
                    return pod
            self._purse.release(str(name))
            raise

    def _body(self, config: NodeConfig, name: PodName, tags: Mapping[str, str], candidate: Candidate) -> dict[str, Any]:
        body: dict[str, Any] = {
            "name": str(name),
            "image": config.image,
            "disk": config.disk,
            "cloud": "SECURE",
            "ports": ["22/tcp"],
            "args": self._start_command(name.kind),
            "gpu": {"id": candidate.gpu, "count": config.gpu_count},
            "globalNetworking": True,
            "startSsh": True,
            "env": {
                **(config.env or {}),
                "PUBLIC_KEY": self._settings.public_key,
                GPU_COUNT_VARIABLE: str(config.gpu_count),
                TAGS_VARIABLE: json.dumps(dict(tags), sort_keys=True),
            },
        }
        if config.min_cuda is not None:
            body["gpu"]["minCudaVersion"] = config.min_cuda
        if candidate.data_center is not None:
            body["dataCenterIds"] = [candidate.data_center]
        volume = self._settings.volume
        if volume is not None:
            body["mounts"] = {"network": [{"volumeId": volume.id, "path": volume.path}]}
        return body

    def _start_command(self, kind: str) -> str:
        settings = self._settings
        lifetime = settings.max_worker_s if kind == "worker" else None
        return start_command(settings.api_base, settings.set_up_s, lifetime)

    def _price(self, gpu: str) -> float:
        """List price in USD per hour; a type that the catalogue lacks is a mistake of the file."""
        with self._lock:
            when, prices = self._prices
        if self._clock() - when > PRICES_S:
            prices = {entry["id"]: float(entry["price"]["secure"]) for entry in self._api.gpus()}
            with self._lock:
                self._prices = (self._clock(), prices)
        if gpu not in prices:
            raise ApiError("catalogue", 404, f"{gpu!r} is no GPU of RunPod")
        return prices[gpu]

    def _found_again(self, name: PodName) -> Pod | None:
        """A pod of the same kind whose creation was in doubt. NoPod while the doubt is fresh and it isn't there."""
        alike = list(self._doubtful(name))
        if not alike:
            return None
        for doubt, since in alike:
            pod = self._look_for(doubt, (0.0,))
            if pod is not None:
                logger.info("pod %s was created although its answer was lost", pod["id"])
                return pod
            if self._clock() - since < DOUBT_S:
                raise NoPod(
                    f"the answer to a creation was lost; waiting {DOUBT_S - (self._clock() - since):.0f} s for "
                    "the pod to show up before asking for another"
                )
            self._forget(doubt)
        return None

    def _doubtful(self, name: PodName) -> Iterator[tuple[str, float]]:
        for text, since in (self._doubts.read() | self._own_doubts).items():
            other = PodName.parse(text)
            if other is not None and (other.kind, other.node_type) == (name.kind, name.node_type):
                yield text, since

    def _forget(self, doubt: str) -> float | None:
        """Whether this caller is the one who forgets it."""
        own = self._own_doubts.pop(doubt, None)
        try:
            written: float | None = self._doubts.change(lambda doubts: doubts.pop(doubt, None))
        except OSError:
            return own
        return own if written is None else written

    def _look_for(self, name: str, waits: tuple[float, ...]) -> Pod | None:
        """The pod of that name, taken by one caller only."""
        for wait in waits:
            self._sleep(wait)
            try:
                found = next((pod for pod in self._pods() if pod["name"] == name), None)
            except ApiError:
                continue
            if found is not None:
                return found if self._forget(name) is not None else None
        return None


def describe(pod: Pod) -> dict[str, str]:
    """A pod in words, for Ray's own records."""
    gpu = pod.get("gpu") or {}
    return {
        "id": pod["id"],
        "gpu": str(gpu.get("id", "")),
        "data_center": str(pod.get("dataCenterId") or ""),
        "cost": str(pod.get("cost", "")),
        "kind": fixed_tags(pod).get("ray-node-type", ""),
    }


def _summary(reasons: list[str]) -> str:
    """The reasons, those that say the same for many candidates said once."""
    seen: dict[str, None] = dict.fromkeys(reasons)
    text = "; ".join(list(seen)[:6])
    return text + (f"; and {len(seen) - 6} candidates more" if len(seen) > 6 else "")
