"""How long and on which schedule the study trains: `python tests/bench/study_design.py OUT.jsonl`.

The question is decided by differences of differences: what the geometry-aware step gains over AdamW in a format, minus
what it gains in BF16, paired by seed. What a design is worth is the sd of that over seeds, squared, times the steps it
takes: as many CPU-seconds buy a shorter interval where this is smaller. Measured here over lengths, schedules, learning
rates, and with the weights averaged over the last 30 % of the steps, on seeds that the study never uses.

A constant rate needs one run for all lengths; `wsd` (half of the steps decaying) and `cosine` one run for each. Losses
go to OUT.jsonl as they are measured, and a run whose losses stand there is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad.training.arm_configs import ARMS
from altgrad.training.config import DataConfig, ScheduleConfig, TrainConfig
from altgrad.training.trainer import Trainer

LENGTHS = (100, 200, 400, 1000)
SCHEDULES = {
    "constant": (ScheduleConfig(), LENGTHS[-1:]),
    "cosine": (ScheduleConfig(kind="cosine"), LENGTHS),
    "wsd": (ScheduleConfig(kind="wsd", decay_fraction=0.5), (200, 400)),
}
RATES = (2e-3, 4e-3)
FIRST_SEED, LAST = 1000, 1004
JUDGED = tuple(itertools.product(("uniform", "uniform_full"), ("E4M3", "E7M0")))
CELLS = (("uniform", "BF16"), *JUDGED)
"""Policy and format; where the format is BF16 all policies are one training."""
ARMS_COMPARED = ("adamw", "manifold")
AVERAGED = 0.3
"""Share of a run, its end, over which weights are averaged."""


def configs(lengths: Sequence[int]) -> Iterator[tuple[str, TrainConfig]]:
    """Every run of these lengths with its schedule's name."""
    seeds = range(FIRST_SEED, LAST)
    for seed, (kind, (schedule, own)), rate in itertools.product(seeds, SCHEDULES.items(), RATES):
        for steps, (policy, name), arm in itertools.product(own, CELLS, ARMS_COMPARED):
            if steps in lengths:
                yield (
                    kind,
                    TrainConfig(
                        format=name,
                        policy=policy,
                        optimizer=ARMS[arm].model_copy(update={"lr": rate}),
                        schedule=schedule,
                        guards=(),
                        seed=seed,
                        steps=steps,
                        eval_interval=steps,
                        checkpoint_interval=steps,
                        data=DataConfig(eval_batches=16),
                    ),
                )


def measured(kind: str, config: TrainConfig) -> list[dict[str, Any]]:
    """Trains it and returns a line per length, and one more with averaged weights where the rate is constant."""
    torch.set_num_threads(1)
    trainer, found = Trainer(config, observe=False), []
    lengths = [length for length in LENGTHS if length <= config.steps] if kind == "constant" else [config.steps]
    sums = {length: dict.fromkeys(trainer.model.state_dict(), 0.0) for length in lengths}
    counts = dict.fromkeys(lengths, 0)
    key = {
        "format": config.format,
        "policy": config.policy,
        "arm": config.arm,
        "lr": config.optimizer.lr,
        "seed": config.seed,
        "run": config.steps,
    }
    started = time.process_time()
    for row in trainer.intervals():
        step = row["step"]
        for length in lengths:
            if kind == "constant" and length * (1 - AVERAGED) < step <= length:
                counts[length] += 1
                for name, value in trainer.model.state_dict().items():
                    sums[length][name] = sums[length][name] + value.double()
        if step not in lengths:
            continue
        seconds = time.process_time() - started
        line = key | {"schedule": kind, "steps": step, "seconds": seconds}
        found.append(line | {"val_loss": trainer.task.evaluate(trainer.model)["val_loss"]})
        if kind == "constant":
            own = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            mean = {name: (total / counts[step]).to(own[name].dtype) for name, total in sums[step].items()}
            trainer.model.load_state_dict(mean)
            loss = trainer.task.evaluate(trainer.model)["val_loss"]
            trainer.model.load_state_dict(own)
            found.append(line | {"schedule": "constant, averaged", "val_loss": loss})
    return found


def run(out: Path, workers: int, lengths: Sequence[int] = LENGTHS) -> None:
    """Measures what OUT lacks, of runs of these lengths."""
    done = {tuple(line[name] for name in KEY) for line in lines(out)}
    left = [
        (kind, config)
        for kind, config in configs(lengths)
        if (kind, config.format, config.policy, config.arm, config.optimizer.lr, config.seed, config.steps) not in done
    ]
    started = time.monotonic()
    total = sum(config.steps for _, config in left)
    past = 0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(measured, kind, config): config for kind, config in left}
        for place, job in enumerate(as_completed(jobs), 1):
            with out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in job.result())
            past += jobs[job].steps
            if place % 20 == 0:
                minutes = (time.monotonic() - started) / 60
                print(f"{place}/{len(left)} runs, {minutes * (total / past - 1):.0f} min left", flush=True)


KEY = ("schedule", "format", "policy", "arm", "lr", "seed", "run")


def lines(out: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line per schedule, length and rate, over the seeds that have all of it; sd are of one seed's difference.

    Gains are AdamW's loss minus ManifoldAdamW's, an interaction is the gain in the format minus that in BF16: above 0
    the format benefits more.
    """
    loss = {
        tuple(line[name] for name in ("schedule", "steps", "lr", "policy", "format", "arm", "seed")): line["val_loss"]
        for line in found
    }
    texts = [
        "| schedule | steps | lr | seeds | BF16 loss | BF16 gain (sd) | E4M3 interaction (sd), weights | E7M0, weights "
        "| E4M3, all | E7M0, all | sd² × steps, geometric mean of the four |",
        "| --- |" + " ---: |" * 10,
    ]
    for schedule, steps, lr in sorted({key[:3] for key in loss}):
        own = {key[3:]: value for key, value in loss.items() if key[:3] == (schedule, steps, lr)}
        whole = [
            [(*cell, arm, seed) in own for cell in CELLS for arm in ARMS_COMPARED] for seed in range(FIRST_SEED, LAST)
        ]
        seeds = [seed for seed, has in zip(range(FIRST_SEED, LAST), whole, strict=True) if all(has)]
        if len(seeds) < 2:
            continue
        gains = {cell: [own[*cell, "adamw", seed] - own[*cell, "manifold", seed] for seed in seeds] for cell in CELLS}
        bf16 = gains["uniform", "BF16"]
        beyond = [[x - y for x, y in zip(gains[cell], bf16, strict=True)] for cell in JUDGED]
        cells = [_text(values) for values in (bf16, *beyond)]
        squares = [statistics.variance(values) for values in beyond]
        reference = statistics.fmean(own["uniform", "BF16", "adamw", seed] for seed in seeds)
        texts.append(
            f"| {schedule} | {steps} | {lr:g} | {len(seeds)} | {reference:.3f} | {' | '.join(cells)} "
            f"| {statistics.geometric_mean(squares) * steps:.4f} |"
        )
    return "\n".join(texts)


def _text(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):+.3f} ({statistics.stdev(values):.3f})"


def main() -> None:
    """Measures what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    run(arguments.out, arguments.workers)
    print(table(lines(arguments.out)))


@pytest.mark.bench
def test_study_design(tmp_path: Path) -> None:
    out = tmp_path / "losses.jsonl"
    run(out, 2, lengths=(100,))
    text = table(lines(out))
    print(text)
    assert "| cosine | 100 | 0.002 | 4 |" in text


if __name__ == "__main__":
    main()
