"""A cluster before a sweep: whether this driver may join it, and whether the sweep can run there.

What would otherwise end as a traceback, or as trials that are PENDING for ever, is one line before anything is touched.
Versions and tokens Ray compares itself, when it connects; here its words become that line. A cluster that grows may
have no room yet: that is only a note. Nodes that come later are not seen.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.options import RunOptions

REACH_SECONDS = 5
STATE_SECONDS = 10
NODE_SECONDS = 60.0
NOT_SHARED = (
    "--out: {out} is not on shared storage: node {address} does not see {folder}; with {count} nodes a folder that all "
    "of them share is expected"
)
TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


def refusal(error: BaseException) -> str | None:
    """Why a cluster at a port that answers did not take this driver, where Ray's error tells; None for any other."""
    if isinstance(error, AuthenticationError | ConnectionError):
        return f"what listens there refuses this driver; {_same_mode()}"
    if "Version mismatch" in str(error):
        found = re.findall(r"(Ray|Python): (\S+)", str(error))
        theirs, ours = (" and ".join(" ".join(pair) for pair in pairs) for pairs in (found[:2], found[2:4]))
        return f"the cluster has {theirs}, this driver {ours}; equal versions are expected"
    return None


def knock(address: str) -> None:
    """Whether a gRPC server, as Ray's head is one, answers there: Ray itself would knock for minutes.

    ConnectionError where none does, SpecError where RAY_ADDRESS named it.
    """
    name = "--address"
    if address == "auto":
        name, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "")
        if address in ("", "auto"):
            return
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.\-\[\]:]+", host) or not re.fullmatch(r"[0-9]{1,5}", port):
        raise SpecError(f"{name}: {address!r} is not allowed: the HOST:PORT of a Ray cluster's head is expected")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
        _check_grpc(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if name == "--address":
            raise ConnectionError(str(error)) from None
        raise SpecError(f"{name}: {address!r}: no Ray cluster answers ({error})") from None


def _check_grpc(address: str) -> None:
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    import grpc

    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=REACH_SECONDS)
        except grpc.FutureTimeoutError:
            raise OSError("what listens there does not speak Ray's protocol") from None


def check_cluster(options: RunOptions, worker: Mapping[str, float]) -> Iterator[str]:
    """Notes on the connected cluster; SpecError, naming the flag, where the sweep can't run there.

    `worker`: what each of a trial's workers asks for.
    """
    _check_task(options.address)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if options.chosen_executor == "train":
        _check_state_api()
    if len(nodes) > 1:
        check_storage(options.out, nodes)
    yield from lack_of_room(worker, options.workers_per_trial, nodes)


def _same_mode() -> str:
    return (
        f"here RAY_AUTH_MODE is {os.environ.get('RAY_AUTH_MODE')!r}; the head's mode and the head's token "
        f"({TOKEN_PLACES}) are expected"
    )


def _check_task(address: str) -> None:
    """A cluster that takes the driver may still be unable to start a worker for it."""

    def answer() -> bool:
        return True

    try:
        ray.get(ray.remote(answer).options(num_cpus=0, max_retries=0).remote(), timeout=NODE_SECONDS)
    except GetTimeoutError:
        return
    except RayError as error:
        reason = " ".join(str(error).split())[:120]
        raise SpecError(
            f"--address: {address!r}: the cluster can't run even an empty task of this driver ({reason})"
        ) from None


def _check_state_api() -> None:
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    try:
        with asking_own_cluster():
            list_placement_groups(limit=1, timeout=STATE_SECONDS)
    except (RayStateApiException, RuntimeError, OSError) as error:  # no address of a dashboard, or none that answers
        reason = " ".join(str(error).split())[:120]
        raise SpecError(
            "--executor: 'train' needs the cluster's State API, which frees the workers of stopped trials; "
            f"the head's dashboard does not answer ({reason}); start the head with "
            "--include-dashboard=true, or take --executor actor"
        ) from None


@contextlib.contextmanager
def asking_own_cluster() -> Iterator[None]:
    """Lets Ray's State API ask the cluster that this process has joined.

    By itself it looks for one, and these variables, which may name another, win over its own argument.
    """
    before = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def check_storage(out: Path, nodes: list[dict[str, Any]]) -> None:
    """SpecError where a node does not see what is written beside `out`."""
    standing = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    with tempfile.NamedTemporaryFile(prefix=".altgrad-", dir=standing) as marker:
        asked = {seen_from(marker.name, node): node["NodeManagerAddress"] for node in nodes}
        for answer, address in asked.items():
            try:
                is_seen = ray.get(answer, timeout=NODE_SECONDS)
            except GetTimeoutError:
                continue  # a busy node is no fault; a trial there that finds no folder says so itself
            if not is_seen:
                raise SpecError(NOT_SHARED.format(out=out, address=address, folder=standing, count=len(nodes)))


def seen_from(path: str, node: Mapping[str, Any]) -> Any:
    """Ray's future of whether the path exists on a node."""
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    # Pickled by name, it needs nothing of ours over there.
    return ray.remote(os.path.exists).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(path)


def lack_of_room(worker: Mapping[str, float], workers: int, nodes: list[dict[str, Any]]) -> Iterator[str]:
    """A note where the nodes, were they empty, would not hold the workers of one trial."""
    room = 0
    for node in nodes:
        room += int(min(node["Resources"].get(name, 0.0) // amount for name, amount in worker.items()))
    if room < workers:
        asked = " + ".join(f"{amount:g} {name}" for name, amount in worker.items())
        yield (
            f"a trial takes {workers} x ({asked}); the {len(nodes)} node(s) of the cluster hold {room} of them: "
            "the sweep waits until it has grown"
        )
