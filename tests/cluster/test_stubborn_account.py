"""An account that answers for hours with nothing but refusals: whatever can still be deleted is, the head at last."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from altgrad_cluster import launcher, registry, watch
from altgrad_cluster.api import Api
from altgrad_cluster.errors import ApiError
from altgrad_cluster.naming import PodName, fingerprint
from altgrad_cluster.spending import Limits, Purse
from conftest import POD, PUBLIC_KEY, WORKER
from ray.autoscaler.node_launch_exception import NodeLaunchException

HOUR = 3600.0


class Account:
    """Four pods at $3/h and a clock; `limited` pods answer a deletion with 429, a `deaf` account all with 401."""

    def __init__(self, limited: tuple[str, ...] = (), retry_after: int = 60, *, deaf: bool = False) -> None:
        self.now, self.limited, self.retry_after, self.deaf = 0.0, limited, retry_after, deaf
        self.tried: list[str] = []
        kinds = {"A": "worker", "B": "worker", "C": "worker", "H": "head"}
        self.pods = {
            pod_id: {
                "id": pod_id,
                "name": str(PodName.fresh("c", fingerprint(PUBLIC_KEY), kind, kind)),
                "status": "RUNNING",
                "cost": 3.0,
                "createdAt": "2020-01-01T00:00:00Z",
            }
            for pod_id, kind in kinds.items()
        }

    def answer(self, request, timeout):
        if self.deaf:
            return 401, {}, b'{"title": "Unauthorized"}'
        if request.method == "GET":
            return 200, {}, json.dumps({"pods": list(self.pods.values())}).encode()
        pod_id = request.full_url.rsplit("/", 1)[1]
        self.tried.append(pod_id)
        if pod_id in self.limited:
            return 429, {"retry-after": str(self.retry_after)}, b"{}"
        self.pods.pop(pod_id, None)
        return 204, {}, b""

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def leave(self) -> bool:
        """The pod deletes itself with its own key, and its workers no longer hear a head."""
        self.pods.clear()
        return True

    def run(self, tmp_path: Path, hours: float, *, busy: bool = False, total: float | None = None) -> bool:
        """Runs the head's watch for so long; whether the head is needed at the end."""
        api = Api(lambda: "key", transport=self.answer, clock=lambda: self.now, sleep=self.sleep)
        purse = Purse(tmp_path / "s", Limits(total=total), clock=lambda: 1.6e9 + self.now)
        config = {"cluster_name": "c", "provider": {"public_key": PUBLIC_KEY, "head_idle_minutes": 30}}
        named = {"busy": lambda: busy, "unwilling": lambda: {"A"}, "leave": self.leave, "clock": lambda: self.now}
        head = watch.HeadWatch(config, api, purse, **named)
        is_needed = True
        while is_needed and self.now < hours * HOUR:
            self.now += 30
            with watch.logged():
                is_needed = head.look()
        while not is_needed and self.pods and self.now < hours * HOUR:
            with watch.logged():
                if head.delete_all():
                    break
            self.now += 30
        return is_needed


@pytest.mark.parametrize("retry_after", [5, 60, 61, 90, 7200])
@pytest.mark.parametrize("limited", ["A", "B"])
def test_one_pod_that_is_limited_keeps_no_other_alive(tmp_path, limited, retry_after):
    account = Account((limited,), retry_after)
    assert not account.run(tmp_path, 24, total=1.0)
    assert set(account.pods) <= {limited} and account.tried.count(limited) >= 1


@pytest.mark.parametrize(("busy", "total", "is_needed"), [(False, None, False), (True, None, True), (True, 1.0, True)])
def test_an_account_that_hears_the_key_no_more_ends_with_the_head(tmp_path, busy, total, is_needed):
    account = Account(deaf=True)
    assert account.run(tmp_path, 3, busy=busy, total=total) == is_needed
    assert bool(account.pods) == is_needed


def test_what_the_pods_cost_is_counted_on_while_they_can_t_be_listed(tmp_path):
    account = Account()
    hears, deaf_after = account.answer, 60.0

    def answer(request, timeout):
        account.deaf = account.now > deaf_after
        return hears(request, timeout)

    account.answer = answer
    # Pods from 2020 would be dear at once.
    for pod in account.pods.values():
        pod["createdAt"] = "2020-09-13T12:26:40Z"
    assert not account.run(tmp_path, 24, busy=True, total=24.0)
    assert account.now < 3 * HOUR and not account.pods


@pytest.mark.parametrize(
    "link", ["<http://evil.invalid/v2/pods>", "<//evil.invalid/p>", "<.evil.invalid/p>", "<x:http://e.invalid/>"]
)
def test_no_page_of_another_host_is_asked_for(link):
    asked = []

    def answer(request, timeout):
        asked.append(request.full_url)
        return 200, {"link": f'{link}; rel="next"'} if len(asked) == 1 else {}, b'{"pods": []}'

    api = Api(lambda: "key", "https://api.invalid", transport=answer)
    try:
        list(api.pods())
    except ApiError as error:
        assert "is not followed" in str(error)
    assert all(url.startswith("https://api.invalid/") for url in asked)


@pytest.mark.parametrize("link", ["</v2/pods?page=2>", "<https://api.invalid/v2/pods?page=2>", "<?page=2>"])
def test_a_page_of_the_same_host_is(link):
    asked = []

    def answer(request, timeout):
        asked.append(request.full_url)
        return 200, {"link": f'{link}; rel="next"'} if len(asked) == 1 else {}, b'{"pods": []}'

    list(Api(lambda: "key", "https://api.invalid", transport=answer).pods())
    assert asked[1] == "https://api.invalid/v2/pods?page=2"


def test_letters_that_no_locale_has_do_not_end_the_watch(capsys):
    with watch.logged():
        raise ApiError("GET /v2/pods", 500, "a smile cut off \ud83d, and é")
    assert "a smile cut off" in capsys.readouterr().out


def test_a_full_disk_of_the_head_pays_for_no_pod_twice(account, provider, monkeypatch):
    nodes = provider()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(registry.LockedFile, "change", refuse)
    assert len(nodes.create_node(POD, WORKER, 1)) == 1 and account.count("POST") == 1


def test_a_lost_answer_is_remembered_although_the_disk_is_full(account, provider, monkeypatch):
    nodes = provider()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(registry.LockedFile, "change", refuse)
    monkeypatch.setattr(launcher, "LOOKS", (0.0,))
    account.faults.lost_answers, account.faults.hidden_for = 1, 3600.0
    for _ in range(2):
        with pytest.raises(NodeLaunchException):
            nodes.create_node(POD, WORKER, 1)
    assert account.count("POST") == 1, "one creation whose answer was lost, and no second beside it"


def test_a_new_watch_counts_on_what_the_last_one_saw(tmp_path):
    now = [1.6e9]
    pod = {"id": "A", "name": "a", "cost": 3.0, "createdAt": "2020-09-13T12:26:40Z"}
    Purse(tmp_path / "s", Limits(), clock=lambda: now[0]).observe([pod])
    now[0] += 2 * HOUR
    after = Purse(tmp_path / "s", Limits(), clock=lambda: now[0])
    after.count_on()
    after.count_on()
    assert after.spent() == pytest.approx(6.0)
    now[0] += HOUR
    after.observe([pod])
    assert after.spent() == pytest.approx(9.0)
