"""The parts of the YAML file that are ours, checked once: `provider` and each node type's `node_config`.

Every error is a ClusterError that names the path, the value, what is allowed and what comes nearest. Times in the file
are in minutes and money in USD, as their names say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad_cluster.api import BASE
from altgrad_cluster.candidates import COOLDOWN_S, Candidate, candidates
from altgrad_cluster.errors import ClusterError, nearest
from altgrad_cluster.registry import cluster_folder
from altgrad_cluster.spending import Limits, Purse

RAYS_OWN = (
    "type",
    "module",
    "_config_cache_path",
    "use_internal_ips",
    "disable_launch_config_check",
    "disable_node_updaters",
    "launch_config_version",
    "gcs_address",
)
FILLED_IN = ("api_base", "public_key", "ray_version", "on_head")
"""By `bootstrap`; not for people to write."""
KNOWN = (
    "network_volume",
    "max_cost_per_hour",
    "max_cost_total",
    "head_idle_minutes",
    "orphan_minutes",
    "set_up_minutes",
    "max_worker_hours",
    "cooldown_minutes",
    "worker_secrets",
)
VOLUME_KEYS = ("name", "id", "path", "data_center")
NODE_KEYS = ("image", "disk", "gpus", "gpu_count", "min_cuda", "data_centers", "env")
IMAGE = re.compile(r"[a-z0-9][\w.:/-]*?(?::(?P<tag>[\w][\w.-]{0,127}))?(?:@sha256:(?P<digest>[0-9a-f]{64}))?", re.ASCII)


@dataclass(frozen=True)
class Volume:
    """A network volume by name or id; `id` and `data_center` are known once RunPod was asked."""

    path: str
    name: str | None = None
    id: str | None = None
    data_center: str | None = None


@dataclass(frozen=True)
class Settings:
    """What `provider` says."""

    api_base: str
    public_key: str
    ray_version: str
    on_head: bool
    volume: Volume | None
    limits: Limits
    head_idle_s: float
    orphan_s: float
    cooldown_s: float
    set_up_s: float
    """for which a pod waits for its first set-up command, or without a watch"""
    max_worker_s: float | None
    worker_secrets: tuple[str, ...]

    @classmethod
    def read(cls, provider: Mapping[str, Any]) -> Settings:
        _known("provider", provider, (*KNOWN, *RAYS_OWN, *FILLED_IN))
        return cls(
            api_base=str(provider.get("api_base") or BASE),
            public_key=str(provider.get("public_key", "")),
            ray_version=str(provider.get("ray_version", "")),
            on_head=bool(provider.get("on_head", False)),
            volume=_volume(provider.get("network_volume")),
            limits=Limits(_amount(provider, "max_cost_per_hour"), _amount(provider, "max_cost_total")),
            head_idle_s=60 * (_amount(provider, "head_idle_minutes") or 30.0),
            orphan_s=60 * (_amount(provider, "orphan_minutes") or 10.0),
            cooldown_s=60 * (_amount(provider, "cooldown_minutes") or COOLDOWN_S / 60),
            set_up_s=60 * (_amount(provider, "set_up_minutes") or 10.0),
            max_worker_s=None if (hours := _amount(provider, "max_worker_hours")) is None else 3600 * hours,
            worker_secrets=_words("provider", provider, "worker_secrets"),
        )

    def purse(self, cluster: str) -> Purse:
        """Spending as this machine knows it; the head copies it to the network volume, for the head after it."""
        volume = self.volume if self.on_head else None
        copy = None if volume is None else Path(volume.path) / ".altgrad" / f"spending-{cluster}.json"
        return Purse(cluster_folder(cluster) / "spending.json", self.limits, copy=copy)


@dataclass(frozen=True)
class NodeConfig:
    """What `node_config` of a node type says."""

    image: str
    gpus: tuple[str, ...]
    data_centers: tuple[str, ...]
    disk: int = 40
    gpu_count: int = 1
    env: Mapping[str, str] | None = None
    min_cuda: str | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any], path: str = "node_config") -> NodeConfig:
        _known(path, config, NODE_KEYS)
        image = config.get("image")
        named = IMAGE.fullmatch(image) if isinstance(image, str) else None
        if not isinstance(image, str) or named is None or not (named["tag"] or named["digest"]):
            raise ClusterError(
                f"{path}.image: {image!r} is not allowed: an image with its tag (name:tag) or, better, its digest "
                "(name@sha256:…, 64 hex digits) is expected"
            )
        gpus = _words(path, config, "gpus")
        if not gpus:
            raise ClusterError(f"{path}.gpus: [] is not allowed: at least one GPU id of RunPod's catalogue is expected")
        env = config.get("env") or {}
        for name in env:
            if any(mark in str(name).upper() for mark in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
                raise ClusterError(
                    f"{path}.env.{name}: not allowed: RunPod shows a pod's environment to the whole "
                    "account; put secrets in a file of mode 0600 and mount it"
                )
        return cls(
            image,
            gpus,
            _words(path, config, "data_centers"),
            _whole(path, config, "disk", 40),
            _whole(path, config, "gpu_count", 1),
            {str(k): str(v) for k, v in env.items()},
            _cuda(path, config),
        )

    @property
    def is_pinned(self) -> bool:
        """Whether the image is named by its digest: a tag can be moved to another image."""
        return "@sha256:" in self.image

    def candidates(self, volume: Volume | None) -> list[Candidate]:
        """GPU × data centre; with a volume only where it lies. ClusterError where that is nowhere."""
        places: Sequence[str] = self.data_centers
        if volume is not None and volume.data_center is not None:
            if places and volume.data_center not in places:
                raise ClusterError(
                    f"node_config.data_centers: {', '.join(places)} is not allowed with the network volume "
                    f"{volume.name or volume.id}, which lies in {volume.data_center}: a pod can mount it only there"
                )
            places = (volume.data_center,)
        return candidates(self.gpus, places)


def _volume(stated: Any) -> Volume | None:
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        raise ClusterError(f"provider.network_volume: {stated!r} is not allowed: name (or id) and path are expected")
    _known("provider.network_volume", stated, VOLUME_KEYS)
    path = str(stated.get("path", ""))
    if not path.startswith("/") or path == "/":
        raise ClusterError(f"provider.network_volume.path: {path!r} is not allowed: an absolute folder is expected")
    if bool(stated.get("name")) == bool(stated.get("id")) and not stated.get("data_center"):
        raise ClusterError("provider.network_volume: either name or id is expected, to find the volume by")
    return Volume(path, stated.get("name"), stated.get("id"), stated.get("data_center"))


def _known(path: str, stated: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in stated:
        if key not in known:
            public = [word for word in known if not word.startswith("_") and word not in FILLED_IN]
            raise ClusterError(f"{path}.{key}: unknown; allowed: {', '.join(public)}{nearest(str(key), public)}")


def _words(path: str, config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    stated = config.get(key) or []
    if not isinstance(stated, list) or not all(isinstance(word, str) and word for word in stated):
        raise ClusterError(f"{path}.{key}: {stated!r} is not allowed: a list of names is expected")
    return tuple(stated)


def _whole(path: str, config: Mapping[str, Any], key: str, default: int) -> int:
    stated = config.get(key, default)
    if isinstance(stated, bool) or not isinstance(stated, int) or stated < 1:
        raise ClusterError(f"{path}.{key}: {stated!r} is not allowed: a whole number, at least 1, is expected")
    return stated


def _cuda(path: str, config: Mapping[str, Any]) -> str | None:
    stated = config.get("min_cuda")
    if stated is None:
        return None
    # A number would lose its last zero: 12.10 is not 12.1.
    if not isinstance(stated, str) or not re.fullmatch(r"\d+\.\d+", stated):
        raise ClusterError(f'{path}.min_cuda: {stated!r} is not allowed: "major.minor" in quotes is expected')
    return stated


def _amount(provider: Mapping[str, Any], key: str) -> float | None:
    stated = provider.get(key)
    if stated is None:
        return None
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated > 0:
        raise ClusterError(f"provider.{key}: {stated!r} is not allowed: a number above 0 is expected")
    return float(stated)
