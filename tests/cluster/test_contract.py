"""Every request of the provider, and every answer of the simulation, as RunPod's own document has it."""

from __future__ import annotations

import time

import pytest
from altgrad_cluster.api import Api
from altgrad_cluster.errors import ApiError
from conftest import POD, WORKER
from contract import PLACE, Contract, document

pytestmark = pytest.mark.skipif(document() is None, reason=f"RunPod's OpenAPI document is not at hand ({PLACE})")


def test_all_that_is_asked_and_answered_is_as_documented(account, provider):
    client = Api(lambda: account.key, account.url, sleep=lambda seconds: None)
    volume = {"id": "vol0altgrad", "path": "/workspace", "data_center": "EU-RO-1"}
    nodes = provider(network_volume=volume)
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    assert client.pod(pod_id)["id"] == pod_id and client.pod("none") is None
    assert client.gpus() and client.data_centers() and client.volumes()
    account.faults.no_capacity = set(POD["gpus"])
    body = account.bodies[0]
    for plant in (
        {"no_capacity": set(POD["gpus"])},
        {"no_capacity": set(), "forbidden": set(POD["gpus"])},
        {"forbidden": set(), "no_balance": True},
        {"no_balance": False, "lost_answers": 1},
    ):
        for name, value in plant.items():
            setattr(account.faults, name, value)
        with pytest.raises(ApiError):
            client.create_pod(body)
    with pytest.raises(ApiError, match="422"):
        client.create_pod(body | {"gpuTypeIds": ["x"]})
    with pytest.raises(ApiError, match="401"):
        Api(lambda: "wrong", account.url).pods()
    account.faults.rate_limited_until = time.monotonic() + 60
    with pytest.raises(ApiError, match="429"):
        client.create_pod(body)
    account.faults.rate_limited_until = 0.0
    account.interrupt(pod_id)
    assert client.pod(pod_id)["status"] == "EXITED"
    client.delete_pod(pod_id)
    client.delete_pod(pod_id)
    assert set(account.endings()) >= {
        "POST 201",
        "POST 400",
        "POST 402",
        "POST 403",
        "POST 422",
        "POST 429",
        "POST 500",
        "GET 200",
        "GET 401",
        "GET 404",
        "DELETE 204",
        "DELETE 404",
    }
    assert not account.violations


PROBLEM = {"title": "", "status": 400, "detail": ""}


@pytest.mark.parametrize(
    ("method", "path", "query", "body", "status", "answer"),
    [
        ("POST", "/v2/pods", {}, {"name": "x", "image": "x", "gpuTypeIds": []}, 400, PROBLEM),
        ("POST", "/v2/pods", {}, {"name": "x", "image": "x"}, 201, {"id": "x"}),
        ("GET", "/v2/pods", {}, None, 200, {"pods": [{"id": "x"}]}),
        ("GET", "/v2/pods", {"limit": "5"}, None, 200, {"pods": []}),
        ("GET", "/v2/pods", {}, None, 429, {"error": "slow down"}),
        ("DELETE", "/v2/pods/x", {}, None, 204, {"id": "x"}),
        ("GET", "/v1/pods", {}, None, 200, {}),
    ],
)
def test_the_judge_finds_what_is_not_documented(method, path, query, body, status, answer):
    judge = Contract(document())
    assert judge.violations(method, path, query, body, status, answer)


def test_the_judge_is_content_with_what_is():
    judge = Contract(document())
    body = {"name": "x", "image": "x", "gpu": {"id": "NVIDIA L4"}}
    assert judge.violations("POST", "/v2/pods", {}, body, 400, PROBLEM) == []
    assert judge.violations("GET", "/v2/pods", {}, None, 200, {"pods": []}) == []
