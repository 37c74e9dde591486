"""What a sweep will cost and what it can decide, before anything is started.

Time is measured, not guessed: one trial of each class of equal cost is trained for twenty steps, with as many at once
as will run, since processes that share a memory bus slow each other down. What Ray adds was measured once: a few
seconds to start, a fraction of a second per trial in a reused actor. Guards end trials early, so an estimate is an
upper one where formats fail.
"""

from __future__ import annotations

import heapq
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from altgrad.quantization import get_format
from altgrad.sweep.engine.processes import nobodys_main
from altgrad.sweep.options import RunOptions
from altgrad.training.config import UNQUANTIZED, TrainConfig

START_SECONDS = 9.0
"""From the command to the first trial's first step: Ray, and the actors' import of torch."""
TRIAL_SECONDS = 0.3
"""What Tune and the ledger add to a trial in a reused actor."""
REPORT_SECONDS = 5.0
PROBE_INTERVAL = 10
LOOK_STEPS = 60
"""Of a reference, before it is looked at for what other formats would make of it."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one trial's parts on one slot, while the other slots are busy too."""

    build: float
    step: float
    evaluation: float
    """one evaluation and checkpoint"""

    def of(self, config: TrainConfig) -> float:
        """Seconds of the whole trial."""
        evaluations = math.ceil(config.steps / config.eval_interval)
        return TRIAL_SECONDS + self.build + config.steps * self.step + evaluations * self.evaluation


@dataclass(frozen=True)
class Estimate:
    """What the trials will take: wall-clock seconds of the whole command, and of GPUs; dollars where priced."""

    classes: int
    wall_seconds: float
    gpu_seconds: float
    usd: float | None


def cost_class(config: TrainConfig) -> str:
    """Trials with the same text take equally long per step."""
    kind = config.format if config.format == UNQUANTIZED else str(get_format(config.format).total_bits > 8)
    return "|".join(
        [
            config.task,
            config.model.model_dump_json(),
            config.data.model_dump_json(),
            kind,
            config.recipe_name,
            config.arm,
            config.observe.model_dump_json(),
            str(len(config.interventions)),
        ]
    )


def probe(config: TrainConfig) -> Cost:
    """Trains twenty steps in this process, one thread; a first run, not counted, compiles and loads what is kept."""
    import torch

    from altgrad.training.trainer import Trainer

    torch.set_num_threads(1)
    short = config.model_copy(
        update={
            "steps": 2 * PROBE_INTERVAL,
            "log_interval": PROBE_INTERVAL,
            "eval_interval": 2 * PROBE_INTERVAL,
            "checkpoint_interval": 2 * PROBE_INTERVAL,
            "guards": (),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        for _ in Trainer(short, folder=Path(folder) / "warm").intervals():
            pass
        begun = time.perf_counter()
        intervals = Trainer(short, folder=Path(folder) / "measured").intervals()
        built = time.perf_counter()
        next(intervals)
        plain = time.perf_counter()
        for _ in intervals:
            pass
        ended = time.perf_counter()
    step = (plain - built) / PROBE_INTERVAL
    return Cost(built - begun, step, max(0.0, (ended - plain) - (plain - built)))


def look_ahead(config: TrainConfig) -> list[tuple[int, str, str, float]]:
    """What layers of a reference show of other formats after LOOK_STEPS: (step, layer, signal, value).

    In this process, one thread; ValueError where it is no reference.
    """
    import torch

    from altgrad.training.trainer import Trainer

    if not config.is_reference:
        raise ValueError(f"{config.format} {config.arm} is no reference: BF16 with adamw is expected")
    torch.set_num_threads(1)
    intervals = dict.fromkeys(("log_interval", "eval_interval", "checkpoint_interval", "steps"), LOOK_STEPS)
    trainer = Trainer(config.model_copy(update=intervals | {"guards": ()}))
    trainer.run()
    layers = trainer.rows[-1]["layers"].items()
    return [
        (LOOK_STEPS, layer, signal, value)
        for layer, signals in layers
        for signal, value in signals.items()
        if "@" in signal
    ]


def measure(trials: Iterable[TrainConfig], concurrent: int) -> dict[str, Cost]:
    """The cost of each class among the trials, `concurrent` probes at a time."""
    chosen: dict[str, TrainConfig] = {}
    for config in trials:
        chosen.setdefault(cost_class(config), config)
    probes = list(chosen.items())
    # The slots that a last round would leave empty are filled, or its probes would run too fast.
    padded = probes + [probes[i % len(probes)] for i in range(-len(probes) % concurrent)]
    context = multiprocessing.get_context("spawn")
    with nobodys_main(), ProcessPoolExecutor(min(concurrent, len(padded)), mp_context=context) as pool:
        costs = list(pool.map(probe, [config for _, config in padded]))
    return {name: cost for (name, _), cost in zip(probes, costs, strict=False)}


def estimate(
    trials: Mapping[str, TrainConfig], slots_at_once: int, probes_at_once: int, options: RunOptions
) -> Estimate:
    """What these trials will take on so many slots, after measuring them; nothing is recorded anywhere."""
    if not trials:
        return Estimate(0, 0.0, 0.0, None)
    shares = [_share(config, options.workers_per_trial) for config in trials.values()]
    costs = measure(shares, probes_at_once)
    seconds = [costs[cost_class(config)].of(config) for config in shares]
    slots = [0.0] * min(slots_at_once, len(seconds))
    for each in seconds:
        heapq.heappush(slots, heapq.heappop(slots) + each)
    gpu_seconds = sum(seconds) * options.gpus * options.workers_per_trial
    price = options.budget.usd_per_gpu_hour
    usd = None if price is None else gpu_seconds / 3600 * price
    return Estimate(len(costs), START_SECONDS + max(slots) + REPORT_SECONDS, gpu_seconds, usd)


def _share(config: TrainConfig, workers: int) -> TrainConfig:
    """What one of the trial's workers does."""
    return config.model_copy(update={"data": config.data.model_copy(update={"batch": config.data.batch // workers})})
