"""What goes wrong in a cluster's life, one after another on one cluster, on a simulated RunPod.

The tests of this file go on from each other: a cluster takes half a minute to start.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_runpod import FakeRunPod, until
from laptop import ROOT, Laptop, ledger
from pod_namespaces import OUTSIDE, Namespaces, run, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
STEPS = 1500
SWEEP = {"name": "drill", "formats": ["E5M2"], "optimizers": ["adamw"], "seeds": 2, "steps": STEPS, "guards": "off",
         "model": {"layers": 1, "heads": 1, "width": 16, "block": 16}, "data": {"batch": 2, "eval_batches": 1},
         "log_interval": 10, "eval_interval": 500, "checkpoint_interval": 10}
ONE_GPU_EACH = ("import ray, time; ray.init(); f = ray.remote(num_gpus=1)(lambda: time.sleep(3) or "
                "ray.util.get_node_ip_address()); print(sorted(set(ray.get([f.remote() for _ in range(2)]))))")


class Cluster:
    """The account, the laptop and the file of one cluster that is up."""

    def __init__(self, folder: Path, pods: Namespaces, account: FakeRunPod) -> None:
        self.pods, self.account, self.folder = pods, account, folder
        self.laptop = Laptop(folder / "laptop", account)
        self.file = self.laptop.file(cluster_name="drill", idle_timeout_minutes=0.7, orphan_minutes=0.75)
        self.out = pods.folder / "volume" / "runs" / "drill"

    @property
    def workers(self) -> list[str]:
        return self.account.of_kind("worker")

    @property
    def head(self) -> str:
        (found,) = self.account.of_kind("head")
        return found

    def status(self) -> str:
        return self.laptop.on_head(self.file, "ray status -v")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("drills")
    pods = Namespaces(folder / "pods", ROOT)
    with pods.ready(), FakeRunPod(pods, boot_s=1).serving(OUTSIDE) as account:
        made = Cluster(folder, pods, account)
        made.laptop.run("ray", "up", "-y", made.file, "--disable-usage-stats", timeout=240)
        yield made


def test_a_wrong_key_ends_ray_up_at_once_with_one_line(cluster: Cluster, capsys) -> None:
    stranger = Laptop(cluster.folder / "stranger", cluster.account, key="rpa_wrong")
    before = len(cluster.account.requests)
    said = stranger.run("ray", "up", "-y", stranger.file(), "--disable-usage-stats", check=False)
    assert said.splitlines()[-1] == ("altgrad: RUNPOD_API_KEY: RunPod refuses this key (401): a valid API key of the "
                                     "account is expected")
    assert "Traceback" not in said and cluster.account.count("POST") == 1
    refused = [status for _, _, _, status in cluster.account.requests[before:] if status == 401]
    assert len(refused) == 1
    with capsys.disabled():
        print(f"\n  a wrong key: {stranger.seconds['ray up']:.1f} s")


def test_a_sweep_outlives_a_cap_full_candidates_a_lost_answer_a_storm_and_a_killed_worker(cluster: Cluster) -> None:
    account, laptop = cluster.account, cluster.laptop
    spec = cluster.pods.folder / "volume" / "drill.json"
    spec.write_text(json.dumps(SWEEP))
    account.pods[cluster.head]["cost"] = 100.0
    account.faults.no_capacity = {"NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"}
    with laptop.tunnel(cluster.file) as dashboard:
        said = laptop.run("ray", "job", "submit", "--no-wait", "--address", dashboard, "--working-dir", ".", "--",
                          "python3", "-m", "altgrad", "run", "/workspace/drill.json", "--address", "auto",
                          "--gpus-per-trial", "1", "--max-concurrent", "2", "--out", "/workspace/runs/drill")
        job = re.search(r"raysubmit_\w+", said)[0]

        def job_status() -> str:
            return laptop.run("ray", "job", "status", "--address", dashboard, job)

        # The cap: nothing is asked for, the reason can be read, the sweep waits.
        refused = until(lambda: "cost cap reached" in (said := cluster.status()) and said, 90, "the status says why")
        assert "$100.00/h now and" in refused and "would exceed max_cost_per_hour $15.00" in refused
        assert "cost cap reached" in laptop.on_head(cluster.file, "cat /tmp/ray/session_latest/logs/monitor.log")
        assert "cost cap reached" in laptop.run("altgrad", "cluster", "status", cluster.file)
        assert account.count("POST") == 1 and "running" in job_status().lower() and not cluster.workers

        # The cap is lifted; the first candidates have no room, and an answer gets lost.
        account.faults.lost_answers = 1
        account.pods[cluster.head]["cost"] = 0.25
        until(lambda: len(cluster.workers) == 2, 120, "two workers")
        assert {account.pods[worker]["gpu"]["id"] for worker in cluster.workers} == {"NVIDIA H200"}
        assert account.endings()["POST 500"] == 1 and account.endings()["POST 201"] == 2

        # The quota is spent for a while, in the middle of everything.
        account.faults.rate_limited_until = time.monotonic() + 8

        # A worker is taken away while it trains.
        busy = _pod_that_trains(cluster, until(lambda: _half_way(cluster.out), 180, "a trial is half way"))
        account.interrupt(busy)
        until(lambda: busy not in account.pods, 60, "the interrupted worker is deleted")
        until(lambda: len(cluster.workers) == 2, 120, "it is replaced")
        until(lambda: (cluster.out / "report/report.html").exists(), 400, "the sweep ends with its report")
        until(lambda: "running" not in job_status().lower(), 60, "the job ends")
        assert "succeeded" in job_status(), laptop.run("ray", "job", "logs", "--address", dashboard, job)[-4000:]
    found = ledger(cluster.out)
    assert found["endings"] == ["done"] * 4 and set(found["rows"].values()) == {STEPS}
    assert all(steps == list(range(1, STEPS + 1)) for steps in found["steps"].values()), "the ledger is not whole"
    made = account.endings()
    assert made["POST 201"] + made["POST 500"] == 4 and made["GET 429"] > 0 and not account.violations


def test_nothing_but_22_is_open_and_secrets_are_only_where_they_belong(cluster: Cluster) -> None:
    account, laptop, pods = cluster.account, cluster.laptop, cluster.pods
    _keep_two_workers_busy(cluster)
    nodes = [cluster.head, *until(lambda: len(cluster.workers) == 2 and cluster.workers, 120, "two workers")]
    for pod_id in nodes:
        assert _open_ports(pods.public_ip(pod_id)) == [22], pod_id
    token, head_ip = (laptop.home / ".ray/auth_token").read_text(), _private(cluster, cluster.head)
    probe = ("import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('LET IN')")
    for pod_id in nodes:
        for mode, given in (("disabled", ""), ("token", "0" * 64)):
            said = _in_pod(cluster, pod_id, "env", f"RAY_AUTH_MODE={mode}", f"RAY_AUTH_TOKEN={given}", "timeout", "60",
                           "python3", "-c", probe, f"{head_ip}:6379")
            assert "LET IN" not in said, (pod_id, mode)
    for headers, status in (((), 401), (("-H", f"Authorization: Bearer {'0' * 64}"), 403),
                            (("-H", f"Authorization: Bearer {token}"), 200)):
        code = _in_pod(cluster, cluster.head, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *headers,
                       "http://127.0.0.1:8265/api/jobs/")
        assert code == str(status), headers
    for worker in nodes[1:]:
        assert "refused" in _in_pod(cluster, worker, "curl", "-sS", "-m", "5", f"http://{head_ip}:8265/api/jobs/")
    _check_secrets(cluster, nodes, token)
    assert not re.search(account.key, "".join(map(str, account.bodies)))


def test_what_the_head_lost_the_doctor_finds(cluster: Cluster) -> None:
    assert "trouble" not in cluster.laptop.run("altgrad", "cluster", "doctor", cluster.file)
    provider = cluster.pods.root(cluster.head) / "home/altgrad/cluster/altgrad_cluster/provider.py"
    provider.rename(provider.with_suffix(".away"))
    said = cluster.laptop.run("altgrad", "cluster", "doctor", cluster.file, check=False)
    provider.with_suffix(".away").rename(provider)
    assert "altgrad_cluster.provider: can't be imported here" in said


def test_a_restarted_head_adopts_its_workers(cluster: Cluster) -> None:
    _keep_two_workers_busy(cluster)
    before = set(until(lambda: len(cluster.workers) == 2 and cluster.workers, 120, "two workers"))
    posts = cluster.account.count("POST")
    cluster.laptop.run("ray", "up", "-y", "--restart-only", cluster.file, "--disable-usage-stats", timeout=240)
    said = cluster.laptop.on_head(cluster.file, f'python3 -c "{ONE_GPU_EACH}"', timeout=240)
    assert str(sorted(_private(cluster, worker) for worker in before)) in said
    assert set(cluster.workers) == before and cluster.account.count("POST") == posts


def test_workers_delete_themselves_when_the_head_is_gone(cluster: Cluster, capsys) -> None:
    _keep_two_workers_busy(cluster)
    until(lambda: len(cluster.workers) == 2, 120, "two workers")
    cluster.account.vanish(cluster.head)
    started, deletions = time.monotonic(), cluster.account.count("DELETE")
    until(lambda: not cluster.account.pods, 150, "the workers delete themselves")
    assert cluster.account.count("DELETE") == deletions + 2
    with capsys.disabled():
        print(f"\n  orphans gone after {time.monotonic() - started:.0f} s, 45 s were set")
    said = cluster.laptop.run("altgrad", "cluster", "gc", cluster.file)
    assert "nothing is left over" in said and not cluster.account.violations


def _keep_two_workers_busy(cluster: Cluster) -> None:
    """Two GPUs are wanted for a while, so that nothing is idle."""
    keep = ("import ray, time; ray.init(); f = ray.remote(num_gpus=1)(lambda: time.sleep(45)); "
            "ray.get([f.remote() for _ in range(2)])")
    cluster.laptop.on_head(cluster.file, f"nohup python3 -c '{keep}' >/dev/null 2>&1 & sleep 1")


def _half_way(out: Path) -> str | None:
    """A trial that has a checkpoint and some steps, and has not ended."""
    for rows in out.glob("trials/*/metrics.jsonl"):
        is_open = (rows.parent / "checkpoint").exists() and not (rows.parent / "outcome.json").exists()
        if is_open and rows.read_text().count("\n") >= 30:
            return rows.parent.name
    return None


def _private(cluster: Cluster, pod_id: str) -> str:
    return str(cluster.account.pods[pod_id]["globalNetworking"]["ip"])


def _in_pod(cluster: Cluster, pod_id: str, *words: str) -> str:
    """Output of a command in the pod, run by its own login."""
    direct = cluster.account.pods[pod_id]["ssh"]["direct"]
    key = cluster.laptop.home / ".altgrad/clusters/drill/id_ed25519"
    command = " ".join(f"'{word}'" if re.search(r"[^\w./:=-]", word) else word for word in words)
    done = subprocess.run(
        ["ssh", "-i", str(key), "-p", str(direct["port"]), "-o", "StrictHostKeyChecking=no", "-o",
         "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", f"root@{direct['host']}", f". ~/.bashrc; {command}"],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    return (done.stdout + done.stderr).strip()


def _pod_that_trains(cluster: Cluster, trial: str) -> str:
    """The pod in which a process has this trial's folder open."""
    for worker in cluster.workers:
        found = subprocess.run(["ip", "netns", "pids", cluster.pods.namespace(worker)], capture_output=True, text=True)
        for pid in found.stdout.split():
            for link in Path(f"/proc/{pid}/fd").glob("*"):
                try:
                    if trial in str(link.readlink()):
                        return worker
                except OSError:
                    continue
    raise AssertionError(f"no pod trains {trial}")


def _open_ports(address: str) -> list[int]:
    """Every TCP port of the address that accepts a connection from here."""
    def accepts(port: int) -> bool:
        with socket.socket() as one:
            one.settimeout(5)
            return one.connect_ex((address, port)) == 0
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return [port for port, is_open in enumerate(pool.map(accepts, range(1, 65536)), 1) if is_open]


def _check_secrets(cluster: Cluster, nodes: list[str], token: str) -> None:
    """Key and token stand in their own files, of mode 0600, and in no other file, environment or command line."""
    laptop, pods, key = cluster.laptop, cluster.pods, cluster.account.key
    homes = [pods.root(pod_id) / "home" for pod_id in nodes]
    keys = {laptop.home / ".altgrad/clusters/drill/runpod_api_key", homes[0] / ".altgrad/runpod_api_key"}
    tokens = {laptop.home / ".ray/auth_token", *(home / ".ray/auth_token" for home in homes)}
    for secret, places in ((key, keys), (token, tokens)):
        found = subprocess.run(["grep", "-rlaF", "--", secret, str(cluster.folder), str(ROOT / "cluster")],
                               capture_output=True, text=True).stdout.split("\n")
        assert {Path(path) for path in found if path} == places
        assert all(place.stat().st_mode & 0o777 == 0o600 for place in places)
    for pod_id in nodes:
        for pid in run("ip", "netns", "pids", pods.namespace(pod_id)).split():
            for file in ("environ", "cmdline"):
                path = Path(f"/proc/{pid}/{file}")
                text = path.read_bytes() if path.exists() else b""
                assert key.encode() not in text and token.encode() not in text, (pod_id, text[:200])
