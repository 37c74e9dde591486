"""Trials of two workers under Ray Train: stopped, killed and compared with those of one worker."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from planting import started_here
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.record import read_rows

pytestmark = pytest.mark.slow


def small(**changes: object) -> SweepSpec:
    return SweepSpec.model_validate(
        {
            "name": "small",
            "formats": "E5M2",
            "optimizers": "adamw",
            "seeds": 2,
            "steps": 20,
            "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
            "data": {"batch": 2, "eval_batches": 1},
            "log_interval": 5,
            "eval_interval": 10,
            "checkpoint_interval": 5,
        }
        | changes
    )


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A Ray of this test's own, dashboard on, that outlives the sweep."""
    started = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": 200_000_000,
            "include_dashboard": True,
            "dashboard_port": 0,
        },
    )
    try:
        yield started.address
    finally:
        ray.shutdown()
        started.shutdown()


def placement_groups() -> list[str]:
    return [str(group["state"]) for group in placement_group_table().values()]


def test_two_workers_run_a_sweep_to_its_outcomes_and_leave_nothing_behind(tmp_path: Path) -> None:
    spec = small(guards="train_loss > 0 after 10")
    with cluster() as address:
        options = RunOptions(out=tmp_path / "two", address=address, executor="train", workers_per_trial=2)
        result = run_sweep(spec, options)
        with Ledger(result.out / "ledger.sqlite") as ledger:
            assert ledger.notices() == {}, "no group was taken from a running trial"
        ray.init(address=address, log_to_driver=False)
        deadline = time.monotonic() + 30
        while set(placement_groups()) - {"REMOVED"} and time.monotonic() < deadline:
            time.sleep(1)
        assert set(placement_groups()) == {"REMOVED"}
    alone = run_sweep(spec, RunOptions(out=tmp_path / "one", executor="actor"))
    assert result.endings == alone.endings == {"diverged by train_loss": 4}
    for folder in (tmp_path / "two" / "trials").iterdir():
        ours, theirs = (
            read_rows(tmp_path / name / "trials" / folder.name / "metrics.jsonl")[0] for name in ("two", "one")
        )
        assert [row["step"] for row in ours] == list(range(1, 16))
        assert [row["train_loss"] for row in ours] == pytest.approx([row["train_loss"] for row in theirs], abs=1e-5)
        assert json.loads((folder / "config.json").read_text())["workers"] == 2
        assert (folder / "checkpoint" / "state.pt").exists(), "a worker that stops by its own guard leaves one"


def test_a_killed_worker_is_replaced_and_no_step_is_lost_or_doubled(tmp_path: Path) -> None:
    killed = []

    def kill_one() -> None:
        while not killed:
            for path in (tmp_path / "sweep" / "trials").glob("*/checkpoint/state.pt"):
                if (path.parents[1] / "outcome.json").exists():
                    continue
                for pid in train_workers():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    spec = small(seeds=1, steps=1000, log_interval=10, checkpoint_interval=10, eval_interval=1000, guards="off")
    result = run_sweep(spec, RunOptions(out=tmp_path / "sweep", executor="train", workers_per_trial=2))
    thread.join(5)
    assert killed and result.endings == {"done": 2}
    with Ledger(result.out / "ledger.sqlite") as ledger:
        assert set(ledger.row_counts().values()) == {1000}
    folders = list((result.out / "trials").iterdir())
    for folder in folders:
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl")[0]] == list(range(1, 1001))
    assert any(json.loads((folder / "config.json").read_text())["resumed_from"] for folder in folders)


def train_workers() -> list[int]:
    """Processes of this test's Ray that run a trial's worker."""
    return [pid for pid, title in started_here() if title.startswith("ray::") and "TrainWorker" in title]
