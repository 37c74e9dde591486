"""The files for machines one already has and for Kubernetes, against their own schemas."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CRD = "ray.io_rayclusters.yaml"


def test_the_file_for_own_machines_satisfies_rays_schema_and_ships_what_is_there() -> None:
    config = prepare_config(yaml.safe_load((ROOT / "cluster/onprem.yaml").read_text()))
    validate_config(copy.deepcopy(config))
    assert config["provider"]["type"] == "local" and config["max_workers"] == len(config["provider"]["worker_ips"])
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    assert all(ray.__version__ in command for command in config["setup_commands"])


def crd() -> Path | None:
    """KubeRay's own definition, which is not part of the project."""
    stated = os.environ.get("ALTGRAD_KUBERAY_CRD")
    places = [Path(stated)] if stated else [folder / "shared/data/kuberay" / CRD for folder in ROOT.parents]
    return next((place for place in places if place.exists()), None)


def closed(schema: Any) -> Any:
    """The schema with every unknown field refused, as `kubectl apply` does it by default."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(one) for name, one in schema.items()}
    is_open = inner.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in inner
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        inner["additionalProperties"] = False
    return inner


def manifest() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster/kuberay.yaml").read_text())


@pytest.mark.skipif(crd() is None, reason=f"KubeRay's {CRD} is not at hand (ALTGRAD_KUBERAY_CRD says where)")
@pytest.mark.parametrize(
    ("change", "is_valid"),
    [
        (lambda spec: None, True),
        (lambda spec: spec["authOptions"].update(mode="tokens"), False),
        (lambda spec: spec.update(workerGroups=[]), False),
        (lambda spec: spec["headGroupSpec"].pop("template"), False),
    ],
)
def test_the_manifest_satisfies_kuberays_definition(change: Any, is_valid: bool) -> None:
    path = crd()
    assert path is not None
    versions = {version["name"]: version for version in yaml.safe_load(path.read_text())["spec"]["versions"]}
    found = manifest()
    change(found["spec"])
    schema = closed(versions[found["apiVersion"].split("/")[1]]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    errors = [error.message[:200] for error in Draft202012Validator(schema).iter_errors(found)]
    assert (not errors) == is_valid, errors


def test_the_manifest_keeps_trials_off_the_head_and_asks_for_the_token() -> None:
    spec = manifest()["spec"]
    assert spec["authOptions"] == {"mode": "token"} and spec["rayVersion"] == ray.__version__
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
