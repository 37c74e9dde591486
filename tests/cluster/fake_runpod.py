"""A simulated RunPod: the part of its REST API v2 that the provider uses, with the ways in which it fails.

What a pod is, is left to a backend: nothing at all for tests of the provider, a network namespace with sshd for whole
clusters. Faults are attributes that a test sets. Every exchange is recorded, and judged by RunPod's own OpenAPI
document where that is at hand.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import secrets
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from contract import Contract, document
from runpod_catalogue import DATA_CENTERS, PRICES, STATUS_ACTIONS


class Backend(Protocol):
    """What makes a pod real."""

    def start(self, pod: dict[str, Any]) -> dict[str, Any]:
        """Boots it; returns `{"host", "port", "ip"}`: where its sshd is, and its private address."""

    def stop(self, pod_id: str) -> None:
        """Ends everything in it."""

    def is_alive(self, pod_id: str) -> bool: ...


class NoBackend:
    """Pods that are nothing but entries."""

    def __init__(self) -> None:
        self._counter = 0
        self._lock = threading.Lock()

    def start(self, pod: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._counter += 1
            high, low = divmod(self._counter, 250)
            return {"host": "127.0.0.1", "port": 20000 + self._counter, "ip": f"10.0.{high}.{low + 1}"}

    def stop(self, pod_id: str) -> None:
        pass

    def is_alive(self, pod_id: str) -> bool:
        return True


@dataclass
class Faults:
    """What goes wrong, until the test puts it right."""

    no_capacity: set[str] = field(default_factory=set)
    """GPU ids, or `gpu@data center`"""
    forbidden: set[str] = field(default_factory=set)
    no_balance: bool = False
    lost_answers: int = 0
    """so many POSTs create their pod and answer 500"""
    hidden_for: float = 0.0
    """seconds for which a pod whose answer was lost is missing from listings"""
    statuses: list[int] = field(default_factory=list)
    """answers to the next requests of any kind"""
    rate_limited_until: float = 0.0
    retry_after: int = 1
    withholds_env: bool = False
    page_size: int | None = None
    price_factor: float = 1.0
    undeletable: dict[str, int] = field(default_factory=dict)
    """answers to DELETE, by pod id"""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class FakeRunPod:
    """The account: its pods, volumes and key. Start it with `serving`."""

    def __init__(self, backend: Backend | None = None, *, key: str | None = None, boot_s: float = 0.0) -> None:
        self.backend = backend or NoBackend()
        self.key = key or f"rpa_{secrets.token_hex(20)}"
        self.boot_s = boot_s
        self.faults = Faults()
        self.pods: dict[str, dict[str, Any]] = {}
        self.volumes = [
            {"id": "vol0altgrad", "name": "altgrad", "size": 50, "dataCenter": "EU-RO-1", "type": "STANDARD"}
        ]
        self.requests: list[tuple[float, str, str, int]] = []
        self.bodies: list[dict[str, Any]] = []
        self.violations: list[str] = []
        self.most_pods = 0
        self.url = ""
        self._hidden: dict[str, float] = {}
        self._pod_keys: dict[str, str] = {}
        self._lock = threading.RLock()
        path = document()
        self._contract = Contract(path) if path else None

    @contextlib.contextmanager
    def serving(self, host: str = "127.0.0.1") -> Iterator[FakeRunPod]:
        server = Server((host, 0), _handler(self))
        self.url = f"http://{host}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            for pod_id in list(self.pods):
                self._remove(pod_id)

    # What tests ask and do

    def count(self, method: str, path: str = "") -> int:
        """How many requests of this kind came."""
        return sum(1 for _, verb, where, _ in self.requests if verb == method and where.startswith(path or where))

    def endings(self) -> Counter[str]:
        return Counter(f"{method} {status}" for _, method, _, status in self.requests)

    def of_kind(self, kind: str) -> list[str]:
        """Ids of the live pods of a kind, head or worker, by their names."""
        with self._lock:
            return [
                pod_id
                for pod_id, pod in self.pods.items()
                if f"--{kind}--" in pod["name"] and pod["status"] in ("PROVISIONING", "STARTING", "RUNNING")
            ]

    def interrupt(self, pod_id: str) -> None:
        """The pod's machine takes it away: EXITED, as RunPod does it."""
        self.backend.stop(pod_id)
        with self._lock:
            self.pods[pod_id]["status"] = "EXITED"

    def vanish(self, pod_id: str) -> None:
        """The pod is gone without a trace."""
        self._remove(pod_id)

    def add_pod(self, name: str, **changes: Any) -> str:
        """A pod that somebody else made."""
        return self._add({"name": name, "image": "x", "gpu": {"id": "NVIDIA L4"}} | changes)["id"]

    # The API

    def answer(self, method: str, target: str, key: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        parts = urllib.parse.urlsplit(target)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(parts.query).items()}
        status, answer, headers = self._answer(method, parts.path, query, key, body)
        with self._lock:
            self.requests.append((time.monotonic(), method, parts.path, status))
            if method == "POST" and isinstance(body, dict):
                self.bodies.append(body)
            if self._contract:
                known = {name: value for name, value in query.items() if name != "page"}
                self.violations += self._contract.violations(method, parts.path, known, body, status, answer)
        return status, answer, headers

    def _answer(
        self, method: str, path: str, query: dict[str, str], key: str, body: Any
    ) -> tuple[int, Any, dict[str, str]]:
        own_pod = self._pod_keys.get(key)
        if key != self.key and own_pod is None:
            return *_problem(401, "Unauthorized", "invalid bearer token"), {}
        if own_pod is not None and not path.startswith(f"/v2/pods/{own_pod}"):
            return *_problem(403, "Forbidden", "this key is for one pod only"), {}
        with self._lock:
            if time.monotonic() < self.faults.rate_limited_until:
                return *_problem(429, "Too Many Requests", "60 requests a minute"), {
                    "Retry-After": str(self.faults.retry_after)
                }
            if self.faults.statuses:
                return *_problem(self.faults.statuses.pop(0), "Upstream", "planted"), {}
        steps = path.strip("/").split("/")[1:]
        if method == "GET":
            return self._read(steps, query)
        if method == "POST" and steps == ["pods"]:
            return *self._create(body), {}
        if method == "DELETE" and steps[1] in self.faults.undeletable:
            return *_problem(self.faults.undeletable[steps[1]], "Upstream", "planted"), {}
        if method == "DELETE" and steps[0] == "pods":
            if steps[1] not in self.pods:
                return *_problem(404, "Not Found", f"pod {steps[1]} not found"), {}
            self._remove(steps[1])
            return 204, None, {}
        return *_problem(404, "Not Found", path), {}

    def _read(self, steps: list[str], query: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        if steps == ["pods"]:
            with self._lock:
                shown = [
                    self._shown(pod)
                    for pod_id, pod in self.pods.items()
                    if self._hidden.get(pod_id, 0.0) < time.monotonic()
                ]
            size = self.faults.page_size
            if size is None:
                return 200, {"pods": shown}, {}
            page = int(query.get("page", 0))
            more = {"Link": f'</v2/pods?page={page + 1}>; rel="next"'} if len(shown) > (page + 1) * size else {}
            return 200, {"pods": shown[page * size : (page + 1) * size]}, more
        if steps[0] == "pods" and steps[1] in self.pods:
            with self._lock:
                return 200, self._shown(self.pods[steps[1]]), {}
        if steps == ["catalog", "gpus"]:
            return 200, {"gpus": [_gpu(name, price) for name, price in PRICES.items()]}, {}
        if steps == ["catalog", "datacenters"]:
            return (
                200,
                {
                    "dataCenters": [
                        {
                            "id": name,
                            "name": name,
                            "region": "EUROPE" if name.startswith("EU") else "NORTH_AMERICA",
                            "networkVolumeTypes": ["STANDARD"],
                            "compliance": [],
                            "globalNetwork": networked,
                        }
                        for name, networked in DATA_CENTERS.items()
                    ]
                },
                {},
            )
        if steps == ["network-volumes"]:
            return 200, {"networkVolumes": self.volumes}, {}
        return *_problem(404, "Not Found", "/".join(steps)), {}

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self._contract:
            wrong = self._contract.violations("POST", "/v2/pods", {}, body, 500, _problem(500, "x", "x")[1])
            if wrong:
                return _problem(422, "Unprocessable", "; ".join(wrong))
        gpu, places = body["gpu"]["id"], body.get("dataCenterIds") or list(DATA_CENTERS)
        volume = (body.get("mounts") or {}).get("network")
        with self._lock:
            if self.faults.no_balance:
                return _problem(402, "Payment Required", "your balance is too low")
            if gpu in self.faults.forbidden:
                return _problem(403, "Forbidden", f"no access to the pool of {gpu}")
            homes = {one["id"]: one["dataCenter"] for one in self.volumes}
            if volume and homes[volume[0]["volumeId"]] not in places:
                return _problem(400, "Bad Request", f"the volume lies in {homes[volume[0]['volumeId']]}")
            free = [place for place in places if not {gpu, f"{gpu}@{place}"} & self.faults.no_capacity]
            if not free:
                return _problem(
                    400, "Bad Request", "There are no longer any instances available with the requested specifications."
                )
            pod = self._add(body | {"dataCenterIds": free})
            if self.faults.lost_answers:
                self.faults.lost_answers -= 1
                self._hidden[pod["id"]] = time.monotonic() + self.faults.hidden_for
                return _problem(500, "Internal Server Error", "upstream timed out")
            return 201, self._shown(pod)

    def _add(self, body: dict[str, Any]) -> dict[str, Any]:
        pod_id, now = secrets.token_hex(7), datetime.datetime.now(datetime.UTC)
        gpu = {"id": body["gpu"]["id"], "count": body["gpu"].get("count", 1)}
        key = f"podkey_{secrets.token_hex(12)}"
        pod = {
            "id": pod_id,
            "name": body["name"],
            "status": body.get("status", "PROVISIONING"),
            "image": body["image"],
            "args": body.get("args", ""),
            "disk": body.get("disk", 20),
            "ports": body.get("ports", []),
            "env": body.get("env", {}),
            "registry": None,
            "mounts": body.get("mounts", {}),
            "gpu": gpu,
            "cloud": body.get("cloud", "SECURE"),
            "dataCenterId": (body.get("dataCenterIds") or ["EU-RO-1"])[0],
            "cudaVersion": "12.8",
            "ssh": {"proxy": None, "direct": None},
            "template": None,
            "cost": PRICES[gpu["id"]] * gpu["count"] * self.faults.price_factor,
            "locked": False,
            "runtime": None,
            "createdAt": now.isoformat().replace("+00:00", "Z"),
            "startedAt": None,
            "globalNetworking": {"enabled": bool(body.get("globalNetworking"))},
        }
        with self._lock:
            self.pods[pod_id] = pod
            self._pod_keys[key] = pod_id
            self.most_pods = max(self.most_pods, len(self.pods))
        if pod["status"] == "PROVISIONING":
            threading.Thread(target=self._boot, args=(pod, key), daemon=True).start()
        return pod

    def _boot(self, pod: dict[str, Any], key: str) -> None:
        """As RunPod does it: an address is known before the container runs, the port to 22 after."""
        time.sleep(self.boot_s)
        own = {"RUNPOD_POD_ID": pod["id"], "RUNPOD_API_KEY": key, "RUNPOD_DC_ID": pod["dataCenterId"]}
        place = self.backend.start(pod | {"env": {**pod["env"], **own}})
        with self._lock:
            if pod["id"] not in self.pods:
                self.backend.stop(pod["id"])
                return
            if pod["status"] != "PROVISIONING":
                return
            pod["status"] = "RUNNING"
            pod["startedAt"] = pod["createdAt"]
            pod["runtime"] = {"uptime": 1, "ports": []}
            if pod["globalNetworking"]["enabled"]:
                pod["globalNetworking"] = {
                    "enabled": True,
                    "ip": place["ip"],
                    "internalDns": f"{pod['id']}.runpod.internal",
                }
            if "22/tcp" in pod["ports"]:
                pod["ssh"]["direct"] = {
                    "host": place["host"],
                    "port": place["port"],
                    "username": "root",
                    "command": f"ssh root@{place['host']} -p {place['port']}",
                }

    def _shown(self, pod: dict[str, Any]) -> dict[str, Any]:
        if pod["status"] == "RUNNING" and not self.backend.is_alive(pod["id"]):
            pod["status"] = "EXITED"
        stopped = {"cost": 0.0, "runtime": None} if pod["status"] == "EXITED" else {}
        env = dict.fromkeys(pod["env"], "") if self.faults.withholds_env else pod["env"]
        return json.loads(json.dumps(pod | stopped | {"env": env, "actions": STATUS_ACTIONS.get(pod["status"], [])}))

    def _remove(self, pod_id: str) -> None:
        with self._lock:
            self.pods.pop(pod_id, None)
        self.backend.stop(pod_id)


def _problem(status: int, title: str, detail: str) -> tuple[int, dict[str, Any]]:
    return status, {"title": title, "status": status, "detail": detail}


def _gpu(name: str, price: float) -> dict[str, Any]:
    return {
        "id": name,
        "name": name.removeprefix("NVIDIA "),
        "pool": None,
        "manufacturer": "NVIDIA",
        "memory": 24,
        "secure": True,
        "community": False,
        "price": {"secure": price, "community": price},
        "maxCount": {"secure": 8, "community": 0},
        "availability": "HIGH",
        "dataCenters": [],
    }


def _handler(fake: FakeRunPod) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer, headers = fake.answer(self.command, self.path, key, body)
            text = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            kind = "application/problem+json" if status >= 400 else "application/json"
            for name, value in {"Content-Type": kind, "Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


def until(condition: Callable[[], Any], seconds: float, what: str, step: float = 0.2) -> Any:
    """The condition's value once it is true; fails after a while, saying what never came."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(step)
    return found
