"""From nothing to a report and back to nothing, with the YAML file as it is, on a simulated RunPod."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest
from fake_runpod import FakeRunPod, until
from laptop import ROOT, Laptop, ledger
from pod_namespaces import OUTSIDE, Namespaces, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
SWEEP = (
    "python3",
    "sweeps/format_ablation.py",
    "--preset",
    "quick",
    "--formats",
    "BF16,E5M2",  # of two seeds: two trials that wait for no other, and so two workers from the start
    "--max-concurrent",
    "2",
    "--address",
    "auto",
    "--out",
)
SHARED, UNSHARED = "/workspace/runs/quick", "/tmp/runs/quick"


def test_from_nothing_to_a_report_and_back_to_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pods, marks, most = Namespaces(tmp_path / "pods", ROOT), [("start", time.monotonic())], [0]

    def mark(what: str) -> None:
        marks.append((what, time.monotonic()))

    with pods.ready(), FakeRunPod(pods, boot_s=3).serving(OUTSIDE) as account:
        laptop = Laptop(tmp_path / "laptop", account)
        file = laptop.file()
        laptop.run("ray", "up", "-y", file, "--disable-usage-stats", timeout=240)
        mark("ray up")
        (head,) = account.of_kind("head")
        assert not account.of_kind("worker")
        assert laptop.run("ray", "get-head-ip", file).splitlines()[-1] == OUTSIDE
        assert "1 head" in laptop.on_head(file, "ray status")
        (tmp_path / "hello.py").write_text("import ray; ray.init(); print('nodes:', len(ray.nodes()))")
        assert "nodes: 1" in laptop.run("ray", "submit", file, tmp_path / "hello.py")
        laptop.run("ray", "rsync-up", file, tmp_path / "hello.py", "/tmp/hello-again.py")
        assert (pods.root(head) / "tmp" / "hello-again.py").exists()
        assert "attached: 42" in laptop.run(
            "ray", "attach", file, timeout=60, typed="echo attached: $((6 * 7))\nexit\n"
        )
        mark("exec, submit, rsync-up, attach")
        with laptop.tunnel(file) as dashboard:
            done = threading.Event()

            def count() -> None:
                while not done.wait(0.5):
                    most[0] = max(most[0], len(account.of_kind("worker")))

            submit = ("ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *SWEEP)
            said = laptop.run(*submit, UNSHARED, timeout=300, check=False)
            mark("the first worker joins, and does not see the sweep's folder")
            assert "failed" in said and f"--out: {UNSHARED} is not on shared storage: node" in said
            until(lambda: not account.of_kind("worker"), 240, "its workers are deleted")
            mark("its workers idle and gone")
            before = account.count("POST")
            threading.Thread(target=count, daemon=True).start()
            said = laptop.run(*submit, SHARED, timeout=900)
            done.set()
        mark("the sweep, from 0 workers")
        assert "1 GPU(s) per worker" in said, "a head without GPUs, and workers with them that are to come"
        assert "succeeded" in said and "report: /workspace/runs/quick/report/report.html" in said
        assert most[0] == 2 == account.count("POST") - before
        laptop.run("ray", "rsync-down", file, "/workspace/runs/quick/", f"{tmp_path}/fetched/")
        assert "<html" in (tmp_path / "fetched/report/report.html").read_text()
        found = ledger(tmp_path / "fetched")
        assert len(found["endings"]) == 16 == len(found["rows"]) and not {"bug", "node_lost"} & set(found["endings"])
        until(lambda: not account.of_kind("worker"), 240, "idle workers are deleted")
        mark("workers idle and gone")
        laptop.run("ray", "down", "-y", file)
        mark("ray down")
        assert not account.pods and not account.violations
    with capsys.disabled():
        print()
        for (_, before), (what, after) in itertools.pairwise(marks):
            print(f"  {what}: {after - before:.0f} s")
