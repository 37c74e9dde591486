"""What must hold when disks and deletions fail: nothing over a cap is created, and one stubborn pod saves no other."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path

import pytest
import yaml
from altgrad_cluster import checks, commands, keys, record, registry, watch
from altgrad_cluster.api import Api
from altgrad_cluster.naming import fingerprint
from altgrad_cluster.provider import RunPodNodeProvider
from altgrad_cluster.record import Damaged
from altgrad_cluster.spending import Limits, OverBudget, Purse
from conftest import POD, PUBLIC_KEY, WORKER
from fake_runpod import FakeRunPod, until
from ray.autoscaler.node_launch_exception import NodeLaunchException

KEY = fingerprint(PUBLIC_KEY)
HOUR = 3600.0
A_POD = {"id": "a", "name": "a", "cost": 2.0, "createdAt": "1970-01-01T00:00:00Z"}
"""2 USD an hour since the clock's zero"""


class Books:
    """Purses of one cluster on a head's disk and a volume, with a clock of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.disk, self.volume = folder / "head", folder / "volume"
        self.volume.mkdir()
        self.files = [self.disk / "s.json", self.disk / "s.bak", self.volume / ".altgrad/s.json"]

    def purse(self, **limits: float) -> Purse:
        """As a new process would have it."""
        limits = Limits(**limits) if limits else Limits(total=3.0)
        return Purse(self.files[0], limits, clock=lambda: self.now, copy=self.files[2])

    def after(self, hours: float, purse: Purse) -> float:
        self.now += hours * HOUR
        purse.observe([A_POD])
        return purse.spent()


@pytest.fixture
def books(tmp_path):
    return Books(tmp_path)


@pytest.fixture
def full(monkeypatch):
    """Makes a folder, a lock or whatever a call stands for fail as a broken disk does."""

    def fail(folder: Path, code: int) -> None:
        really = os.open

        def refuse(path, flags, *rest, **named):
            if Path(path).is_relative_to(folder) and flags & (os.O_WRONLY | os.O_RDWR):
                raise OSError(code, os.strerror(code), str(path))
            return really(path, flags, *rest, **named)

        monkeypatch.setattr(record.os, "open", refuse)

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOLCK, errno.EIO, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("which", ["volume", "disk"])
def test_a_broken_disk_is_said_once_and_no_cap_is_lost(books, full, caplog, monkeypatch, which, code):
    monkeypatch.setattr(record, "COPY_S", 0.0)
    purse = books.purse(total=3.0)
    books.after(0.5, purse)
    full(getattr(books, which), code)
    for _ in range(4):
        books.after(0.25, purse)
    assert purse.spent() == pytest.approx(3.0) and purse.is_exhausted
    with pytest.raises(OverBudget, match=r"\$3.00 spent of max_cost_total \$3.00"):
        purse.reserve("b", 0.1)
    assert [line.count(os.strerror(code)) for line in caplog.messages] == [1]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EIO])
def test_a_disk_without_locks_records_all_the_same(books, monkeypatch, caplog, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(record.fcntl, "flock", refuse)
    purse = books.purse()
    for _ in range(3):
        books.after(0.5, purse)
    assert books.purse().spent() == pytest.approx(3.0)
    assert len([line for line in caplog.messages if "can't be locked" in line]) == 1


TORN = ("", "{", '{"pods": {"a": {"at": 1, "us', "\0" * 4096, "[]", '{"pods": {"a": {"usd": "much"}}}', '{"other": 1}')


@pytest.mark.parametrize("text", TORN)
@pytest.mark.parametrize("torn", [[0], [0, 1], [1, 2], [0, 2]])
def test_a_torn_version_is_made_up_for_by_another(books, torn, text, monkeypatch):
    monkeypatch.setattr(record, "COPY_S", 0.0)
    purse = books.purse()
    books.after(0.5, purse)
    books.after(0.5, purse)
    for index in torn:
        books.files[index].write_text(text)
    later = books.purse()
    assert books.after(0.0, later) == pytest.approx(2.0)
    assert books.after(0.5, later) == pytest.approx(3.0) and later.is_exhausted


@pytest.mark.parametrize("text", TORN)
@pytest.mark.parametrize("present", [[0], [0, 1], [0, 1, 2], [2]])
def test_a_record_that_nobody_can_read_is_not_zero_dollars(books, present, text, caplog):
    for index in present:
        books.files[index].parent.mkdir(exist_ok=True)
        books.files[index].write_text(text)
    purse = books.purse()
    assert books.after(1.0, purse) == pytest.approx(2.0), "estimated from the pod's age"
    with pytest.raises(Damaged) as caught:
        purse.reserve("b", 0.1)
    said = str(caught.value)
    assert said.startswith(f"{books.files[0]}: the record of spending can't be read") and "\n" not in said
    assert "restore one, or delete all to count from the ages of the pods that are up" in said
    assert books.after(0.5, purse) == pytest.approx(3.0) and purse.is_exhausted
    assert all(books.files[index].read_text() == text for index in present), "left for a person to look at"
    books.purse(per_hour=5.0).reserve("b", 0.1)

    for file in books.files:
        file.unlink(missing_ok=True)
    with pytest.raises(OverBudget):
        purse.reserve("b", 0.1)
    books.after(0.0, purse)
    assert books.purse().spent() == pytest.approx(3.0)
    assert len([line for line in caplog.messages if line == said]) == 1


def test_a_file_that_breaks_under_a_running_process_is_written_anew(books):
    purse = books.purse()
    books.after(1.0, purse)
    for file in books.files[:2]:
        file.write_text("{")
    assert books.after(0.25, purse) == pytest.approx(2.5)
    purse.reserve("b", 0.1)
    assert books.purse().spent() == pytest.approx(2.5)


def test_a_new_head_takes_the_higher_of_its_own_record_and_the_copy(books):
    purse = books.purse()
    books.after(0.5, purse)
    for file in books.files[:2]:
        file.unlink(missing_ok=True)
    new = books.purse()
    assert new.spent() == pytest.approx(1.0)
    (books.disk / "s.json").write_text(json.dumps({"pods": {"a": {"at": 0.0, "usd": 0.25}, "z": {"usd": 1.5}}}))
    newer = books.purse()
    assert newer.spent() == pytest.approx(2.5)
    assert books.after(0.25, newer) == pytest.approx(3.0)


def test_two_processes_on_a_full_disk_count_the_same_hour_once(books, full):
    one, other = books.purse(), books.purse()
    for _ in range(2):
        books.after(0.25, one)
        assert books.after(0.0, other) == pytest.approx(one.spent())
    full(books.disk, errno.ENOSPC)
    books.after(0.25, one)
    assert books.after(0.25, other) == pytest.approx(2.0)
    assert books.after(0.0, one) == pytest.approx(2.0)


def test_a_full_volume_stops_neither_the_provider_nor_its_caps(account, provider, full, tmp_path):
    volume = {"id": "vol0altgrad", "path": str(tmp_path / "workspace"), "data_center": "EU-RO-1"}
    (tmp_path / "workspace").mkdir()
    full(tmp_path / "workspace", errno.ENOSPC)
    nodes = provider(network_volume=volume, max_cost_total=0.5)
    (pod_id,) = nodes.create_node(POD, WORKER, 1)
    account.pods[pod_id]["cost"] = 3600 * 10
    time.sleep(1.7)
    assert nodes.non_terminated_nodes({}) == [pod_id]
    with pytest.raises(NodeLaunchException, match="cost cap reached"):
        nodes.create_node(POD, WORKER, 1)
    assert account.count("POST") == 1


def test_a_torn_record_of_the_head_refuses_creation_in_one_line(account, provider):
    folder = registry.cluster_folder("one")
    (folder / "spending.json").write_text('{"pods": {"x": {"usd": 99')
    nodes = provider(max_cost_total=100)
    assert nodes.non_terminated_nodes({}) == []
    with pytest.raises(NodeLaunchException, match=r"spending.json: the record of spending can't be read.*delete all"):
        nodes.create_node(POD, WORKER, 1)
    assert account.count("POST") == 0


# One pod that can't be deleted


def watch_of(account: FakeRunPod, purse: Purse, now: list[float], **named: object) -> watch.HeadWatch:
    config = {"cluster_name": "one", "provider": {"public_key": PUBLIC_KEY, "head_idle_minutes": 10}}
    api = Api(lambda: account.key, account.url, sleep=lambda seconds: None)
    return watch.HeadWatch(config, api, purse, busy=lambda: False, clock=lambda: now[0], **named)


@pytest.fixture
def pods(account):
    kinds = ("head", "worker", "worker", "worker")
    ids = [account.add_pod(f"ag--one--{KEY}--{kind}--{kind}--{n}", status="RUNNING") for n, kind in enumerate(kinds)]
    return {"head": ids[0], "workers": ids[1:]}


STUBBORN = [(which, status) for which in (0, 1, 2) for status in (403, 500)]


@pytest.mark.parametrize(("which", "status"), STUBBORN)
def test_a_spent_budget_deletes_all_that_can_be(account, pods, tmp_path, which, status, capsys):
    stubborn = pods["workers"][which]
    account.faults.undeletable = {stubborn: status}
    purse, now = Purse(tmp_path / "s", Limits(total=1.0)), [0.0]
    head = watch_of(account, purse, now)
    account.pods[stubborn]["cost"] = 3600 * 1e4
    head.look()
    time.sleep(0.01)
    assert head.look() and set(account.pods) == {pods["head"], stubborn}
    with pytest.raises(OverBudget):
        purse.reserve("another", 0.01)
    assert f"pod {stubborn} can't be deleted now" in capsys.readouterr().out
    account.faults.undeletable = {}
    assert head.look() and set(account.pods) == {pods["head"]}


def test_a_storm_of_429_delays_the_end_of_a_spent_budget_and_no_more(account, pods, tmp_path):
    purse, now = Purse(tmp_path / "s", Limits(total=1.0)), [0.0]
    account.faults.undeletable = dict.fromkeys(pods["workers"][:2], 429)
    account.pods[pods["workers"][0]]["cost"] = 3600 * 1e4
    head = watch_of(account, purse, now)
    head.look()
    time.sleep(0.01)
    head.look()
    assert set(account.pods) == {pods["head"], *pods["workers"][:2]}
    with pytest.raises(OverBudget):
        purse.reserve("another", 0.01)
    account.faults.undeletable = {}
    until(lambda: head.look() and set(account.pods) == {pods["head"]}, 30, "the storm is over")
    assert account.endings()["DELETE 429"] >= 2 and account.count("POST") == 0


def test_the_head_waits_for_its_last_workers_and_not_for_ever(account, pods, tmp_path, capsys):
    stubborn = pods["workers"][0]
    account.faults.undeletable = {stubborn: 500}
    now = [0.0]
    head = watch_of(account, Purse(tmp_path / "s", Limits()), now)
    assert not head.delete_all() and set(account.pods) == {pods["head"], stubborn}
    now[0] += watch.LAST_TRIES_S - 1
    assert not head.delete_all() and pods["head"] in account.pods
    now[0] += 2
    assert head.delete_all() and set(account.pods) == {stubborn}
    assert f"left behind, for RunPod does not delete them: {stubborn}" in capsys.readouterr().out


def test_a_head_that_can_t_be_deleted_tries_again(account, pods, tmp_path):
    account.faults.undeletable = {pods["head"]: 500}
    head = watch_of(account, Purse(tmp_path / "s", Limits()), [0.0])
    assert not head.delete_all() and set(account.pods) == {pods["head"]}
    account.faults.undeletable = {}
    assert head.delete_all() and not account.pods


def test_a_pod_that_the_autoscaler_could_not_delete_keeps_no_head_up(account, pods, tmp_path):
    now, unwilling = [0.0], set(pods["workers"])
    head = watch_of(account, Purse(tmp_path / "s", Limits()), now, unwilling=lambda: unwilling)
    now[0] += 601
    assert not head.look()
    unwilling = set(pods["workers"][:2])
    assert head.look(), "one of the three is needed"


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize("on_head", [True, False])
def test_terminate_nodes_deletes_all_that_can_be_and_then_complains(account, provider, status, on_head):
    nodes = provider()
    ids = list(nodes.create_node(POD, WORKER, 3))
    account.faults.undeletable = {ids[0]: status}
    if not on_head:
        config = {"api_base": account.url, "public_key": PUBLIC_KEY}
        nodes = RunPodNodeProvider(config, "one", api=Api(lambda: account.key, account.url, sleep=lambda seconds: None))
    with pytest.raises(
        (SystemExit, Exception), match=f"pods {ids[0]} could not be deleted, all others were .*{status}"
    ):
        nodes.terminate_nodes(ids)
    assert set(account.pods) == {ids[0]}
    assert set(nodes._undeleted.read()) == {ids[0]}, "the watch reads it"
    account.faults.undeletable = {}
    nodes.terminate_nodes(ids)
    assert not account.pods and not nodes._undeleted.read()


def test_a_stopped_pod_that_can_t_be_deleted_stands_in_no_other_s_way(account, provider, caplog):
    caplog.set_level(logging.WARNING)
    nodes = provider()
    ids = list(nodes.create_node(POD, WORKER, 3))
    until(lambda: all(account.pods[i]["status"] == "RUNNING" for i in ids), 5, "they run")
    for pod_id in ids[:2]:
        account.interrupt(pod_id)
    account.faults.undeletable = {ids[0]: 403}
    until(lambda: nodes.non_terminated_nodes({}) == [ids[2]] and set(account.pods) == {ids[0], ids[2]}, 10, "reaped")
    account.faults.undeletable = {}
    until(lambda: nodes.non_terminated_nodes({}) and set(account.pods) == {ids[2]}, 10, "tried again")


@pytest.fixture
def gc(account, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RUNPOD_API_KEY", account.key)
    monkeypatch.setenv("RUNPOD_API_BASE", account.url)
    (tmp_path / "c.yaml").write_text("{cluster_name: one, provider: {}}")

    def said(*words: str) -> tuple[int, str, str]:
        code = commands.main(["gc", str(tmp_path / "c.yaml"), *words])
        return (code, *capsys.readouterr())

    return said


def test_gc_deletes_what_is_ours_and_lists_what_is_not(account, gc):
    own = fingerprint(keys.ssh_key("one")[1])
    mine, stubborn, more = (account.add_pod(f"ag--one--{own}--worker--worker--{n}", status="RUNNING") for n in range(3))
    namesake = account.add_pod("ag--one--00000000--worker--worker--1", status="RUNNING")
    other = account.add_pod(f"ag--other--{own}--worker--worker--1", status="RUNNING")
    code, out, err = gc()
    assert code == 1 and out.startswith("3 pods without a head") and "gc --yes deletes them" in err
    ours, _, others = out.partition("not yours")
    assert all(pod in ours for pod in (mine, stubborn, more)) and all(pod in others for pod in (namesake, other))
    assert len(account.pods) == 5
    account.faults.undeletable = {stubborn: 403}
    code, out, err = gc("--yes")
    assert code == 1 and set(account.pods) == {stubborn, namesake, other}
    assert f"altgrad: pod {stubborn} can't be deleted now" in err and f"deleted {more}" in out
    account.faults.undeletable = {}
    assert gc("--yes")[0] == 0 and set(account.pods) == {namesake, other}
    assert gc("--yes")[0] == 0 and set(account.pods) == {namesake, other}
    assert gc("--all")[0] == 1 and gc("--all", "--yes")[0] == 0 and not account.pods


def test_a_laptop_that_never_started_the_cluster_owns_none_of_it(account, gc):
    pod_id = account.add_pod(f"ag--one--{KEY}--worker--worker--1", status="RUNNING")
    code, out, _ = gc("--yes")
    assert code == 0 and pod_id in account.pods and "not yours" in out


# Caps that a file doesn't state


@pytest.mark.parametrize(
    ("without", "lines"),
    [
        ((), []),
        (
            ("max_cost_per_hour",),
            ["provider.max_cost_per_hour: missing: nothing limits what this cluster costs; 15 USD"],
        ),
        (("max_cost_total",), ["provider.max_cost_total: missing: nothing limits what this cluster costs; 150 USD is"]),
        (("max_cost_per_hour", "max_cost_total"), ["provider.max_cost_per_hour: miss", "provider.max_cost_total: mi"]),
    ],
)
def test_a_file_without_caps_is_told_what_they_could_be(account, without, lines):
    """At most 4 workers at 3.59 and a head at 0.46: 14.82 USD an hour."""
    config = yaml.safe_load((Path(checks.__file__).parents[1] / "runpod.yaml").read_text())
    for name in without:
        config["provider"].pop(name)
    found = list(checks.cap_problems(config, Api(lambda: account.key, account.url)))
    assert len(found) == len(lines) and all(map(str.startswith, found, lines)), found
