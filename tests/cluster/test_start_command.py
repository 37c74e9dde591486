"""The start command as a container's first process runs it: what ends, what stays, and what it leads to."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from altgrad_cluster.settings import NodeConfig, Settings
from altgrad_cluster.start_command import start_command
from conftest import POD, WORKER
from fake_runpod import FakeRunPod, until


@pytest.fixture
def container(account: FakeRunPod, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts a command line as the container of a new pod, with the pod's own environment; the pod's id."""
    started = []

    def start(args: str, path: str = "") -> str:
        pod_id = account.add_pod("ag--one--00000000--worker--worker--0", status="RUNNING")
        key = next(key for key, owner in account._pod_keys.items() if owner == pod_id)
        environment = {"HOME": str(tmp_path), "RUNPOD_POD_ID": pod_id, "RUNPOD_API_KEY": key}
        with (tmp_path / "log").open("w") as log:
            started.append(
                subprocess.Popen(
                    shlex.split(args),
                    env=environment | {"PATH": path or f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return pod_id

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tools(folder: Path, *names: str) -> str:
    """A PATH with the shell's own needs and these commands."""
    folder.mkdir()
    for name in ("bash", "sleep", "cat", "grep", *names):
        (folder / name).symlink_to(Path(shutil.which(name) or sys.exit(f"{name} is not installed")).resolve())
    return str(folder)


def test_a_pod_without_a_watch_deletes_itself_with_its_own_key(account, container, tmp_path):
    pod_id = container(start_command(account.url, 2))
    until(lambda: pod_id not in account.pods, 20, "the pod deletes itself")
    assert account.endings() == {"DELETE 204": 1}
    assert "altgrad: no watch ran for 2 s: this pod deletes itself" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("refused", [403, 429, 500])
def test_a_refused_deletion_is_asked_for_again(account, container, refused):
    pod_id = container(start_command(account.url, 1))
    account.faults.undeletable = {pod_id: refused}
    until(lambda: account.endings()[f"DELETE {refused}"] >= 2, 20, "it is asked for")
    account.faults.undeletable = {}
    until(lambda: pod_id not in account.pods, 20, "it is asked for again")


@pytest.mark.parametrize("has", ["curl", "runpodctl pod delete", "runpodctl remove pod"])
def test_an_image_without_python_deletes_itself_by_other_means(account, container, tmp_path, has):
    path = tools(tmp_path / "bin", *["curl"] * (has == "curl"))
    if has != "curl":
        command = tmp_path / "bin/runpodctl"
        words = has.split()[1:]
        command.write_text(f'#!/bin/bash\n[ "$1 $2" = "{" ".join(words)}" ] && echo "$3" > "$HOME/asked"\n')
        command.chmod(0o755)
    pod_id = container(start_command(account.url, 1), path)
    if has == "curl":
        until(lambda: pod_id not in account.pods, 20, "the pod deletes itself")
    else:
        until((tmp_path / "asked").exists, 20, "runpodctl is asked")
        until(lambda: (tmp_path / "asked").read_text().strip() == pod_id, 5, "for this pod")


def test_a_pod_stays_while_a_watch_runs_and_not_when_it_has_died(account, container, tmp_path):
    (tmp_path / ".altgrad").mkdir()
    fake = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "altgrad_cluster.watch"])
    (tmp_path / ".altgrad/watch.pid").write_text(str(fake.pid))
    pod_id = container(start_command(account.url, 2))
    with pytest.raises(AssertionError):
        until(lambda: pod_id not in account.pods, 6, "never")
    fake.kill()
    fake.wait()
    until(lambda: pod_id not in account.pods, 20, "its watch has died")


def test_a_worker_has_a_longest_time_whatever_runs(account, container, tmp_path):
    (tmp_path / ".altgrad").mkdir()
    fake = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "altgrad_cluster.watch"])
    (tmp_path / ".altgrad/watch.pid").write_text(str(fake.pid))
    pod_id = container(start_command(account.url, 4, lifetime=5))
    until(lambda: pod_id not in account.pods, 20, "its time is over")
    fake.kill()
    fake.wait()
    assert "its time of 5 s is over" in (tmp_path / "log").read_text()


def test_it_is_one_line_that_any_splitter_reads_alike_and_leads_to_the_images_own_start():
    args = start_command("https://api.runpod.io", 600, 86400)
    first, rest = args.split("'", 1)
    script, end = rest.rsplit("'", 1)
    assert (first, end) == ("bash -c ", "") and not set(script) & set("'\\\n")
    assert script.endswith("if [ -x /start.sh ]; then exec /start.sh; fi; exec sleep infinity")
    assert "@" not in script


@pytest.mark.parametrize(("kind", "lifetime"), [("worker", 7200), ("head", 0)])
def test_every_pod_is_created_with_it_and_a_head_has_no_longest_time(account, provider, kind, lifetime):
    nodes = provider(set_up_minutes=3, max_worker_hours=2)
    (pod_id,) = nodes.create_node({**POD, "min_cuda": "12.8", "gpu_count": 2}, {**WORKER, "ray-node-type": kind}, 1)
    (body,) = account.bodies
    assert f"patience=180 lifetime={lifetime};" in body["args"] and f"{account.url}/v2/pods/" in body["args"]
    assert account.key not in str(body) and account.pods[pod_id]["args"] == body["args"]
    assert body["gpu"] == {"id": POD["gpus"][0], "count": 2, "minCudaVersion": "12.8"}
    assert body["env"]["ALTGRAD_GPU_COUNT"] == "2"


def test_without_a_cuda_version_none_is_sent(account, provider):
    provider().create_node(POD, WORKER, 1)
    assert "minCudaVersion" not in account.bodies[0]["gpu"]
    assert NodeConfig.read(POD).min_cuda is None and Settings.read({}).max_worker_s is None
