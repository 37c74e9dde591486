"""An account on a simulated RunPod, and a provider that uses it as a `ray` command would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from altgrad_cluster.api import Api
from altgrad_cluster.provider import RunPodNodeProvider
from fake_runpod import FakeRunPod

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOneKeyOfATestThatIsNone someone"
POD = {
    "image": "runpod/pytorch:x",
    "gpus": ["NVIDIA H100 80GB HBM3", "NVIDIA L40S"],
    "data_centers": ["EU-RO-1", "US-KS-2"],
}
WORKER = {
    "ray-node-type": "worker",
    "ray-user-node-type": "worker",
    "ray-launch-request": "r1",
    "ray-launch-config": "c1",
    "ray-node-name": "ray-one-worker",
    "ray-node-status": "uninitialized",
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keys and records of this test only, and no key of the person who runs it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ALTGRAD_CLUSTER_HOME", str(tmp_path / "altgrad"))
    for name in ("RUNPOD_API_KEY", "RUNPOD_API_BASE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def account() -> Iterator[FakeRunPod]:
    with FakeRunPod().serving() as fake:
        yield fake
    assert not fake.violations, fake.violations[:5]


@pytest.fixture
def provider(account: FakeRunPod) -> Callable[..., RunPodNodeProvider]:
    """Makes a provider as the head's autoscaler would; `changes` go into the `provider` section."""

    def make(cluster: str = "one", *, public_key: str = PUBLIC_KEY, **changes: Any) -> RunPodNodeProvider:
        config = {
            "type": "external",
            "module": "x",
            "api_base": account.url,
            "public_key": public_key,
            "on_head": True,
            **changes,
        }
        return RunPodNodeProvider(config, cluster, api=Api(lambda: account.key, account.url))

    return make
