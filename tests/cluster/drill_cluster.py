"""The cluster that the drills share, and how they look into its pods."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from altgrad_cluster.doctor import shell
from fake_runpod import FakeRunPod, until
from laptop import Laptop
from pod_namespaces import Namespaces, run


class Cluster:
    """The account, the laptop and the file of one cluster that is up."""

    def __init__(self, folder: Path, pods: Namespaces, account: FakeRunPod) -> None:
        self.pods, self.account, self.folder = pods, account, folder
        self.laptop = Laptop(folder / "laptop", account)
        secrets = self.laptop.home / ".altgrad/secrets.env"
        secrets.parent.mkdir()
        secrets.touch(mode=0o600)
        secrets.write_text("# for sweeps\nDEMO_API_KEY=demo_secret\nHF_TOKEN=hf_secret\n")
        self.started, self.set_up_minutes = time.monotonic(), 1.5
        self.file = self.laptop.file(
            cluster_name="drill",
            idle_timeout_minutes=0.7,
            orphan_minutes=0.6,
            set_up_minutes=self.set_up_minutes,
            worker_secrets=["HF_TOKEN"],
        )
        self.out = pods.folder / "volume" / "runs" / "drill"

    @property
    def workers(self) -> list[str]:
        return self.account.of_kind("worker")

    @property
    def head(self) -> str:
        (found,) = self.account.of_kind("head")
        return found

    def status(self) -> str:
        return self.laptop.on_head(self.file, "ray status -v")


@contextlib.contextmanager
def full_disk(place: Path) -> Iterator[None]:
    """A file system without room is mounted there."""
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place))
    try:
        (place / "filling").write_bytes(bytes(4096))
        yield
    finally:
        run("umount", "-l", str(place))


def want_two_workers(cluster: Cluster) -> set[str]:
    """Two GPUs are asked for, until the head is told otherwise or restarted; the workers' ids."""
    ask = (
        "import ray; from ray.autoscaler.sdk import request_resources as ask; ray.init(); "
        "ask(bundles=[{'GPU': 1}, {'GPU': 1}])"
    )
    cluster.laptop.on_head(cluster.file, f'python3 -c "{ask}"')
    until(lambda: len(cluster.workers) == 2, 120, "two workers")
    return set(cluster.workers)


def half_way(out: Path) -> str | None:
    """A trial that has a checkpoint and some steps, and has not ended."""
    for rows in out.glob("trials/*/metrics.jsonl"):
        is_open = (rows.parent / "checkpoint").exists() and not (rows.parent / "outcome.json").exists()
        if is_open and rows.read_text().count("\n") >= 30:
            return rows.parent.name
    return None


def private(cluster: Cluster, pod_id: str) -> str:
    return str(cluster.account.pods[pod_id]["globalNetworking"]["ip"])


def in_pod(cluster: Cluster, pod_id: str, *words: str) -> str:
    """Output of a command in the pod, run by its own login."""
    direct = cluster.account.pods[pod_id]["ssh"]["direct"]
    key = cluster.laptop.home / ".altgrad/clusters/drill/id_ed25519"
    options = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR"}
    done = subprocess.run(
        ["ssh", "-i", str(key), "-p", str(direct["port"])]
        + [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        + [f"root@{direct['host']}", shell(shlex.join(words))],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


def trains(cluster: Cluster, pod_id: str, trial: str) -> bool:
    """Whether a process of the pod has a file of this trial's folder open."""
    found = subprocess.run(["ip", "netns", "pids", cluster.pods.namespace(pod_id)], capture_output=True, text=True)
    for pid in found.stdout.split():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if trial in str(link.readlink()):
                    return True
    return False


ASK_CONTROL = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, 5)
print('LET IN')
"""
ASK_RAYLETS = """
import json, sys, grpc, ray
ray.init(log_to_driver=False)
def code(node, token):
    with grpc.insecure_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        call = channel.unary_unary('/ray.rpc.NodeManagerService/GetNodeStats')
        try:
            call(b'', metadata=[('authorization', f'Bearer {token}')] if token else [], timeout=10)
        except grpc.RpcError as error:
            return error.code().name
    return 'OK'
tokens = json.loads(sys.argv[1])
print(json.dumps({node['NodeManagerAddress']: {name: code(node, token) for name, token in tokens.items()}
                  for node in ray.nodes() if node['Alive']}))
"""
STRANGER = """
import json, socket, sys, urllib.request
address, found = sys.argv[1], []
for port in range(1, 65536):
    with socket.socket() as one:
        one.settimeout(2)
        if one.connect_ex((address, port)):
            continue
    try:
        found.append(urllib.request.urlopen(f"http://{address}:{port}/api/jobs/", timeout=3).read(40).decode())
    except Exception:
        pass
print(json.dumps(found))
"""
"""Asks every port for jobs, without a token, and keeps how the answers begin."""


def answers_to_strangers(cluster: Cluster, pod_id: str, address: str) -> list[str]:
    """As seen from another pod of the account."""
    (cluster.pods.root(pod_id) / "tmp/stranger.py").write_text(STRANGER)
    return list(one_json(in_pod(cluster, pod_id, "python3", "/tmp/stranger.py", address)))


def open_ports(address: str) -> list[int]:
    """Every TCP port of the address that accepts a connection from here."""

    def accepts(port: int) -> bool:
        with socket.socket() as one:
            one.settimeout(5)
            return one.connect_ex((address, port)) == 0

    def accepting(ports: range) -> list[int]:
        return [port for port in ports if accepts(port)]

    # A thread for many ports: handing over one at a time costs more than asking it.
    parts = [range(first, min(first + 1024, 65536)) for first in range(1, 65536, 1024)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return [port for found in pool.map(accepting, parts) for port in found]


def one_json(said: str) -> Any:
    """The one line of an output that is JSON."""
    return json.loads(next(line for line in said.splitlines() if line[:1] in "{[" and line[-1:] in "}]"))


def bytes_of(path: Path) -> bytes:
    """Nothing where the process has ended meanwhile."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
