"""GPUs are used, all of them, or refused; a stand-in makes them of a CPU, for Ray and for us."""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planting import planted_path
from ray.cluster_utils import Cluster
from smallest import SMALLEST

from altgrad.sweep.engine.executors import TrialRun, run_request
from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.devices import NoGpu
from altgrad.training.outcome import OutcomeKind


def spec(**changes: object) -> SweepSpec:
    return SweepSpec.model_validate(SMALLEST | {"name": "gpus", "eval_interval": 20, "log_interval": 5} | changes)


def is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def counting(out: Path) -> Iterator[list[int]]:
    """How many trials were at work, at each of many moments."""
    seen, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            seen.append(sum(map(is_held, out.glob("trials/*/.lock"))))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def losses(out: Path) -> dict[str, list[float]]:
    return {
        path.parent.name: [json.loads(line)["train_loss"] for line in path.read_text().splitlines()]
        for path in out.glob("trials/*/metrics.jsonl")
    }


def devices(out: Path) -> list[dict[str, str]]:
    return [device for path in out.glob("trials/*/config.json") for device in json.loads(path.read_text())["devices"]]


SLOW_DEVICE = """
import time

def plant(module):
    base = module.Trainer
    def planted(*args, **rest):
        trainer = base(*args, **rest)
        interval = trainer._interval
        trainer._interval = lambda: time.sleep(0.4) or interval()
        return trainer
    module.Trainer = planted
"""
"""A device that takes its time, and none of the two cores'."""


@pytest.mark.slow
def test_eight_gpus_run_forty_trials_eight_at_a_time_as_one_cpu_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = spec(seeds=20, steps=60)
    monkeypatch.setenv("ALTGRAD_STAND_IN_GPUS", "8")
    out = tmp_path / "eight"
    monkeypatch.setenv("PYTHONPATH", planted_path(tmp_path, SLOW_DEVICE))
    with counting(out) as at_work:
        result = run_sweep(sweep, RunOptions(out=out))
    said = capsys.readouterr().out
    assert result.trials == 40 and result.endings == {"done": 40}
    assert max(at_work) == 8, "not all eight were used at once"
    assert "executor: actor" in said and "8 x stand-in for a GPU" in said, said
    assert {device["index"] for device in devices(out)} == set("01234567")
    with Ledger(out / "ledger.sqlite") as ledger:
        assert all((outcome.device or "").startswith("stand-in") for outcome in ledger.outcomes().values())
    monkeypatch.delenv("ALTGRAD_STAND_IN_GPUS")
    monkeypatch.delenv("PYTHONPATH")
    alone = run_sweep(sweep, RunOptions(out=tmp_path / "one", max_concurrent=1))
    assert alone.endings == {"done": 40} and losses(tmp_path / "one") == losses(out)


VANISH = """
import os

def plant(module):
    from altgrad.training import devices
    usual = devices.gpu_count
    devices.gpu_count = lambda: 0 if os.path.exists(os.environ["VANISHED"]) else usual()
"""


@pytest.mark.slow
def test_gpus_that_vanish_are_an_error_and_no_trial_moves_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, out = tmp_path / "gone", tmp_path / "sweep"
    monkeypatch.setenv("ALTGRAD_STAND_IN_GPUS", "2")
    monkeypatch.setenv("VANISHED", str(gone))
    monkeypatch.setenv("PYTHONPATH", planted_path(tmp_path, VANISH))

    def vanish() -> None:
        while len(list(out.glob("trials/*/outcome.json"))) < 2:
            time.sleep(0.05)
        gone.touch()

    thread = threading.Thread(target=vanish, daemon=True)
    thread.start()
    result = run_sweep(spec(seeds=8, steps=20), RunOptions(out=out))
    assert result.broken is not None and "1 GPU asked for, none usable on" in result.broken
    with Ledger(out / "ledger.sqlite") as ledger:
        outcomes = list(ledger.outcomes().values())
    lost = [outcome for outcome in outcomes if outcome.kind is not OutcomeKind.DONE]
    assert len(lost) >= 3 and {outcome.kind for outcome in lost} == {OutcomeKind.NODE_LOST}
    assert {device["kind"].partition(" (")[0] for device in devices(out)} == {"stand-in for a GPU"}


@pytest.mark.slow
def test_trials_whose_kind_of_gpu_has_gone_go_on_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALTGRAD_STAND_IN_GPUS", "1")
    monkeypatch.setenv("PYTHONPATH", planted_path(tmp_path, SLOW_DEVICE))
    memory = {"object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0} | memory)
    nodes = [
        cluster.add_node(num_cpus=1, num_gpus=1, resources={f"accelerator_type:{kind}": 1}, **memory)
        for kind in ("H100", "A100")
    ]
    out = tmp_path / "sweep"

    def lose() -> None:
        while len(list(out.glob("trials/*/outcome.json"))) < 2:
            time.sleep(0.05)
        cluster.remove_node(nodes[1], allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    try:
        result = run_sweep(spec(seeds=4, steps=20), RunOptions(out=out, address=cluster.address))
    finally:
        cluster.shutdown()
    assert result.broken is None and result.endings == {"done": 8}
    assert "executor: actor" in capsys.readouterr().out


def test_a_trial_without_its_gpu_ends_before_it_trains(tmp_path: Path) -> None:
    (config, _) = spec(steps=20, seeds=1).expand()
    run = TrialRun(run_request("a", config, tmp_path / "a", gpus=1.0))
    with pytest.raises(NoGpu, match=r"1 GPU asked for, none usable on .*: torch .* \(built for CPUs only\), no NVIDIA"):
        run.step()
    assert not (tmp_path / "a").exists()


CHOICES: dict[str, tuple[dict[str, Any], dict[str, float], str, int]] = {
    "one worker, no GPU": ({}, {"CPU": 4}, "actor", 4),
    "eight GPUs, two cores": ({"gpus_per_trial": 1.0}, {"CPU": 2, "GPU": 8}, "actor", 8),
    "four share one": ({"gpus_per_trial": 0.25}, {"CPU": 2, "GPU": 1}, "actor", 4),
    "ten share one": ({"gpus_per_trial": 0.1}, {"CPU": 2, "GPU": 1}, "actor", 10),
    "CPUs beside GPUs": ({"gpus_per_trial": 0.0}, {"CPU": 2, "GPU": 8}, "actor", 2),
    "two workers": ({"workers_per_trial": 2}, {"CPU": 4}, "train", 2),
    "asked for": ({"executor": "train", "gpus_per_trial": 1.0}, {"GPU": 2}, "train", 2),
    "said": ({"max_concurrent": 3}, {"CPU": 64}, "actor", 3),
}


@pytest.mark.parametrize("case", CHOICES)
def test_executor_and_concurrency(case: str) -> None:
    settings, now, executor, concurrent = CHOICES[case]
    options = RunOptions(Path("x"), **settings)
    assert (options.chosen_executor, options.concurrent(now)) == (executor, concurrent)


@pytest.mark.parametrize(
    ("now", "most", "expected"),
    [
        ({"CPU": 2}, None, 8),
        ({"GPU": 6}, None, 12),
        ({}, {"GPU": 4}, 4),
        ({"GPU": 8}, {"GPU": 20}, 20),
        ({"GPU": 8}, {"GPU": 0}, 8),
        ({}, {"GPU": 9e18}, 1000),
    ],
)
def test_a_cluster_that_grows_sees_what_it_could_hold(now, most, expected) -> None:
    options = RunOptions(Path("x"), address="auto", gpus_per_trial=1.0 if "GPU" in {**now, **(most or {})} else 0.0)
    assert options.concurrent(now, most) == expected


def test_gpus_are_used_unless_told_otherwise() -> None:
    assert RunOptions(Path("x")).settled(8).gpus == 1 and RunOptions(Path("x")).settled(0).gpus == 0
    assert RunOptions(Path("x"), gpus_per_trial=0.0).settled(8).gpus == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus-per-trial", "1.5"], "--gpus-per-trial: 1.5 is not allowed: whole GPUs, or a fraction below 1"),
        (
            ["--gpus-per-trial", "2"],
            "--gpus-per-trial: 2 is not allowed: a trial would take 2 GPUs, this machine has 1",
        ),
        (["--workers-per-trial", "2"], "a trial would take 2 GPUs, this machine has 1; 0 trains on CPUs"),
        (
            ["--max-gpu-hours", "1", "--gpus-per-trial", "0"],
            "--max-gpu-hours: 1 is not allowed without --gpus-per-trial",
        ),
    ],
)
def test_what_the_machine_cannot_do_is_refused(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from altgrad.cli import main

    monkeypatch.setenv("ALTGRAD_STAND_IN_GPUS", "1")
    assert main(["run", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_collective_that_cannot_start_is_a_bug_that_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on GPUs join by NCCL, which a torch that is built for CPUs lacks."""
    monkeypatch.setenv("ALTGRAD_STAND_IN_GPUS", "2")
    out = tmp_path / "sweep"
    result = run_sweep(spec(seeds=3, steps=20), RunOptions(out=out, workers_per_trial=2, gpus_per_trial=1.0))
    assert result.broken is not None and "NCCL" in result.broken and result.left == result.trials == 6
    with Ledger(out / "ledger.sqlite") as ledger:
        outcomes = ledger.outcomes()
    assert {outcome.kind for outcome in outcomes.values()} == {OutcomeKind.BUG} and len(outcomes) == 3
    assert "Traceback" in (out / "trials" / next(iter(outcomes)) / "traceback.txt").read_text()
