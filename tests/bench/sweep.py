"""What a trial costs beyond its training: `python tests/bench/sweep.py`.

Trivial trials run through this project's executors, through plain Tune functions and through Tune over a TorchTrainer,
each on a local Ray of two cores. Processor time and processes of the whole cluster are read from the operating system
between the first trial's start and the end, and the processor time of the same trainings in one plain process is
subtracted. Processor seconds, because the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

TINY = {"layers": 1, "heads": 1, "width": 16, "block": 16}
FEW = 4
"""Trials where each costs half a minute of processor time."""

PLAIN = """
import json, sys, time
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.trainer import Trainer
import torch
torch.set_num_threads(1)
trials = SweepSpec.model_validate_json(open(sys.argv[1]).read()).expand()
Trainer(trials[0]).run()
begun = time.process_time()
for config in trials:
    Trainer(config).run()
print(time.process_time() - begun)
"""
FUNCTIONS = """
import sys
import ray
from ray import tune
from altgrad.sweep.space.spec import SweepSpec
trials = [c.model_dump_json() for c in SweepSpec.model_validate_json(open(sys.argv[1]).read()).expand()]
def train(config):
    import torch
    torch.set_num_threads(1)
    from altgrad.training.config import TrainConfig
    from altgrad.training.trainer import Trainer
    outcome = Trainer(TrainConfig.model_validate_json(config["trial"])).run()
    tune.report({"loss": outcome.val_loss})
def nested(config):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback
    def loop(config):
        import ray.train
        import torch
        torch.set_num_threads(1)
        from altgrad.training.config import TrainConfig
        from altgrad.training.trainer import Trainer
        ray.train.report({"loss": Trainer(TrainConfig.model_validate_json(config["trial"])).run().val_loss})
    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": .9})
    TorchTrainer(loop, train_loop_config=config, scaling_config=scaling,
                 run_config=RunConfig(callbacks=[TuneReportCallback()])).fit()
ray.init(num_cpus=2, object_store_memory=200_000_000, log_to_driver=False)
how = tune.with_resources(nested, {"cpu": 0.01}) if sys.argv[2] == "nested" else train
tune.Tuner(how, param_space={"trial": tune.grid_search(trials)},
           tune_config=tune.TuneConfig(max_concurrent_trials=2, reuse_actors=sys.argv[2] != "nested"),
           run_config=tune.RunConfig(verbose=0, storage_path=sys.argv[3])).fit()
"""


def spec_text(trials: int) -> str:
    """A sweep of so many trivial trials: one format, the rest seeds."""
    return json.dumps(
        {
            "name": "trivial",
            "formats": ["BF16"],
            "optimizers": ["adamw"],
            "seeds": trials,
            "steps": 10,
            "model": TINY,
            "data": {"batch": 2, "eval_batches": 1},
            "log_interval": 10,
            "eval_interval": 10,
            "checkpoint_interval": 10,
            "guards": "off",
        }
    )


def cluster_cost(words: list[str]) -> tuple[float, int]:
    """Processor seconds and number of processes of a command with all it starts; a dead one counts as last seen."""
    environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    root = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    seconds: dict[tuple[int, float], float] = {}
    while root.poll() is None:
        try:
            family = [psutil.Process(root.pid), *psutil.Process(root.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for process in family:
            try:
                times = process.cpu_times()
                seconds[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.1)
    if root.returncode:
        raise RuntimeError(f"{words[1:3]} ended with exit code {root.returncode}")
    return sum(seconds.values()), len(seconds)


def measured(trials: int, few: int, kinds: list[str]) -> list[str]:
    """Lines of the table; a sweep of no or one trial is subtracted, so that starting Ray is not counted."""
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script, text in (("plain.py", PLAIN), ("functions.py", FUNCTIONS)):
            (folder / script).write_text(text)
        for kind in kinds:
            count = few if "Train" in kind else trials
            costs = []
            for size in (1, count):
                spec = folder / f"{size}.json"
                spec.write_text(spec_text(size))
                out = folder / f"{len(list(folder.iterdir()))}"
                theirs = [sys.executable, str(folder / "functions.py"), str(spec)]
                ours = [sys.executable, "-m", "altgrad", "run", str(spec), "--out", str(out)]
                words = {
                    "altgrad, reused actor": [*ours, "--executor", "actor"],
                    "altgrad, Ray Train": [*ours, "--executor", "train"],
                    "Tune function, reused actor": [*theirs, "plain", name],
                    "Tune over TorchTrainer": [*theirs, "nested", name],
                }[kind]
                plain = subprocess.run(
                    [sys.executable, str(folder / "plain.py"), str(spec)], capture_output=True, text=True, check=True
                )
                total, processes = cluster_cost(words)
                costs.append((total - float(plain.stdout), processes))
            (base, first), (total, all_of_them) = costs
            extra = count - 1
            lines.append(f"| {kind} | {count} | {(total - base) / extra:.2f} | {(all_of_them - first) / extra:.2f} |")
            print(lines[-1], flush=True)
    return lines


KINDS = ["altgrad, reused actor", "altgrad, Ray Train", "Tune function, reused actor", "Tune over TorchTrainer"]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--few", type=int, default=FEW, help="trials of the kinds that use Ray Train")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    asked = parser.parse_args()
    print("| executor | trials | CPU-s per further trial, beyond its training | new processes per further trial |")
    print("| --- | --- | --- | --- |")
    measured(asked.trials, asked.few, asked.kinds)


@pytest.mark.bench
def test_the_benchmark_runs() -> None:
    assert "| altgrad, reused actor | 3 |" in measured(3, 2, KINDS[:1])[0]


if __name__ == "__main__":
    main()
