"""What can be wrong with a cluster file, found before a pod is paid for; one line each.

`ray up` stops at the first, `altgrad cluster doctor` says them all.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from altgrad_cluster.api import Api
from altgrad_cluster.errors import ClusterError, nearest
from altgrad_cluster.naming import check_word
from altgrad_cluster.settings import NodeConfig, Settings, Volume

NEEDED = (
    "available_node_types",
    "head_node_type",
    "head_setup_commands",
    "worker_setup_commands",
    "initialization_commands",
    "setup_commands",
    "file_mounts",
    "cluster_synced_files",
    "file_mounts_sync_continuously",
    "rsync_exclude",
    "rsync_filter",
    "idle_timeout_minutes",
    "upscaling_speed",
    "max_workers",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
"""An external provider has no defaults: Ray ends with a KeyError, some of them on the head only."""
IMPORT_CHECK = "import importlib, sys; sys.modules['altgrad'] = None; importlib.import_module(sys.argv[1])"


def file_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What the file alone shows."""
    for key in NEEDED:
        if key not in config:
            yield f"{key}: missing; an external provider has no defaults"
    yield from _of(lambda: check_word("cluster_name", config.get("cluster_name", "")))
    yield from _of(lambda: Settings.read(config.get("provider") or {}))
    types = config.get("available_node_types") or {}
    for name, node in types.items():
        yield from _of(lambda name=name: check_word("available_node_types", name))
        yield from _of(lambda name=name, node=node: node_config(name, node))
        yield from _of(lambda name=name, node=node: _check_gpus(name, node, name == config.get("head_node_type")))
    yield from _ray_problems(config)
    head = types.get(config.get("head_node_type")) or {}
    if any(amount for name, amount in (head.get("resources") or {"CPU": 1}).items()):
        yield (
            f"available_node_types.{config.get('head_node_type')}.resources: {head.get('resources')} is not "
            "allowed: trials on the head could read the API key; {CPU: 0, GPU: 0} is expected"
        )
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not any("node-ip-address" in command for command in config.get(field) or []):
            yield f"{field}: `ray start` without --node-ip-address: pods reach each other by private addresses only"


def account_problems(config: Mapping[str, Any], api: Api) -> Iterator[str]:
    """What RunPod says to the file: GPU ids, data centres, the volume. Raises ApiError where it says nothing."""
    gpus = {gpu["id"] for gpu in api.gpus()}
    places = {place["id"]: bool(place["globalNetwork"]) for place in api.data_centers()}
    volume, complaint = find_volume(Settings.read(config["provider"]).volume, api)
    if complaint:
        yield complaint
    for name, node in config["available_node_types"].items():
        path, found = f"available_node_types.{name}.node_config", node_config(name, node)
        for gpu in found.gpus:
            if gpu not in gpus:
                yield f"{path}.gpus: {gpu!r} is no GPU of RunPod{nearest(gpu, gpus)}"
        for place in found.data_centers:
            if place not in places:
                yield f"{path}.data_centers: {place!r} is no data centre of RunPod{nearest(place, places)}"
        chosen = {volume.data_center or ""} if volume is not None else set(found.data_centers)
        for place in sorted(chosen):
            if places.get(place) is False:
                yield (
                    f"{path}.data_centers: {place!r} is not allowed: pods can't reach each other there "
                    "(no global networking)"
                )
        yield from (f"available_node_types.{name}.{line}" for line in _of(lambda found=found: found.candidates(volume)))


def cap_problems(config: Mapping[str, Any], api: Api) -> Iterator[str]:
    """Caps that the file lacks, with what the largest cluster that it allows would cost."""
    limits, prices = Settings.read(config["provider"]).limits, {gpu["id"]: gpu["price"]["secure"] for gpu in api.gpus()}
    dearest = {
        name: max(prices.get(gpu, 0.0) for gpu in found.gpus) * found.gpu_count
        for name, node in config["available_node_types"].items()
        for found in (node_config(name, node),)
    }
    head = dearest.pop(config["head_node_type"], 0.0)
    hourly = math.ceil(head + config["max_workers"] * max(dearest.values(), default=0.0))
    for name, cap, proposed, why in (
        ("max_cost_per_hour", limits.per_hour, hourly, "all its pods at the highest price of their GPUs"),
        ("max_cost_total", limits.total, 10 * hourly, "10 hours of that"),
    ):
        if cap is None:
            yield f"provider.{name}: missing: nothing limits what this cluster costs; {proposed} USD is {why}"


def find_volume(volume: Volume | None, api: Api) -> tuple[Volume | None, str | None]:
    """The volume with id and data centre, and what is wrong with it."""
    if volume is None or volume.data_center is not None:
        return volume, None
    volumes = api.volumes()
    field, wanted = ("id", volume.id) if volume.id else ("name", volume.name)
    found = [one for one in volumes if one[field] == wanted]
    if len(found) == 1:
        return Volume(volume.path, None, found[0]["id"], found[0]["dataCenter"]), None
    names = [str(one[field]) for one in volumes]
    return None, (
        f"provider.network_volume.{field}: {wanted!r}: {'several' if found else 'none'} in this account; "
        f"there are {', '.join(names) or 'no volumes'}{nearest(str(wanted), names)}"
    )


def import_problems(module: str, code: Path) -> Iterator[str]:
    """Whether the head will be able to import the provider: from the shipped code, without the rest of the project."""
    name = module.rpartition(".")[0]
    if importlib.util.find_spec(name.split(".")[0]) is None:
        yield f"provider.module: {module!r}: {name} can't be found"
        return
    environment = {**os.environ, "PYTHONPATH": str(code)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHECK, name],
        env=environment,
        cwd=tempfile.gettempdir(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        yield f"provider.module: {module!r}: the head could not import it from what is shipped ({reason[0]})"


def node_config(name: str, node: Mapping[str, Any]) -> NodeConfig:
    return NodeConfig.read(node.get("node_config") or {}, f"available_node_types.{name}.node_config")


def _check_gpus(name: str, node: Mapping[str, Any], is_head: bool) -> None:
    """Ray schedules by `resources`, RunPod bills by `gpu_count`: the two must agree."""
    path, rented = f"available_node_types.{name}", node_config(name, node).gpu_count
    stated = (node.get("resources") or {}).get("GPU")
    if is_head and rented > 1:
        raise ClusterError(f"{path}.node_config.gpu_count: {rented} is not allowed: no trial runs on the head; 1 is")
    if not is_head and stated != rented:
        raise ClusterError(
            f"{path}.resources.GPU: {stated!r} is not allowed: gpu_count, {rented}, is what every pod is rented with"
        )


def _ray_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What Ray's own schema says, as `ray up` would."""
    import copy

    import jsonschema
    from ray.autoscaler._private.util import validate_config

    try:
        validate_config(copy.deepcopy(dict(config)))
    except jsonschema.ValidationError as error:
        yield f"{'.'.join(map(str, error.absolute_path)) or 'file'}: {error.message}"
    except (ValueError, RuntimeError) as error:
        yield " ".join(str(error).split())


def _of(check: Any) -> Iterator[str]:
    try:
        check()
    except ClusterError as error:
        yield str(error)
