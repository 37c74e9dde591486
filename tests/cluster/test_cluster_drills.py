"""What goes wrong in a cluster's life, one after another on one cluster, on a simulated RunPod.

The tests of this file go on from each other: a cluster takes half a minute to start.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from altgrad_cluster.api import Api
from altgrad_cluster.provider import RunPodNodeProvider
from conftest import PUBLIC_KEY, WORKER
from drill_cluster import (
    ASK_CONTROL,
    ASK_RAYLETS,
    Cluster,
    answers_to_strangers,
    bytes_of,
    full_disk,
    half_way,
    in_pod,
    one_json,
    open_ports,
    private,
    trains,
    want_two_workers,
)
from fake_runpod import FakeRunPod, until
from laptop import ROOT, Laptop, ledger
from pod_namespaces import OUTSIDE, Namespaces, run, why_not
from smallest import SMALLEST

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
STEPS = 600
NODE = {"image": "runpod/pytorch:x", "gpus": ["NVIDIA L4"], "data_centers": ["EU-RO-1"]}
SWEEP = SMALLEST | {"name": "drill", "seeds": 1, "steps": STEPS}
ONE_GPU_EACH = (
    "import ray, time; ray.init(); f = ray.remote(num_gpus=1)(lambda: time.sleep(3) or "
    "ray.util.get_node_ip_address()); print(sorted(set(ray.get([f.remote() for _ in range(2)]))))"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("drills")
    pods = Namespaces(folder / "pods", ROOT)
    full = pods.folder / "volume/.altgrad"
    with pods.ready(), full_disk(full), FakeRunPod(pods, boot_s=1).serving(OUTSIDE) as account:
        made = Cluster(folder, pods, account)
        made.laptop.run("ray", "up", "-y", made.file, "--disable-usage-stats", timeout=240)
        yield made


def test_a_wrong_key_ends_ray_up_at_once_with_one_line(cluster: Cluster, capsys) -> None:
    stranger = Laptop(cluster.folder / "stranger", cluster.account, key="rpa_wrong")
    before = len(cluster.account.requests)
    said = stranger.run("ray", "up", "-y", stranger.file(), "--disable-usage-stats", check=False)
    assert said.splitlines()[-1] == (
        "altgrad: RUNPOD_API_KEY: RunPod refuses this key (401): a valid API key of the account is expected"
    )
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
        said = laptop.run(
            "ray",
            "job",
            "submit",
            "--no-wait",
            "--address",
            dashboard,
            "--working-dir",
            ".",
            "--",
            "python3",
            "-m",
            "altgrad",
            "run",
            "/workspace/drill.json",
            "--address",
            "auto",
            "--gpus-per-trial",
            "1",
            "--max-concurrent",
            "1",
            "--out",
            "/workspace/runs/drill",
        )
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
        (first,) = until(lambda: cluster.workers, 120, "a worker")
        assert account.pods[first]["gpu"]["id"] == "NVIDIA H200"
        until(lambda: account.endings()["POST 500"] == 1, 10, "its answer is lost")

        # The quota is spent for a while, in the middle of everything.
        account.faults.rate_limited_until = time.monotonic() + 8

        # A worker is taken away while it trains.
        trial = until(lambda: half_way(cluster.out), 180, "a trial is half way")
        assert cluster.workers == [first]
        account.interrupt(first)
        until(lambda: first not in account.pods, 60, "the interrupted worker is deleted")
        (second,) = until(lambda: cluster.workers, 120, "it is replaced")
        until(lambda: account.pods[second]["status"] == "RUNNING", 60, "the new pod runs")
        until(lambda: trains(cluster, second, trial), 180, "the trial goes on, on the new pod", step=0.05)
        until(lambda: (cluster.out / "report/report.html").exists(), 400, "the sweep ends with its report")
        until(lambda: "running" not in job_status().lower(), 60, "the job ends")
        assert "succeeded" in job_status(), laptop.run("ray", "job", "logs", "--address", dashboard, job)[-4000:]
    found = ledger(cluster.out)
    assert found["endings"] == ["done"] * 2 and set(found["rows"].values()) == {STEPS}
    assert all(steps == list(range(1, STEPS + 1)) for steps in found["steps"].values()), "the ledger is not whole"
    made = account.endings()
    assert made["POST 500"] == 1 and made["POST 201"] == 2, "the head, the first worker and its replacement"
    assert made["GET 429"] > 0 and not account.violations


def test_spending_is_recorded_although_the_volume_is_full(cluster: Cluster) -> None:
    said = cluster.laptop.run("altgrad", "cluster", "cost", cluster.file)
    assert "recorded by the head" in said and float(re.search(r"spent  \$([\d.]+)", said)[1]) > 0, said
    log = in_pod(cluster, cluster.head, "cat", "/root/.altgrad/watch.log")
    assert "spending can't be copied there (No space left on device)" in log and "Traceback" not in log


def test_a_pod_that_no_set_up_reaches_deletes_itself(cluster: Cluster, capsys) -> None:
    """As when the laptop or the head is lost between the creation and the first command."""
    account, started = cluster.account, time.monotonic()
    config = {"type": "external", "api_base": account.url, "public_key": PUBLIC_KEY, "set_up_minutes": 0.1}
    lost = RunPodNodeProvider(config, "lost", api=Api(lambda: account.key, account.url))
    (pod_id,) = lost.create_node(NODE, WORKER, 1)
    until(lambda: account.pods[pod_id]["status"] == "RUNNING", 30, "the pod runs")
    until(lambda: pod_id not in account.pods, 40, "the pod deletes itself")
    assert (time.monotonic() - started) > 6
    with capsys.disabled():
        print(f"\n  a pod without a set-up gone after {time.monotonic() - started:.0f} s, 6 s were set")


def test_a_worker_whose_gpu_fails_its_test_never_joins(cluster: Cluster, capsys) -> None:
    cluster.pods.broken_gpus, marks = 1, [time.monotonic()]
    want_two_workers(cluster)
    (broken,) = until(lambda: cluster.pods.broken, 30, "a worker without a GPU that works")
    gpu = cluster.account.pods[broken]["gpu"]["id"]
    marks.append(time.monotonic())
    until(lambda: broken not in cluster.account.pods, 120, "it is deleted")
    marks.append(time.monotonic())
    until(lambda: "2.0 GPU" in cluster.status(), 180, "Ray runs on two others", step=2)
    marks.append(time.monotonic())
    with capsys.disabled():
        print("\n  a broken GPU: created, deleted, replaced after", *(f"{mark - marks[0]:.0f} s" for mark in marks[1:]))
    assert broken not in cluster.workers and len(cluster.workers) == 2
    newest = cluster.account.bodies[-1]
    assert newest["gpu"]["id"] != gpu, "the same machine would be rented again"
    ended = bytes_of(cluster.pods.root(broken) / "home/.altgrad/watch.log").decode()
    assert ": this pod deletes itself" in ended and "GPU self-test" in ended
    log = cluster.laptop.on_head(cluster.file, "cat /tmp/ray/session_latest/logs/monitor.*")
    assert "GPU self-test: 1 GPU asked for, none usable on" in log
    # A pod with a watch outlives the time in which one without deletes itself.
    until(lambda: time.monotonic() - cluster.started > 60 * cluster.set_up_minutes + 10, 60, "that time is over")
    assert in_pod(cluster, cluster.head, "cat", "/root/.altgrad/watch.pid").isdigit()


def test_nothing_but_22_is_open_from_outside(cluster: Cluster) -> None:
    for pod_id in (cluster.head, *want_two_workers(cluster)):
        assert open_ports(cluster.pods.public_ip(pod_id)) == [22], pod_id


def test_nothing_answers_without_the_token_from_inside(cluster: Cluster) -> None:
    workers = sorted(want_two_workers(cluster))
    until(lambda: "2.0 GPU" in cluster.status(), 120, "Ray runs on both", step=2)
    token, head_ip = (cluster.laptop.home / ".ray/auth_token").read_text(), private(cluster, cluster.head)
    tokens = {"none": "", "wrong": "0" * 64, "right": token}

    # The head's control service, with Ray's own client, from another pod.
    for name, given in tokens.items():
        mode = "disabled" if name == "none" else "token"
        said = in_pod(
            cluster,
            workers[0],
            "env",
            f"RAY_AUTH_MODE={mode}",
            f"RAY_AUTH_TOKEN={given}",
            "python3",
            "-c",
            ASK_CONTROL,
            f"{head_ip}:6379",
        )
        expected, other = ("LET IN", "InvalidAuthToken") if name == "right" else ("InvalidAuthToken", "LET IN")
        assert expected in said and other not in said, (name, said[-500:])

    # The raylet of every node.
    (cluster.pods.root(cluster.head) / "tmp/ask.py").write_text(ASK_RAYLETS)
    codes = one_json(in_pod(cluster, cluster.head, "python3", "/tmp/ask.py", json.dumps(tokens)))
    assert len(codes) == 3 and all(
        code == {"none": "UNAUTHENTICATED", "wrong": "UNAUTHENTICATED", "right": "OK"} for code in codes.values()
    ), codes

    # The Jobs API: on the head's loopback only, and with the token only.
    for name, status in (("none", "401"), ("wrong", "403"), ("right", "200")):
        header = ("-H", f"Authorization: Bearer {tokens[name]}") if name != "none" else ()
        assert (
            in_pod(
                cluster,
                cluster.head,
                "curl",
                "-s",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                *header,
                "http://127.0.0.1:8265/api/jobs/",
            )
            == status
        ), name
    for worker in workers:
        assert "onnect" in in_pod(cluster, worker, "curl", "-sS", "-m", "5", f"http://{head_ip}:8265/api/jobs/")
        answers = answers_to_strangers(cluster, cluster.head, private(cluster, worker))
        assert all(answer.startswith("# HELP ") for answer in answers), "only Ray's metrics can be read without a token"


def test_secrets_are_only_where_they_belong(cluster: Cluster) -> None:
    """Key and token stand in their own files, of mode 0600, and in no other file, environment, command or request."""
    laptop, pods, key = cluster.laptop, cluster.pods, cluster.account.key
    nodes = [cluster.head, *want_two_workers(cluster)]
    homes, token = [pods.root(pod_id) / "home" for pod_id in nodes], (laptop.home / ".ray/auth_token").read_text()
    until(lambda: all((home / ".ray/auth_token").exists() for home in homes), 60, "every node has the token")
    keys = {laptop.home / ".altgrad/clusters/drill/runpod_api_key", homes[0] / ".altgrad/runpod_api_key"}
    tokens = {laptop.home / ".ray/auth_token", *(home / ".ray/auth_token" for home in homes)}
    gone = {pods.root(pod_id.name) for pod_id in pods.folder.iterdir() if pod_id.name not in nodes}
    for secret, places in ((key, keys), (token, tokens)):
        found = subprocess.run(
            ["grep", "-rlaF", "--", secret, str(cluster.folder), str(ROOT / "cluster")], capture_output=True, text=True
        ).stdout.splitlines()
        here = {Path(path) for path in found}
        assert {path for path in here if not any(path.is_relative_to(old) for old in gone)} == places
        assert {path.name for path in here} <= {"runpod_api_key", "auth_token"}
        assert all(place.stat().st_mode & 0o777 == 0o600 for place in places)
    for pod_id in nodes:
        for pid in run("ip", "netns", "pids", pods.namespace(pod_id)).split():
            for file in ("environ", "cmdline"):
                text = bytes_of(Path(f"/proc/{pid}/{file}"))
                assert key.encode() not in text and token.encode() not in text, (pod_id, text[:200])
    said = json.dumps(cluster.account.bodies)
    assert key not in said and token not in said


def test_secrets_of_sweeps_reach_the_head_and_workers_only_what_is_meant(cluster: Cluster) -> None:
    workers = want_two_workers(cluster)
    for pod_id in (cluster.head, *workers):
        said = in_pod(cluster, pod_id, "printenv").splitlines()
        assert ("DEMO_API_KEY=demo_secret" in said) == (pod_id == cluster.head), pod_id
        assert "HF_TOKEN=hf_secret" in said, pod_id
        # What the head does with the account it does although its shells have the pod's own key.
        assert any(line.startswith("RUNPOD_API_KEY=podkey_") for line in said), pod_id
        own = {".altgrad": "700", ".altgrad/secrets.env": "600", ".altgrad/watch.log": "600", ".cache/altgrad": "700"}
        modes = in_pod(cluster, pod_id, "stat", "-c", "%a", *(f"/root/{name}" for name in own))
        assert modes.split() == list(own.values()), pod_id
    assert "secret" not in json.dumps(cluster.account.bodies)


def test_what_the_head_lost_the_doctor_finds(cluster: Cluster) -> None:
    assert "trouble" not in cluster.laptop.run("altgrad", "cluster", "doctor", cluster.file)
    provider = cluster.pods.root(cluster.head) / "home/altgrad/cluster/altgrad_cluster/provider.py"
    provider.rename(provider.with_suffix(".away"))
    said = cluster.laptop.run("altgrad", "cluster", "doctor", cluster.file, check=False)
    provider.with_suffix(".away").rename(provider)
    assert "altgrad_cluster.provider: can't be imported here" in said


def test_a_restarted_head_adopts_its_workers(cluster: Cluster) -> None:
    before = want_two_workers(cluster)
    posts = cluster.account.count("POST")
    cluster.laptop.run("ray", "up", "-y", "--restart-only", cluster.file, "--disable-usage-stats", timeout=240)
    said = cluster.laptop.on_head(cluster.file, f'python3 -c "{ONE_GPU_EACH}"', timeout=240)
    assert str(sorted(private(cluster, worker) for worker in before)) in said
    assert set(cluster.workers) == before and cluster.account.count("POST") == posts


def test_workers_delete_themselves_when_the_head_is_gone(cluster: Cluster, capsys) -> None:
    want_two_workers(cluster)
    until(lambda: "2.0 GPU" in cluster.status(), 120, "Ray runs on both", step=3)
    account, started = cluster.account, time.monotonic()
    deletions, unwilling = account.endings()["DELETE 204"], cluster.workers[0]
    account.faults.undeletable = {unwilling: 500}
    account.vanish(cluster.head)
    until(lambda: account.endings()["DELETE 204"] == deletions + 1, 150, "one deletes itself")
    assert set(account.pods) == {unwilling}
    until(lambda: account.endings()["DELETE 500"], 60, "the other asks for it")
    account.faults.undeletable = {}
    until(lambda: account.endings()["DELETE 204"] == deletions + 2, 150, "the workers delete themselves")
    assert not account.pods
    with capsys.disabled():
        print(f"\n  orphans gone after {time.monotonic() - started:.0f} s, 36 s were set")
    said = cluster.laptop.run("altgrad", "cluster", "gc", cluster.file)
    assert "nothing is left over" in said and not cluster.account.violations
