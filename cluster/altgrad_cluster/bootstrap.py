"""What `ray up` adds to the YAML file: keys, code, the volume's place; and what the head's copy must not have.

Ray keeps the completed file in the temp folder, readable by all, and ships it to the head: paths may stand in it,
secrets never. The head mounts the API key; its own copy of the file, from which workers are set up, doesn't know it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from altgrad_cluster import checks, keys
from altgrad_cluster.api import BASE, Api
from altgrad_cluster.errors import ClusterError
from altgrad_cluster.settings import Settings

API_BASE_VARIABLE = "RUNPOD_API_BASE"
CODE = ("altgrad", "cluster", "sweeps", "pyproject.toml", "README.md", "LICENSE")
REMOTE_CODE = "~/altgrad"
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def complete(config: dict[str, Any], api: Api | None = None) -> dict[str, Any]:
    """The file with everything filled in. ClusterError, in one line, for what a person has to mend."""
    import ray

    _none(checks.file_problems(config))
    provider = config["provider"]
    cluster = config["cluster_name"]
    provider["api_base"] = api_base(provider)
    api = api or Api(keys.api_key, provider["api_base"])
    key_file = keys.api_key_file(cluster)
    api.pods()  # a key that RunPod refuses ends it here, before anything is made
    _none(checks.account_problems(config, api))
    for line in checks.cap_problems(config, api):
        print(f"altgrad: warning: {line}", file=sys.stderr)
    settings = Settings.read(provider)
    volume, _ = checks.find_volume(settings.volume, api)
    if volume is not None:
        provider["network_volume"] = {"id": volume.id, "path": volume.path, "data_center": volume.data_center}
    private, public = keys.ssh_key(cluster)
    config["auth"] = {**config.get("auth", {}), "ssh_user": "root", "ssh_private_key": str(private)}
    provider |= {"public_key": public, "ray_version": ray.__version__}
    config["file_mounts"] = {
        **config.get("file_mounts", {}),
        **code(),
        keys.REMOTE_TOKEN: str(keys.auth_token_file()),
        keys.REMOTE_API_KEY: str(key_file),
        **keys.secret_mounts(cluster, settings.worker_secrets),
    }
    _fill_in(
        config,
        {
            "{ray_version}": ray.__version__,
            "{api_base}": provider["api_base"],
            "{orphan_seconds}": str(settings.orphan_s),
        },
    )
    return config


def for_head(config: dict[str, Any]) -> dict[str, Any]:
    """The head's copy of the file: it sets up workers, which get no API key, and only the secrets that are meant."""
    kept = (keys.REMOTE_API_KEY, keys.REMOTE_SECRETS, keys.REMOTE_WORKER_SECRETS)
    mounts = {remote: local for remote, local in config["file_mounts"].items() if remote not in kept}
    if keys.REMOTE_WORKER_SECRETS in config["file_mounts"]:
        mounts[keys.REMOTE_SECRETS] = keys.REMOTE_WORKER_SECRETS
    return {**config, "file_mounts": mounts, "provider": {**config["provider"], "on_head": True}}


def api_base(provider: dict[str, Any]) -> str:
    """Where the API is: the environment says it, else the file, else RunPod's own address."""
    return os.environ.get(API_BASE_VARIABLE) or provider.get("api_base") or BASE


def checkout() -> Path:
    return Path(__file__).parents[2]


def code() -> dict[str, str]:
    """This checkout's code, by its place on the nodes."""
    root = checkout()
    present = [name for name in CODE if (root / name).exists()]
    if "altgrad" not in present:
        raise ClusterError(f"{root}: holds no altgrad folder: install the project from a checkout (pip install -e .)")
    return {f"{REMOTE_CODE}/{name}": str(root / name) for name in present}


def _none(problems: Iterable[str]) -> None:
    """ClusterError with the first of them, where there is one."""
    for problem in problems:
        raise ClusterError(problem)


def _fill_in(config: dict[str, Any], words: dict[str, str]) -> None:
    """Puts what only this machine knows into the commands of the file."""

    def filled(command: str) -> str:
        for mark, word in words.items():
            command = command.replace(mark, word)
        return command

    for field in COMMANDS:
        config[field] = [filled(command) for command in config.get(field, [])]
