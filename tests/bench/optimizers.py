"""What a step of each arm costs, × torch's fused AdamW on the same tensors: `python tests/bench/optimizers.py`.

The tensors are those of a byte GPT of 10.8 M parameters (6 blocks, 384 wide), with one gradient each. Every arm is
stepped counting flips and updates at every step, as it comes (counting all at every eighth step; GridOptim flips and
updates at each), counting all at every step, and without telemetry, each between two steps of the baseline, on one
thread unless asked otherwise; of the quieter half of the rounds the median is kept. Ratios carry over between machines
where milliseconds do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from quantize import provenance

from altgrad.training import GridOptim, ManifoldAdamW, RoundedAdamW, RoundedOptimizer
from altgrad.training.kernels import MEAN_EVERY, Counting
from altgrad.training.optimizer import COUNT_EVERY, GridAwareOptimizer

SAVED = Path(__file__).parents[2] / "docs" / "bench" / "optimizers.md"

ARMS: dict[str, Callable[[list[nn.Parameter]], GridAwareOptimizer]] = {
    "adamw (master)": lambda p: RoundedAdamW(p, format="E4M3"),
    "adamw_nearest": lambda p: RoundedAdamW(p, format="E4M3", rounding="nearest"),
    "adamw_sr": lambda p: RoundedAdamW(p, format="E4M3", rounding="stochastic"),
    "eco": lambda p: RoundedAdamW(p, format="E4M3", rounding="stochastic", error_feedback=True),
    "manifold (master)": lambda p: ManifoldAdamW(p, format="E4M3"),
    "manifold_sr": lambda p: ManifoldAdamW(p, format="E4M3", rounding="stochastic"),
    "manifold_gradient": lambda p: ManifoldAdamW(p, format="E4M3", precondition="gradient"),
    "grid": lambda p: GridOptim(p, format="E4M3"),
    "grid, carry": lambda p: GridOptim(p, format="E4M3", carry=True),
    "grid_literal": lambda p: GridOptim(p, lr=6.0, format="E4M3", normalize="none", step_unit="rungs"),
    "sgdm": lambda p: RoundedOptimizer(p, "sgdm", format="E4M3"),
    "lion": lambda p: RoundedOptimizer(p, "lion", format="E4M3"),
    "madam": lambda p: RoundedOptimizer(p, "madam", format="E4M3"),
    "muon": lambda p: RoundedOptimizer(p, "muon", format="E4M3"),
    "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
}


def gpt_tensors(layers: int, width: int) -> list[nn.Parameter]:
    """Parameters of a byte GPT with gradients, float32."""
    generator = torch.Generator().manual_seed(0)
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    shapes = [(256, width), (256, width), *(shape for _ in range(layers) for shape in block), (width,)]
    found = []
    for shape in shapes:
        parameter = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator) * 1e-3
        found.append(parameter)
    return found


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes: of processor time on one thread, for the machine is shared, else of wall time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


SETTINGS = {
    "flips and updates": (True, 0),
    "as it comes": (True, COUNT_EVERY),
    "all at every step": (True, 1),
    "no telemetry": (False, 1),
}
"""`telemetry` and `count_every` of the columns; 0 stands for flips and updates alone, at every step."""


def choose(own: GridAwareOptimizer, telemetry: bool, count_every: int) -> None:
    """Makes an arm count so from now on."""
    own.telemetry, own.count_every = telemetry, count_every or COUNT_EVERY
    vars(own).pop("_counting", None)
    if not count_every:
        own._counting = lambda group: Counting.MOVES


def ratios(make: Callable, rounds: int, shape: tuple[int, int]) -> list[float]:
    """A step under each setting by the mean of the baseline's before and after it; medians of the quieter half.

    A round is `MEAN_EVERY` steps, of which one measures the mean spacing and, as it comes, every `COUNT_EVERY`-th
    counts; the settings take turns.
    """
    baseline = torch.optim.AdamW(gpt_tensors(*shape), fused=True)
    own = make(gpt_tensors(*shape))
    # The mean spacing is measured at each of the first steps; what counts is the long run.
    for _ in range(MEAN_EVERY + 1):
        own.step(), baseline.step()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, setting in SETTINGS.items():
            times = []
            choose(own, *setting)
            for _ in range(MEAN_EVERY):
                before, mine, after = seconds(baseline.step), seconds(own.step), seconds(baseline.step)
                times.append((before + mine + after, 2 * mine / (before + after)))
            found[name].append((sum(t for t, _ in times), statistics.fmean(share for _, share in times)))
    return [statistics.median(share for _, share in sorted(each)[: (rounds + 1) // 2]) for each in found.values()]


def table(names: list[str], rounds: int, threads: int, shape: tuple[int, int]) -> str:
    """The measured arms as markdown."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    lines = [
        "| arm | " + " | ".join(SETTINGS) + " | telemetry adds, as it comes / at every step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    try:
        for name in names:
            lines.append(_line(name, rounds, shape))
            print(lines[-1], flush=True)
    finally:
        torch.set_num_threads(before)
    count = sum(p.numel() for p in gpt_tensors(*shape))
    head = f"# Time of an optimizer step, × torch's fused AdamW\n\n{provenance()}\n\n{count / 1e6:.1f} M parameters, "
    return head + f"E4M3, {threads} thread{'s' * (threads > 1)}, median of {rounds}.\n\n" + "\n".join(lines) + "\n"


def _line(name: str, rounds: int, shape: tuple[int, int]) -> str:
    moves, usual, always, bare = ratios(ARMS[name], rounds, shape)
    if "torch" in name:
        return f"| {name} | – | – | – | {bare:.2f} | – |"
    return (
        f"| {name} | {moves:.2f} | {usual:.2f} | {always:.2f} | {bare:.2f} | {100 * (usual / bare - 1):+.0f} % / "
        f"{100 * (always / bare - 1):+.0f} % |"
    )


def main() -> None:
    """Measures, prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rounds", type=int, default=9, help="of which the median is kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, default=None, help=f"markdown file to write, e.g. {SAVED.name}")
    asked = parser.parse_args()
    text = table(asked.arms, asked.rounds, asked.threads, (6, 384))
    if asked.save is not None:
        asked.save.parent.mkdir(parents=True, exist_ok=True)
        asked.save.write_text(text)
        print(text)


@pytest.mark.bench
def test_the_benchmark_runs_and_prints_its_table() -> None:
    text = table(list(ARMS), 3, 1, (1, 64))
    assert all(f"| {name} |" in text for name in ARMS)


if __name__ == "__main__":
    main()
