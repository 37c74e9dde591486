"""Whose pod is it? RunPod has no tags and its names are not unique, so both are made here.

A pod's name is `ag--CLUSTER--KEY--KIND--TYPE--NONCE`: KEY is the first eight hex digits of the SHA-256 of the cluster's
public SSH key, so two people who call their clusters alike in one account never see, let alone delete, each other's
pods; NONCE makes the name unique, so that a pod whose creation was never confirmed can be found. The tags that never
change stand as JSON in the pod's environment; where a listing withholds it, the name still says kind and type.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from altgrad_cluster.errors import ClusterError

PREFIX, SEPARATOR = "ag", "--"
WORD = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
TAGS_VARIABLE = "ALTGRAD_CLUSTER_TAGS"
GPU_COUNT_VARIABLE = "ALTGRAD_GPU_COUNT"
"""in a pod's environment: how many GPUs it was rented with"""
KIND, TYPE = "ray-node-type", "ray-user-node-type"


def check_word(path: str, value: str) -> str:
    """`value`, where it can be part of a name. ClusterError else."""
    if not isinstance(value, str) or not WORD.fullmatch(value) or len(value) > 40:
        raise ClusterError(
            f"{path}: {value!r} is not allowed: lower case letters, digits and single hyphens are expected, at most 40"
        )
    return value


def fingerprint(public_key: str) -> str:
    """Eight hex digits that stand for the key; its comment doesn't count."""
    return hashlib.sha256(" ".join(public_key.split()[:2]).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class PodName:
    """The parts of the name of a pod that is ours."""

    cluster: str
    key: str
    kind: str
    node_type: str
    nonce: str

    @classmethod
    def fresh(cls, cluster: str, key: str, kind: str, node_type: str) -> PodName:
        return cls(cluster, key, kind, node_type, secrets.token_hex(4))

    @classmethod
    def parse(cls, text: str) -> PodName | None:
        """The parts, or None where the name is not one of ours."""
        prefix, *parts = text.split(SEPARATOR)
        return cls(*parts) if prefix == PREFIX and len(parts) == 5 else None

    def __str__(self) -> str:
        return SEPARATOR.join((PREFIX, self.cluster, self.key, self.kind, self.node_type, self.nonce))


def fixed_tags(pod: dict[str, Any]) -> dict[str, str]:
    """The tags that a pod was created with, from its environment, else from its name."""
    name = PodName.parse(pod.get("name", ""))
    from_name = {KIND: name.kind, TYPE: name.node_type} if name else {}
    try:
        stated = json.loads((pod.get("env") or {}).get(TAGS_VARIABLE, "{}"))
    except ValueError:
        stated = {}
    return {**from_name, **stated} if isinstance(stated, dict) else from_name
