"""The ends that nobody has to think of: a head that idles, a budget that is spent, a worker whose head is gone."""

from __future__ import annotations

import socket

import pytest
from altgrad_cluster import node, registry, watch
from altgrad_cluster.api import Api
from altgrad_cluster.naming import fingerprint
from altgrad_cluster.spending import Limits, Purse
from conftest import PUBLIC_KEY

KEY = fingerprint(PUBLIC_KEY)


class Head:
    """A HeadWatch on an account, with a clock and a job of the test's own."""

    def __init__(self, account, tmp_path, limits=Limits()):  # noqa: B008
        self.now, self.busy = 0.0, False
        config = {"cluster_name": "one", "provider": {"public_key": PUBLIC_KEY, "head_idle_minutes": 10}}
        self.watch = watch.HeadWatch(
            config,
            Api(lambda: account.key, account.url),
            Purse(tmp_path / "s", limits),
            busy=lambda: self.busy,
            clock=lambda: self.now,
        )

    def needed_after(self, minutes: float) -> bool:
        self.now += 60 * minutes
        return self.watch.look()


@pytest.fixture
def pods(account):
    return {
        kind: account.add_pod(f"ag--one--{KEY}--{kind}--{kind}--{n}", status="RUNNING")
        for n, kind in enumerate(("head", "worker"))
    } | {"other": account.add_pod("other", status="RUNNING")}


def test_a_head_is_needed_while_there_are_workers_or_jobs_and_for_a_while_after(account, pods, tmp_path):
    head = Head(account, tmp_path)
    assert head.needed_after(30)
    account.vanish(pods["worker"])
    assert head.needed_after(9)
    head.busy = True
    assert head.needed_after(30)
    head.busy = False
    assert head.needed_after(9)
    assert not head.needed_after(2)
    head.watch.delete_all()
    assert set(account.pods) == {pods["other"]}


def test_a_spent_budget_deletes_the_workers_and_then_the_head_whatever_runs(account, pods, tmp_path):
    head = Head(account, tmp_path, Limits(total=1.0))
    head.busy = True
    assert head.needed_after(1) and pods["worker"] in account.pods
    account.pods[pods["worker"]]["cost"] = 3600 * 1e4
    head.needed_after(1)
    assert head.needed_after(1) and pods["worker"] not in account.pods and pods["head"] in account.pods
    assert not head.needed_after(11)


def test_a_worker_deletes_itself_with_its_own_key(account, pods, tmp_path, monkeypatch):
    own = next(key for key, pod_id in account._pod_keys.items() if pod_id == pods["worker"])
    environment = tmp_path / "environ"
    environment.write_bytes(f"RUNPOD_POD_ID={pods['worker']}\0RUNPOD_API_KEY={own}\0".encode())
    monkeypatch.setattr(node.environment, "__defaults__", (environment,))
    with socket.create_server(("127.0.0.1", 0)) as gcs:
        monkeypatch.setattr(watch.answers, "__defaults__", (gcs.getsockname()[1], 1.0))
        assert watch.answers("127.0.0.1")
    monkeypatch.setattr(watch, "INTERVAL_S", 0.1)
    watch.watch_head_from_worker("127.0.0.1", 0.5, account.url)
    assert pods["worker"] not in account.pods and pods["head"] in account.pods
    with pytest.raises(Exception, match="403"):
        Api(lambda: own, account.url).delete_pod(pods["head"])


def test_a_worker_without_a_gpu_that_works_deletes_itself_although_its_head_answers(account, monkeypatch, capsys):
    (registry.home() / watch.HOPELESS).write_text("GPU self-test: no NVIDIA driver")
    deleted = iter([False, True])
    monkeypatch.setattr(watch, "INTERVAL_S", 0.01)
    monkeypatch.setattr(watch, "answers", lambda host: True)
    monkeypatch.setattr(watch, "delete_this_pod", lambda base: next(deleted))
    watch.watch_head_from_worker("127.0.0.1", 600.0, account.url)
    assert not list(deleted) and "GPU self-test: no NVIDIA driver: this pod deletes itself" in capsys.readouterr().out


def test_a_pod_that_may_not_delete_itself_says_so_and_tries_again(account, pods, tmp_path, monkeypatch, capsys):
    environment = tmp_path / "environ"
    environment.write_bytes(f"RUNPOD_POD_ID={pods['worker']}\0RUNPOD_API_KEY=wrong\0".encode())
    monkeypatch.setattr(node.environment, "__defaults__", (environment,))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not watch.delete_this_pod(account.url)
    said = capsys.readouterr().out
    assert "401" in said and "runpodctl" in said


def test_a_shell_that_is_no_pod_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "environ").write_bytes(b"HOME=/root\0")
    monkeypatch.setattr(node.environment, "__defaults__", (tmp_path / "environ",))
    assert node.main(["ip"]) == 1
    assert capsys.readouterr().err == "altgrad: RUNPOD_POD_ID: missing: this is no pod of RunPod\n"
