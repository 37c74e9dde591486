"""`altgrad cluster doctor | status | cost | gc`: the cluster and its money, seen from the laptop.

Exit code 0: all is well; 1: something was found (a trouble, a pod left over); 2: the request itself is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from altgrad_cluster import keys
from altgrad_cluster.api import Api, Pod
from altgrad_cluster.bootstrap import api_base
from altgrad_cluster.doctor import diagnose, find_head, notes, over_ssh
from altgrad_cluster.errors import ClusterError, nearest
from altgrad_cluster.naming import PodName
from altgrad_cluster.provider import LIVE
from altgrad_cluster.reasons import one_line
from altgrad_cluster.settings import Settings

DEFAULT = Path("cluster/runpod.yaml")


def main(argv: list[str]) -> int:
    """Runs one of the commands; returns the exit code."""
    known = {"doctor": _doctor, "status": _status, "cost": _cost, "gc": _gc}
    parser = argparse.ArgumentParser(prog="altgrad cluster", description=__doc__.splitlines()[0])
    parser.add_argument("command", help=" | ".join(known))
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT, help=f"the cluster's YAML; default {DEFAULT}")
    parser.add_argument("--yes", action="store_true", help="gc: delete what is left over of this cluster")
    parser.add_argument("--all", action="store_true", help="gc: and of others, by whoever started them")
    request = parser.parse_args(argv)
    try:
        if request.command not in known:
            raise ClusterError(
                f"{request.command!r} is not allowed: {', '.join(known)}{nearest(request.command, known)}"
            )
        config = read(request.file)
        # On a head the environment has the pod's own key, which can list nothing.
        key = keys.mounted_api_key if Path(keys.REMOTE_API_KEY).expanduser().exists() else keys.api_key
        api = Api(key, api_base(config.get("provider") or {}))
        return known[request.command](config, api, request)
    except ClusterError as error:
        print(f"altgrad: {one_line(error)}", file=sys.stderr)
        return 2


def read(path: Path) -> dict[str, Any]:
    """The YAML file. ClusterError where there is none, or none of ours."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ClusterError(f"{path}: can't be read ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or not isinstance(config.get("cluster_name"), str):
        raise ClusterError(f"{path}: is no cluster file: cluster_name is missing")
    return config


def _doctor(config: dict[str, Any], api: Api, request: argparse.Namespace) -> int:
    found = 0
    for check, lines in diagnose(config, api):
        print(f"{'trouble' if lines else 'ok     '}  {check}")
        for line in lines:
            print(f"         {line}")
        found += len(lines)
    for line in notes(config):
        print(f"note     {line}")
    return 1 if found else 0


def _status(config: dict[str, Any], api: Api, request: argparse.Namespace) -> int:
    pods = api.pods()
    ours = _named(config["cluster_name"], pods)
    print(f"{config['cluster_name']}: {len(ours)} pods, ${sum(float(pod['cost']) for pod in ours):.2f}/h")
    _print_pods(ours)
    for node_type, refusal in sorted(_from_head(config, pods, "refusals.json").items()):
        at = datetime.datetime.fromtimestamp(refusal["at"]).strftime("%H:%M:%S")
        print(f"no new pod of type {node_type} ({at}): {refusal['why']}")
    return 0


def _cost(config: dict[str, Any], api: Api, request: argparse.Namespace) -> int:
    pods = api.pods()
    ours, limits = _named(config["cluster_name"], pods), Settings.read(config["provider"]).limits
    rate = sum(float(pod["cost"]) for pod in ours)
    spent = {
        pod_id: float(entry["usd"])
        for pod_id, entry in (_from_head(config, pods, "spending.json").get("pods") or {}).items()
    }
    source = "recorded by the head" if spent else "of the pods that are up, from their ages"
    total = sum(spent.values()) if spent else sum(float(pod["cost"]) * _age(pod) / 3600 for pod in ours)
    print(f"now    ${rate:.2f}/h of max_cost_per_hour {_money(limits.per_hour)}")
    print(f"spent  ${total:.2f} of max_cost_total {_money(limits.total)} ({source})")
    if limits.total is not None and rate > 0:
        print(f"left   {max(0.0, limits.total - total) / rate:.1f} h at this rate")
    return 0


def _gc(config: dict[str, Any], api: Api, request: argparse.Namespace) -> int:
    pods = [(pod, name) for pod in api.pods() if (name := PodName.parse(pod.get("name", "")))]
    headed = {(name.cluster, name.key) for pod, name in pods if name.kind == "head" and pod["status"] in LIVE}
    left = [(pod, name) for pod, name in pods if (name.cluster, name.key) not in headed or pod["status"] not in LIVE]
    own = (config["cluster_name"], keys.own_fingerprint(config["cluster_name"]))
    mine = [pod for pod, name in left if request.all or (name.cluster, name.key) == own]
    others = [pod for pod, _ in left if pod not in mine]
    if not mine:
        print("nothing is left over")
    else:
        rate = sum(float(pod["cost"]) for pod in mine)
        print(f"{len(mine)} pods without a head, or stopped, ${rate:.2f}/h (and the disks of the stopped ones)")
        _print_pods(mine)
    if others:
        print("not yours: started under another cluster's name or from another machine; --all includes them")
        _print_pods(others)
    if mine and not request.yes:
        print("altgrad cluster gc --yes deletes them", file=sys.stderr)
        return 1
    return 1 if sum(not _is_deleted(pod["id"], api) for pod in mine) else 0


def _is_deleted(pod_id: str, api: Api) -> bool:
    try:
        api.delete_pod(pod_id)
    except ClusterError as error:
        print(f"altgrad: pod {pod_id} can't be deleted now: {one_line(error)}", file=sys.stderr)
        return False
    print(f"deleted {pod_id}")
    return True


def _named(cluster: str, pods: list[Pod]) -> list[Pod]:
    return [pod for pod in pods if (name := PodName.parse(pod.get("name", ""))) and name.cluster == cluster]


def _print_pods(pods: list[Pod]) -> None:
    for pod in pods:
        name = PodName.parse(pod["name"])
        assert name is not None, "only pods with names of ours come here"
        gpu = (pod.get("gpu") or {}).get("id", "-")
        print(
            f"  {pod['id']:16} {name.cluster:12} {name.kind:7} {pod['status']:13} {gpu:24} "
            f"{pod.get('dataCenterId') or '-':10} ${float(pod['cost']):.2f}/h  {_age(pod) / 3600:.1f} h"
        )


def _from_head(config: dict[str, Any], pods: list[Pod], file: str) -> dict[str, Any]:
    """One of the head's records; nothing where it is not up or can't be asked."""
    head = find_head(config["cluster_name"], pods)
    if head is None:
        return {}
    _, said = over_ssh(config["cluster_name"], head)(f"cat ~/.altgrad/clusters/{config['cluster_name']}/{file}")
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _age(pod: Pod) -> float:
    """Seconds since its creation."""
    created = datetime.datetime.fromisoformat(str(pod["createdAt"]).replace("Z", "+00:00"))
    return max(0.0, (datetime.datetime.now(datetime.UTC) - created).total_seconds())


def _money(amount: float | None) -> str:
    return "(none)" if amount is None else f"${amount:.2f}"


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main(sys.argv[1:]))
