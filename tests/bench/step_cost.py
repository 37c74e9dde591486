"""What watching costs, and what the loop costs: `python tests/bench/step_cost.py`.

Two ratios on a byte GPT of 4 layers and width 128, context 128, batch 16, one thread:

    observed / unobserved   a training step with all observers at their default schedule over the same step without
    trainer / plain loop    a float32 step of the one training loop, unobserved, over a loop of 30 lines in PyTorch

Both sides of a ratio take turns, log interval by log interval, and processor time is taken: a neighbour on the machine
slows them alike, or neither.
Checks are of three kinds (plain, with details, with exact ranks too); each kind's median ratio counts as often as the
schedule has it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from altgrad.training import ARMS, TrainConfig, Trainer
from altgrad.training.config import ModelConfig, ObserveConfig
from altgrad.training.data import load_corpus, train_batch
from altgrad.training.model import build_model

MODEL = ModelConfig(layers=4, heads=4, width=128, block=128)
INTERVAL = 10


def config(steps: int, batch: int, model: ModelConfig, **changes: object) -> TrainConfig:
    return TrainConfig(
        **{
            "model": model.model_dump(),
            "data": {"batch": batch, "eval_batches": 1},
            "steps": steps,
            "guards": (),
            "log_interval": INTERVAL,
            "eval_interval": steps,
            "checkpoint_interval": steps,
            "format": "E4M3",
        }
        | changes
    )


def plain_loop(model_config: ModelConfig, batch: int, steps: int) -> Iterator[float]:
    """The loop that a user would write; yields after each log interval."""
    data = load_corpus(config(INTERVAL, batch, model_config).data)
    model = build_model(model_config, vocabulary=256, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 10)
        inputs, targets = train_batch(data, block=model_config.block, batch=batch, seed=0, step=step)
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % INTERVAL == 0:
            yield float(torch.stack(losses).sum())
            losses.clear()


def intervals(trainer: Trainer) -> Iterator[object]:
    return trainer.intervals()


def take_turns(sides: dict[str, Iterator[object]], count: int) -> list[dict[str, float]]:
    """Processor seconds of each side for each of `count` intervals, after one that warms up."""
    found = []
    for number in range(count):
        order = list(sides) if number % 2 else list(sides)[::-1]
        seconds = {}
        for name in order:
            start = time.process_time()
            next(sides[name])
            seconds[name] = time.process_time() - start
        found.append(seconds)
    return found


def kind_of(check: int, observe: ObserveConfig) -> str:
    if check % observe.exact_ranks_every == 0:
        return "exact"
    return "detail" if check % observe.detail_every == 0 else "plain"


def observed(count: int, batch: int, model: ModelConfig, arm: str, policy: str) -> str:
    steps = (count + 1) * INTERVAL
    own = config(steps, batch, model, optimizer=ARMS[arm].model_dump(), policy=policy)
    sides = {name: intervals(Trainer(own, observe=name == "on")) for name in ("on", "off")}
    ratios = defaultdict(list)
    for check, seconds in enumerate(take_turns(sides, count)):
        if check:  # the first compiles kernels
            ratios[kind_of(check, own.observe)].append(seconds["on"] / seconds["off"])
    found = {kind: statistics.median(values) for kind, values in ratios.items()}
    every, detail = own.observe.exact_ranks_every, own.observe.detail_every
    share = {"exact": 1 / every, "detail": 1 / detail - 1 / every, "plain": 1 - 1 / detail}
    found.setdefault("exact", found.get("detail", found["plain"]))
    total = sum(share[kind] * found.get(kind, found["plain"]) for kind in share)
    kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in sorted(found.items()))
    return f"observed / unobserved, {arm}, {policy}: {total:.3f} ({kinds}; {count - 1} pairs of {INTERVAL} steps)"


def beside_plain_loop(count: int, batch: int, model: ModelConfig) -> str:
    steps = (count + 1) * INTERVAL
    own = config(steps, batch, model, format="FP32")
    sides = {"trainer": intervals(Trainer(own, observe=False)), "plain": plain_loop(model, batch, steps)}
    ratios = [seconds["trainer"] / seconds["plain"] for seconds in take_turns(sides, count)[1:]]
    return f"trainer / plain loop, float32: {statistics.median(ratios):.3f} ({count - 1} pairs of {INTERVAL} steps)"


def one_thread(call: Callable[[], str]) -> str:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=int, default=22, help="log intervals of each side; 22 hold a whole schedule")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--arms", default="adamw,grid")
    parser.add_argument("--policy", default="uniform")
    asked = parser.parse_args()
    for arm in asked.arms.split(","):
        print(one_thread(lambda arm=arm: observed(asked.checks, asked.batch, MODEL, arm, asked.policy)), flush=True)
    print(one_thread(lambda: beside_plain_loop(min(asked.checks, 12), asked.batch, MODEL)))


@pytest.mark.bench
def test_the_benchmark_runs_and_prints_its_ratios() -> None:
    tiny = ModelConfig(layers=1, heads=2, width=16, block=16)
    text = one_thread(lambda: observed(7, 2, tiny, "adamw", "uniform") + "\n" + beside_plain_loop(3, 2, tiny))
    print(text)
    assert text.count("/") >= 2


if __name__ == "__main__":
    main()
