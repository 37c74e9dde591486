"""The node provider against a simulated RunPod: what Ray asks of it, from many threads and many processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from altgrad_cluster import keys, naming
from altgrad_cluster.api import Api
from altgrad_cluster.provider import RunPodNodeProvider
from conftest import POD, PUBLIC_KEY, WORKER
from fake_runpod import FakeRunPod, until
from ray.autoscaler.node_launch_exception import NodeLaunchException


def running(provider: RunPodNodeProvider, count: int) -> list[str]:
    return until(
        lambda: (
            (ids := [n for n in provider.non_terminated_nodes({}) if provider.is_running(n)])
            and len(ids) == count
            and ids
        ),
        10,
        f"{count} running pods",
    )


def test_a_pod_is_created_seen_reached_and_deleted(account, provider):
    nodes = provider()
    account.boot_s = 0.3
    created = nodes.create_node(POD, WORKER, 1)
    (pod_id,) = created
    assert nodes.non_terminated_nodes({"ray-node-type": "worker"}) == [pod_id]
    assert not nodes.is_running(pod_id) and nodes.external_ip(pod_id) is None and nodes.internal_ip(pod_id) is None
    assert created[pod_id]["gpu"] == "NVIDIA H100 80GB HBM3" and created[pod_id]["data_center"] == "EU-RO-1"
    running(nodes, 1)
    assert nodes.external_ip(pod_id) == "127.0.0.1" and nodes.internal_ip(pod_id).startswith("10.")
    assert nodes.ssh_port(pod_id, is_inside=False) > 20000 and nodes.ssh_port(pod_id, is_inside=True) == 22
    assert nodes.get_node_id(nodes.internal_ip(pod_id), use_internal_ip=True) == pod_id
    nodes.terminate_node(pod_id)
    assert nodes.non_terminated_nodes({}) == [] and nodes.is_terminated(pod_id) and not account.pods
    nodes.terminate_nodes([pod_id])


def test_only_port_22_is_published_and_no_secret_is_in_the_environment(account, provider):
    provider().create_node(POD, WORKER, 1)
    (body,) = account.bodies
    assert body["ports"] == ["22/tcp"] and body["cloud"] == "SECURE" and body["globalNetworking"] is True
    assert set(body["env"]) == {"PUBLIC_KEY", naming.TAGS_VARIABLE, naming.GPU_COUNT_VARIABLE}
    assert account.key not in str(body)


def test_fixed_tags_come_from_the_pod_and_changing_ones_from_this_machine(account, provider):
    """In another process on the head, where the environment has the pod's own key: the mounted one counts."""
    keys.write_private(Path(keys.REMOTE_API_KEY).expanduser(), account.key)
    first = provider()
    (pod_id,) = first.create_node(POD, WORKER, 1)
    first.set_node_tags(pod_id, {"ray-node-status": "setting-up"})
    first.set_node_tags(pod_id, {"ray-runtime-config": "h1"})
    config = {"type": "external", "api_base": account.url, "public_key": PUBLIC_KEY, "on_head": True}
    code = (
        f"from altgrad_cluster.provider import RunPodNodeProvider\np = RunPodNodeProvider({config!r}, 'one')\n"
        f"print(sorted(p.node_tags({pod_id!r}).items()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "RUNPOD_API_KEY": "podkey_of_the_pod_itself", "PYTHONPATH": ":".join(sys.path)},
    )
    expected = {**WORKER, "ray-node-status": "setting-up", "ray-runtime-config": "h1"}
    assert done.stdout.strip() == str(sorted(expected.items())), done.stderr[-2000:]


def test_another_machine_takes_a_running_pod_for_set_up(account, provider, monkeypatch, tmp_path):
    (pod_id,) = provider().create_node(POD, WORKER, 1)
    monkeypatch.setenv("ALTGRAD_CLUSTER_HOME", str(tmp_path / "elsewhere"))
    other = provider()
    running(other, 1)
    tags = other.node_tags(pod_id)
    assert tags["ray-node-status"] == "up-to-date" and tags["ray-launch-request"] == "r1"


def test_a_listing_without_environments_still_tells_kind_and_type(account, provider, monkeypatch, tmp_path):
    (pod_id,) = provider().create_node(POD, WORKER, 1)
    account.faults.withholds_env = True
    monkeypatch.setenv("ALTGRAD_CLUSTER_HOME", str(tmp_path / "elsewhere"))
    tags = provider().node_tags(pod_id)
    assert (tags["ray-node-type"], tags["ray-user-node-type"]) == ("worker", "worker")


@pytest.mark.parametrize(
    "name",
    [
        "ag--one-b--KEY--worker--worker--0",
        "ag--on--KEY--head--head--0",
        "one",
        "ag--one",
        "ag--one--ffffffff--worker--worker--0",
        "ray-one-worker",
    ],
)
def test_pods_of_others_are_never_ours(account, provider, name):
    other = account.add_pod(name.replace("KEY", naming.fingerprint(PUBLIC_KEY)), status="RUNNING")
    stopped = account.add_pod(name.replace("KEY", naming.fingerprint(PUBLIC_KEY)), status="EXITED")
    nodes = provider()
    assert nodes.non_terminated_nodes({}) == [] and nodes.nodes_for_teardown({}) == []
    assert {other, stopped} <= set(account.pods)


def test_a_head_under_another_key_is_not_replaced(account, provider):
    head = {**WORKER, "ray-node-type": "head", "ray-user-node-type": "head"}
    provider(public_key="ssh-ed25519 AAAAOther").create_node(POD, head, 1)
    with pytest.raises(NodeLaunchException, match="'one' is in use in this account with another SSH key"):
        provider().create_node(POD, head, 1)
    assert len(account.pods) == 1


def test_pods_that_stopped_by_themselves_are_deleted(account, provider):
    nodes = provider()
    ids = list(nodes.create_node(POD, WORKER, 3))
    running(nodes, 3)
    account.interrupt(ids[0])
    account.pods[ids[1]]["status"] = "ERROR"
    account.vanish(ids[2])
    until(lambda: nodes.non_terminated_nodes({}) == [] and not account.pods, 10, "stopped pods are deleted")
    assert all(nodes.is_terminated(pod_id) for pod_id in ids)


def test_a_stopped_head_is_kept_for_teardown_and_gone_before_the_next(account, provider):
    head = {**WORKER, "ray-node-type": "head", "ray-user-node-type": "head"}
    (pod_id,) = provider().create_node(POD, head, 1)
    until(lambda: account.pods[pod_id]["status"] == "RUNNING", 5, "the head runs")
    account.interrupt(pod_id)
    nodes = provider()
    assert nodes.non_terminated_nodes({}) == [] and nodes.nodes_for_teardown({}) == [pod_id]
    (second,) = nodes.create_node(POD, head, 1)
    assert set(account.pods) == {second}


def test_sixteen_threads_create_tag_list_and_delete(account, provider):
    nodes, barrier, kept = provider(max_cost_per_hour=1000), threading.Barrier(16), []

    def work(number: int) -> None:
        barrier.wait()
        (pod_id,) = nodes.create_node(POD, WORKER, 1)
        nodes.set_node_tags(pod_id, {"ray-node-status": f"s{number}", "number": str(number)})
        assert pod_id in nodes.non_terminated_nodes({"number": str(number)})
        assert nodes.node_tags(pod_id)["ray-node-status"] == f"s{number}"
        if number % 2:
            nodes.terminate_node(pod_id)
            assert nodes.is_terminated(pod_id)
        else:
            kept.append(pod_id)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert sorted(nodes.non_terminated_nodes({})) == sorted(kept) == sorted(account.pods)
    assert account.count("POST", "/v2/pods") == 16


def test_one_round_of_questions_costs_one_listing(account, provider):
    nodes = provider()
    nodes.create_node(POD, WORKER, 3)
    time.sleep(1.6)
    before = account.count("GET", "/v2/pods")
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda _: [
                    nodes.node_tags(n) and nodes.is_running(n) and nodes.internal_ip(n)
                    for n in nodes.non_terminated_nodes({})
                ],
                range(16),
            )
        )
    assert account.count("GET", "/v2/pods") - before == 1


def test_pages_are_followed_should_the_listing_have_any(account, provider):
    nodes = provider(max_cost_per_hour=1000)
    ids = [pod_id for _ in range(2) for pod_id in nodes.create_node(POD, WORKER, 6)]
    account.violations.clear()
    account.faults.page_size = 5
    assert sorted(provider().non_terminated_nodes({})) == sorted(ids)


def test_a_listing_of_a_thousand_strangers_holds_our_one(account, provider):
    for number in range(1000):
        account.pods[f"s{number}"] = {
            **account.pods.get("s0", {}),
            "id": f"s{number}",
            "name": f"stranger-{number}",
            "status": "RUNNING",
            "env": {},
            "cost": 1.0,
        }
    account._contract = None
    nodes = provider()
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    assert nodes.non_terminated_nodes({}) == [pod_id]


def test_on_the_laptop_a_wrong_key_ends_in_one_line(account):
    nodes = RunPodNodeProvider(
        {"api_base": account.url, "public_key": PUBLIC_KEY}, "one", api=Api(lambda: "wrong", account.url)
    )
    with pytest.raises(SystemExit, match=r"^altgrad: RUNPOD_API_KEY: RunPod refuses this key"):
        nodes.non_terminated_nodes({})


def test_a_pod_that_refuses_the_key_counts_as_terminated(account: FakeRunPod, provider):
    nodes = provider()
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    running(nodes, 1)
    nodes.give_up(pod_id, "refuses")
    assert nodes.is_terminated(pod_id) and pod_id in nodes.nodes_for_teardown({})


def test_where_set_up_failed_no_other_pod_is_rented_for_a_while(account: FakeRunPod, provider):
    nodes = provider()
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    running(nodes, 1)
    first = account.pods[pod_id]
    nodes.set_node_tags(pod_id, {"ray-node-status": "update-failed"})
    nodes.terminate_node(pod_id)
    (second,) = nodes.create_node(POD, WORKER, 1)
    there = [(pod["gpu"]["id"], pod["dataCenterId"]) for pod in (first, account.pods[second])]
    assert there == [(POD["gpus"][0], "EU-RO-1"), (POD["gpus"][0], "US-KS-2")]
