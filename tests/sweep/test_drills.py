"""Faults planted into whole sweeps on real Ray: afterwards the ledger holds every step of every trial once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from planting import planted_path, started_here
from ray.cluster_utils import Cluster
from smallest import SMALLEST

from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.run import SweepResult, run_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.record import read_rows

pytestmark = pytest.mark.slow
STEPS = 900


def small(**changes: object) -> SweepSpec:
    return SweepSpec.model_validate(SMALLEST | {"name": "small", "seeds": 2, "steps": STEPS} | changes)


def is_whole(out: Path, trials: int, steps: int = STEPS) -> bool:
    """Every step of every trial once, in order, in the files and in the ledger."""
    files = [[row["step"] for row in read_rows(path)[0]] for path in (out / "trials").glob("*/metrics.jsonl")]
    with Ledger(out / "ledger.sqlite") as ledger:
        counts = ledger.row_counts()
        endings = {str(outcome.kind) for outcome in ledger.outcomes().values()}
    return files == [list(range(1, steps + 1))] * trials and set(counts.values()) == {steps} and endings == {"done"}


def in_the_middle(out: Path) -> bool:
    started = (path.parents[1] for path in (out / "trials").glob("*/checkpoint/state.pt"))
    return any(not (folder / "outcome.json").exists() for folder in started)


def once(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Acts as soon as the condition holds, beside whatever runs here."""

    def watch() -> None:
        while not condition():
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def trial_processes() -> list[int]:
    """The actors of this test that train trials now, by their titles."""
    return [pid for pid, title in started_here() if title.startswith("ray::") and title.endswith(".train")]


def test_a_killed_trials_process_is_replaced(tmp_path: Path) -> None:
    out, killed = tmp_path / "sweep", list[int]()

    def kill() -> None:
        while not killed:
            killed.extend(trial_processes()[:1])
        os.kill(killed[0], signal.SIGKILL)

    thread = once(lambda: in_the_middle(out), kill)
    result = run_sweep(small(), RunOptions(out=out))
    thread.join(5)
    assert killed and result.endings == {"done": 4} and is_whole(out, 4)


def test_trials_of_a_lost_node_go_on_elsewhere(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000})
    second = cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    try:
        thread = once(
            lambda: len(list((out / "trials").glob("*/checkpoint/state.pt"))) >= 2,
            lambda: cluster.remove_node(second, allow_graceful=False),
        )
        result = run_sweep(small(), RunOptions(out=out, address=cluster.address, max_concurrent=2))
        thread.join(30)
        assert not thread.is_alive()
    finally:
        cluster.shutdown()
    assert result.endings == {"done": 4} and is_whole(out, 4)


HANG = """
import time

def plant(module):
    base = module.Trainer
    def planted(config, **rest):
        trainer = base(config, **rest)
        if config.seed == 1 and config.format == "E5M2":
            interval = trainer._interval
            trainer._interval = lambda: time.sleep(600) if trainer.step >= 20 else interval()
        return trainer
    module.Trainer = planted
"""


def test_a_hung_trial_ends_as_timeout_and_goes_on_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, spec = tmp_path / "sweep", small(steps=60, eval_interval=20)
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", planted_path(tmp_path, HANG))
        result = run_sweep(spec, RunOptions(out=out, interval_timeout=8))
    assert result.endings == {"done": 3, "timeout": 1} and result.left == 1
    with Ledger(out / "ledger.sqlite") as ledger:
        outcome = next(found for found in ledger.outcomes().values() if found.kind == "timeout")
    assert outcome.step == 20 and "a log interval did not end in time" in outcome.message
    again = run_sweep(spec, RunOptions(out=out))
    assert (again.ran, again.left) == (1, 0) and is_whole(out, 4, 60)


DRIVER = [sys.executable, "-m", "altgrad", "run"]


def driver(spec: SweepSpec, out: Path, *more: str) -> subprocess.Popen[str]:
    path = out.with_suffix(".json")
    path.write_text(spec.model_dump_json())
    return subprocess.Popen(
        [*DRIVER, str(path), "--out", str(out), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_driver_killed_twice_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    out, steps = tmp_path / "sweep", 1500

    def ended() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (out / "trials").glob("*/outcome.json")}

    for _ in range(2):
        before = len(ended())
        running = driver(small(steps=steps), out)
        deadline = time.monotonic() + 240
        while len(ended()) == before or not in_the_middle(out):
            assert running.poll() is None and time.monotonic() < deadline, "nothing happened"
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    finished = ended()
    last = driver(small(steps=steps), out)
    text, _ = last.communicate(timeout=400)
    assert last.returncode == 0, text
    assert is_whole(out, 4, steps)
    assert finished and finished.items() <= ended().items(), "what had ended is touched again"
    resumed = [json.loads(path.read_text())["resumed_from"] for path in (out / "trials").glob("*/config.json")]
    assert any(resumed), "the interrupted trials go on from their checkpoints"
    once_more = driver(small(steps=steps), out)
    text, _ = once_more.communicate(timeout=120)
    assert once_more.returncode == 0 and "nothing was left to run" in text and "Ray dashboard" not in text


def test_an_interrupt_leaves_a_whole_record_and_a_second_driver_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    first = driver(small(), out)
    deadline = time.monotonic() + 240
    while not in_the_middle(out):
        assert first.poll() is None and time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    second = driver(small(), out)
    text, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and f"in use by another running sweep (process {first.pid} on" in text
    first.send_signal(signal.SIGINT)
    text, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in text, text
    assert run_sweep(small(), RunOptions(out=out)).left == 0 and is_whole(out, 4)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs can only be mounted by root")
def test_a_full_disk_is_reported_and_nothing_half_written_is_taken_for_whole(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
    try:
        full = driver(small(seeds=4), disk / "sweep")
        text, _ = full.communicate(timeout=300)
        assert full.returncode == 1 and "full" in text and "Traceback" not in text, text
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        again: SweepResult = run_sweep(small(seeds=4), RunOptions(out=disk / "sweep"))
        assert again.left == 0 and is_whole(disk / "sweep", 8)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_diverged_group_loses_its_race_and_the_good_one_reaches_the_end(tmp_path: Path) -> None:
    spec = small(steps=30, lrs="1e-3,1e30", scheduler="asha", eval_interval=10)
    result = run_sweep(spec, RunOptions(out=tmp_path / "sweep"))
    with Ledger(result.out / "ledger.sqlite") as ledger:
        trials, outcomes = ledger.trials(), ledger.outcomes()
    endings = {
        (row["lr"], row["seed"]): str(outcomes[name].kind) for name, row in trials.items() if row["format"] == "E5M2"
    }
    assert endings == {(1e-3, 0): "done", (1e-3, 1): "done", (1e30, 0): "pruned", (1e30, 1): "pruned"}
