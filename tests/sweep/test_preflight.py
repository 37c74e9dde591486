"""What is wrong with a cluster is one line before anything is touched."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private.utils import check_version_info
from ray.cluster_utils import Cluster
from ray.exceptions import AuthenticationError

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.engine import preflight
from altgrad.sweep.engine.driver import reach
from altgrad.sweep.options import RunOptions


def test_rays_own_words_on_versions_and_tokens_become_a_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "2.59.0", "python_version": "3.12.1"}, "127.0.0.1")
    text = preflight.refusal(caught.value)
    assert text is not None and text.startswith("the cluster has Ray 2.59.0 and Python 3.12.1, this driver Ray 2.")
    text = preflight.refusal(AuthenticationError("no token"))
    assert text is not None and "RAY_AUTH_MODE" in text and "\n" not in text
    text = preflight.refusal(ConnectionError("Failed to connect to Ray cluster"))
    assert text is not None and "the head's mode" in text
    assert preflight.refusal(RuntimeError("something else")) is None


def test_room_is_counted_by_node() -> None:
    worker = {"CPU": 0.9, "GPU": 1.0}
    nodes = [
        {"Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Resources": {"CPU": 1.0, "GPU": 4.0}},
        {"Resources": {"CPU": 64.0}},
    ]
    assert not list(preflight.lack_of_room(worker, 3, nodes))
    (note,) = preflight.lack_of_room(worker, 4, nodes)
    assert "4 x (0.9 CPU + 1 GPU)" in note and "hold 3 of them" in note


@pytest.mark.slow
def test_a_real_cluster_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False},
    )
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    try:
        options = RunOptions(out=tmp_path / "new" / "out", address=cluster.address)
        assert reach(options) == (replace(options, gpus_per_trial=0.0), []) and not ray.is_initialized()
        with pytest.raises(SpecError, match="--executor: 'train' needs the cluster's State API"):
            reach(RunOptions(out=tmp_path, address=cluster.address, executor="train"))

        @contextlib.contextmanager
        def unseen(**_: object) -> Iterator[SimpleNamespace]:
            yield SimpleNamespace(name=str(tmp_path / "only-here"))

        monkeypatch.setattr(preflight.tempfile, "NamedTemporaryFile", unseen)
        with pytest.raises(SpecError, match=r"--out: .* is not on shared storage: node"):
            reach(options)
        assert list(tmp_path.iterdir()) == []
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_the_given_cluster_is_asked_whatever_other_ray_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": True, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    try:
        options = RunOptions(out=tmp_path, address=cluster.address, executor="train")
        assert reach(options) == (replace(options, gpus_per_trial=0.0), [])
    finally:
        ray.shutdown()
        cluster.shutdown()
