"""What ranks cost on the default schedule, × the same matrices' singular values: `python tests/bench/ranks.py`.

The matrices are those of a 12-layer GPT, 768 wide, as nn.Linear holds them: [2304, 768], [768, 768], [3072, 768] and
[768, 3072] a layer, and on demand the head [50257, 768]. A schedule of one exact check in N costs

    (exact check + (N - 1) warm checks) / (N * torch.linalg.svdvals of every matrix)

in float32 on one thread. Every round times all three, one after the other, so that a neighbour on the machine slows
them alike; the median of the rounds' ratios is kept. Between warm checks the weights drift, by 1 % of their energy,
as a random direction is the hardest to follow; the worst error of the estimated stable ranks stands beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from altgrad.quantization import RankGauge, SpectralNormTracker, compute_stable_rank
from altgrad.quantization.spectral_norm import EXACT_EVERY

LIMIT = 1 / 15
DRIFT = 0.01


class Round(NamedTuple):
    """Seconds for all matrices once."""

    singular_values: float
    exact: float
    warm: float

    def ratio(self, exact_every: int = EXACT_EVERY) -> float:
        """Cost of the schedule, x the singular values at each check."""
        return (self.exact + (exact_every - 1) * self.warm) / (exact_every * self.singular_values)


def matrices(layers: int, width: int, head: int) -> dict[str, Tensor]:
    """Gaussian weights by name, 0.02 wide as at the start of training."""
    shapes = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
    named = {
        f"h.{layer}.{name}": torch.randn(rows * width, columns * width) * 0.02
        for layer in range(layers)
        for name, (rows, columns) in shapes.items()
    }
    return named | ({"lm_head": torch.randn(head, width) * 0.02} if head else {})


def drifted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with a share of their energy renewed."""
    return {name: w * (1 - DRIFT) ** 0.5 + torch.randn_like(w) * w.std() * DRIFT**0.5 for name, w in weights.items()}


def measure(weights: dict[str, Tensor], rounds: int) -> list[Round]:
    """The rounds' times on one thread; torch's setting is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gauge, always = RankGauge(), RankGauge(exact_every=1)
    gauge.measure(weights)
    found = []
    try:
        for number in range(rounds):
            assert (number + 1) % EXACT_EVERY, "this round's check would be exact"
            values = _seconds(lambda: [torch.linalg.svdvals(w) for w in weights.values()])
            exact = _seconds(lambda: always.measure(weights))
            found.append(Round(values, exact, _seconds(lambda: gauge.measure(weights))))
    finally:
        torch.set_num_threads(before)
    return found


def worst_error(weights: dict[str, Tensor], checks: int) -> float:
    """Largest relative error of a warm stable rank over drifting weights, against the exact one."""
    tracker, worst = SpectralNormTracker(), 0.0
    for check in range(checks):
        for name, weight in weights.items():
            estimate = tracker.update(name, weight).stable_rank
            if check:
                worst = max(worst, abs((estimate / compute_stable_rank(weight)).item() - 1))
        weights = drifted(weights)
    return worst


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(rounds: list[Round], error: float) -> str:
    """The table: times, the ratio at the default schedule and at others, and the error."""
    times = {name: statistics.median(getattr(r, name) for r in rounds) for name in Round._fields}
    lines = [f"{name}: {1e3 * value:.1f} ms" for name, value in times.items()]
    for exact_every in sorted({1, 4, 10, EXACT_EVERY, 40}):
        ratio = statistics.median(r.ratio(exact_every) for r in rounds)
        mark = f"  <- default, limit 1/{1 / LIMIT:.0f}" if exact_every == EXACT_EVERY else ""
        lines.append(f"exact once in {exact_every:2d} checks: {ratio:.4f} = 1/{1 / ratio:.1f} of svdvals{mark}")
    lines.append(f"worst relative error of a warm stable rank, {DRIFT:.0%} drift a check: {error:.1e}")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--head", type=int, default=0, help="rows of the head, 0 for none; GPT-2's has 50257")
    parser.add_argument("--rounds", type=int, default=5, help=f"at most {EXACT_EVERY - 1}")
    asked = parser.parse_args()
    torch.manual_seed(0)
    weights = matrices(asked.layers, asked.width, asked.head)
    rounds = measure(weights, min(asked.rounds, EXACT_EVERY - 1))
    print(report(rounds, worst_error(matrices(1, asked.width, 0), 8)))


@pytest.mark.bench
def test_the_benchmark_runs_and_prints_its_ratio() -> None:
    weights = matrices(1, 64, 0)
    text = report(measure(weights, 3), worst_error(weights, 4))
    print(text)
    assert "<- default" in text


if __name__ == "__main__":
    main()
