"""Creating pods: candidates in turn, every documented refusal, lost answers, and the caps."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from altgrad_cluster import api, candidates, launcher, reasons
from altgrad_cluster.candidates import Availability, Candidate
from altgrad_cluster.errors import ApiError
from altgrad_cluster.spending import Limits, OverBudget, Purse
from conftest import POD, WORKER
from ray.autoscaler.node_launch_exception import NodeLaunchException

H100, L40S = POD["gpus"]


def placed(account, provider, **changes):
    (found,) = provider(**changes).create_node(POD, WORKER, 1).values()
    return found["gpu"], found["data_center"]


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        (set(), (H100, "EU-RO-1")),
        ({f"{H100}@EU-RO-1"}, (H100, "US-KS-2")),
        ({H100}, (L40S, "EU-RO-1")),
        ({H100, f"{L40S}@EU-RO-1"}, (L40S, "US-KS-2")),
    ],
)
def test_the_first_candidate_with_room_is_taken(account, provider, full, expected):
    account.faults.no_capacity = full
    assert placed(account, provider) == expected
    assert len(account.pods) == 1


def test_a_pool_that_the_account_may_not_use_is_passed_over(account, provider):
    account.faults.forbidden = {H100}
    assert placed(account, provider) == (L40S, "EU-RO-1")


def test_a_candidate_without_room_is_left_alone_for_a_while(account, provider):
    account.faults.no_capacity = {H100}
    nodes = provider(cooldown_minutes=0.02)
    for _ in range(2):
        nodes.create_node(POD, WORKER, 1)
    assert account.endings()["POST 400"] == 2
    account.faults.no_capacity = set()
    time.sleep(1.3)
    (found,) = nodes.create_node(POD, WORKER, 1).values()
    assert found["gpu"] == H100


def test_without_any_room_the_reason_names_the_candidates(account, provider):
    account.faults.no_capacity = {H100, L40S}
    nodes = provider()
    with pytest.raises(NodeLaunchException, match=r"H100.* in EU-RO-1.*no longer any instances.*L40S in US-KS-2"):
        nodes.create_node(POD, WORKER, 1)
    with pytest.raises(NodeLaunchException, match=r"again in \d+ s"):
        nodes.create_node(POD, WORKER, 1)
    assert account.endings()["POST 400"] == 4 and not account.pods


@pytest.mark.parametrize(
    ("status", "word"), [(401, "key refused"), (402, "balance"), (422, "422"), (409, "409"), (503, "503")]
)
def test_what_no_other_candidate_would_cure_holds_everything_back(account, provider, monkeypatch, status, word):
    monkeypatch.setattr(launcher, "LOOKS", (0.1,))
    nodes = provider()
    nodes.non_terminated_nodes({})
    nodes._launcher._price(H100)
    listed = nodes._launcher._pods
    nodes._launcher._pods = lambda: listed() if not account.faults.statuses else []
    account.faults.statuses = [status]
    with pytest.raises(NodeLaunchException, match=word):
        nodes.create_node(POD, WORKER, 1)
    posts = account.count("POST")
    with pytest.raises(NodeLaunchException, match=r"next try in \d+ s|waiting \d+ s"):
        nodes.create_node(POD, WORKER, 1)
    assert account.count("POST") == posts == 1 and not account.pods


def test_a_storm_of_429_is_waited_out(account, provider):
    nodes = provider()
    nodes.create_node(POD, WORKER, 1)
    account.faults.rate_limited_until = time.monotonic() + 1.5
    time.sleep(1.6 - 1.5)
    started = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: provider().non_terminated_nodes({}), range(4)))
    assert time.monotonic() - started > 1
    assert account.endings()["GET 429"] <= 12


def test_a_long_retry_after_is_said_and_not_slept(account):
    account.faults.rate_limited_until, account.faults.retry_after = time.monotonic() + 60, 600
    client, slept = api.Api(lambda: account.key, account.url, sleep=lambda s: slept.append(s)), []
    for _ in range(3):
        with pytest.raises(ApiError, match="429"):
            client.pods()
    assert not slept and account.count("GET") == 1


@pytest.mark.parametrize("hidden_for", [0.0, 2.0])
def test_a_lost_answer_makes_no_orphan_and_no_double(account, provider, hidden_for):
    account.faults.lost_answers, account.faults.hidden_for = 1, hidden_for
    nodes = provider()
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    assert set(account.pods) == {pod_id} == set(nodes.non_terminated_nodes({})) and account.count("POST") == 1


def test_a_pod_that_shows_up_late_is_taken_before_another_is_asked_for(account, provider, monkeypatch):
    monkeypatch.setattr(launcher, "LOOKS", (0.1,))
    account.faults.lost_answers, account.faults.hidden_for = 1, 1.5
    nodes = provider()
    with pytest.raises(NodeLaunchException, match="500"):
        nodes.create_node(POD, WORKER, 1)
    with pytest.raises(NodeLaunchException, match="answer to a creation was lost; waiting"):
        nodes.create_node(POD, WORKER, 1)
    time.sleep(3)
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    assert set(account.pods) == {pod_id} and account.count("POST") == 1


def test_a_doubt_that_nothing_came_of_ends(account, provider, monkeypatch):
    monkeypatch.setattr(launcher, "LOOKS", (0.1,))
    monkeypatch.setattr(launcher, "DOUBT_S", 0.5)
    monkeypatch.setattr(candidates, "BACKOFF_S", (0.2, 0.2))
    nodes = provider()
    nodes._launcher._price(H100)
    original = nodes._api.create_pod

    def broken(body):
        monkeypatch.setattr(nodes._api, "create_pod", original)
        raise ApiError("POST", 502, "bad gateway")

    monkeypatch.setattr(nodes._api, "create_pod", broken)
    with pytest.raises(NodeLaunchException, match="502"):
        nodes.create_node(POD, WORKER, 1)
    time.sleep(0.7)
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    assert set(account.pods) == {pod_id}


def test_the_hourly_cap_is_checked_before_every_post_from_all_threads(account, provider):
    nodes, refused, barrier = provider(max_cost_per_hour=2.69 * 3 + 0.1), [], threading.Barrier(8)
    only = {**POD, "gpus": [H100]}

    def create(_: int) -> None:
        barrier.wait()
        try:
            nodes.create_node(only, WORKER, 1)
        except NodeLaunchException as error:
            refused.append(str(error))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(8)))
    assert len(account.pods) == account.count("POST") == 3 and len(refused) == 5
    assert all("would exceed max_cost_per_hour $8.17" in text for text in refused)


def test_a_cheaper_gpu_may_fit_under_the_cap(account, provider):
    assert placed(account, provider, max_cost_per_hour=1.0) == (L40S, "EU-RO-1")
    assert account.count("POST") == 1


def test_the_total_cap_ends_all_creating(account, provider):
    nodes = provider(max_cost_total=0.5)
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    account.pods[pod_id]["cost"] = 3600 * 10
    time.sleep(1.7)
    nodes.non_terminated_nodes({})
    with pytest.raises(NodeLaunchException, match=r"cost cap reached: \$\d+\.\d\d spent of max_cost_total \$0.50"):
        nodes.create_node(POD, WORKER, 1)
    assert account.count("POST") == 1


def test_spending_is_price_times_time_and_outlives_the_process(tmp_path):
    now = [1000.0]
    pods = [{"id": "a", "name": "a", "cost": 2.0, "createdAt": "1970-01-01T00:16:40Z"}]
    purse = Purse(tmp_path / "s.json", Limits(per_hour=5, total=3), clock=lambda: now[0])
    purse.observe(pods)
    now[0] += 1800
    purse.observe(pods)
    assert purse.spent() == pytest.approx(1.0)
    purse.reserve("b", 3.0)
    with pytest.raises(OverBudget, match=r"\$5.00/h now and \$0.10/h more"):
        purse.reserve("c", 0.1)
    purse.release("b")
    purse.reserve("c", 0.1)
    later = Purse(tmp_path / "s.json", Limits(total=3), clock=lambda: now[0])
    now[0] += 3600
    later.observe(pods)
    assert later.spent() == pytest.approx(3.0) and later.is_exhausted
    later.observe([])
    now[0] += 3600
    later.observe([])
    assert later.spent() == pytest.approx(3.0)


def test_pauses_grow_and_a_success_ends_them():
    now = [0.0]
    found = Availability(clock=lambda: now[0])
    waits = []
    for _ in range(7):
        found.pause("broken")
        start = now[0]
        while found.paused():
            now[0] += 1
        waits.append(now[0] - start)
    assert waits == [10, 20, 40, 80, 160, 300, 300]
    found.succeeded(Candidate(H100, None))
    found.pause("broken")
    assert "next try in 10 s" in found.paused()


def test_rays_status_says_why_a_launch_failed():
    from ray.autoscaler.v2.instance_manager.common import InstanceUtil
    from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
    from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    for _ in range(2):
        reasons.show_in_status()
    error = LaunchNodeError("worker", 1, "r", 0)
    error.__cause__ = ValueError("cost cap reached")
    instance = Instance(instance_id="i", status=Instance.REQUESTED)
    InstanceManager._update_instance(
        instance,
        InstanceUpdateEvent(instance_id="i", new_instance_status=Instance.ALLOCATION_FAILED, details=str(error)),
    )
    said = InstanceUtil.get_last_status_transition(instance, Instance.ALLOCATION_FAILED).details
    assert said.startswith("Failed to launch 1 nodes") and said.endswith("cost cap reached")
