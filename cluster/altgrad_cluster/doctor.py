"""`altgrad cluster doctor`: everything that can be known to be wrong, with the head asked where there is one."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from altgrad_cluster import bootstrap, checks, keys
from altgrad_cluster.api import Api, Pod
from altgrad_cluster.checks import import_problems
from altgrad_cluster.errors import ClusterError
from altgrad_cluster.naming import KIND, PodName, fixed_tags
from altgrad_cluster.reasons import one_line
from altgrad_cluster.registry import cluster_folder

OnHead = Callable[[str], tuple[int, str]]


def diagnose(config: dict[str, Any], api: Api, on_head: OnHead | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each check with what it found; no lines mean all is well. `on_head` runs a command there."""
    import ray

    yield "the file", list(checks.file_problems(config))
    module = str((config.get("provider") or {}).get("module", ""))
    yield (
        "the provider can be imported from what is shipped",
        list(import_problems(module, bootstrap.checkout() / "cluster")),
    )
    yield "Ray's token", _token()
    try:
        keys.api_key()
        pods = api.pods()
    except ClusterError as error:
        yield "the API key", [one_line(error)]
        return
    yield "the API key", []
    try:
        yield "GPUs, data centres and the volume", list(checks.account_problems(config, api))
    except (ClusterError, KeyError, TypeError) as error:
        yield "GPUs, data centres and the volume", [f"could not be checked: {error}"]
    try:
        yield "the caps on what it costs", list(checks.cap_problems(config, api))
    except (ClusterError, KeyError, TypeError) as error:
        yield "the caps on what it costs", [f"could not be checked: {error}"]
    head = find_head(config["cluster_name"], pods)
    if head is None:
        yield "the head", ["not up: what is installed there can't be checked yet"] if on_head is not None else []
        return
    ask = on_head or over_ssh(config["cluster_name"], head)
    code, said = ask(f"python3 -m altgrad_cluster.node_check head {ray.__version__}")
    lines = [line.removeprefix("altgrad: ") for line in said.splitlines() if line.startswith("altgrad: ")]
    if code and not lines:
        lines = [f"the check failed: {said.strip()[-300:]}"]
    yield "the head: imports, Ray's version, secrets", lines


def find_head(cluster: str, pods: list[Pod]) -> Pod | None:
    """The running head of that cluster."""
    for pod in pods:
        name = PodName.parse(pod.get("name", ""))
        is_head = name is not None and name.cluster == cluster and fixed_tags(pod).get(KIND) == "head"
        if is_head and pod["status"] == "RUNNING":
            return pod
    return None


def over_ssh(cluster: str, pod: Pod) -> OnHead:
    """Runs commands on a pod with the cluster's own key, in a shell like Ray's.

    Interactive, for Ubuntu's .bashrc returns early in any other, and without what it prints (RunPod's shows a banner).
    """

    def run(command: str) -> tuple[int, str]:
        direct = (pod.get("ssh") or {}).get("direct")
        if direct is None:
            return 255, "RunPod states no SSH port for the head yet"
        done = subprocess.run(
            [
                "ssh",
                "-i",
                str(cluster_folder(cluster) / "id_ed25519"),
                "-p",
                str(direct["port"]),
                "-o",
                "BatchMode=yes",
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "LogLevel=ERROR",
                "-o",
                "ConnectTimeout=10",
                f"root@{direct['host']}",
                shell(command),
            ],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def shell(command: str) -> str:
    """The command line that runs `command` with what .bashrc sets, and prints what the command prints."""
    script = f"source ~/.bashrc >/dev/null 2>&1; . ~/altgrad/cluster/env.sh; ( {command} ) 2>&1"
    # bash says on its stderr that there is no terminal.
    return f"{shlex.join(['bash', '--noprofile', '--norc', '-i', '-c', script])} 2>/dev/null"


def notes(config: dict[str, Any]) -> Iterator[str]:
    """What is no trouble and worth knowing."""
    for name, node in (config.get("available_node_types") or {}).items():
        try:
            found = checks.node_config(name, node)
        except ClusterError:
            continue
        if not found.is_pinned:
            yield (
                f"available_node_types.{name}.node_config.image: {found.image} is named by its tag, which can be "
                "moved; name@sha256:… can't"
            )


def _token() -> list[str]:
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return []
    return ["RAY_AUTH_MODE: is not 'token' in this shell: `ray job submit` would be refused; export it"]
