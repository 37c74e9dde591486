"""Forward and backward of converted layers, × the plain layer in float32: `python tests/bench/layers.py`.

The layers are small, as in models that are studied on a CPU, so that what conversion adds weighs the most. Each round
times the plain and the converted layer one after the other, on one thread; the median of the rounds' ratios is kept,
with the 10th and 90th percentile beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad.quantization import quantize_model

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2d 32 x 32, 3 x 3, on 8 images of 16 x 16": (lambda: nn.Conv2d(32, 32, 3, padding=1), (8, 32, 16, 16)),
    "MultiheadAttention 128, 4 heads, on 8 x 64": (
        lambda: nn.MultiheadAttention(128, 4, batch_first=True),
        (8, 64, 128),
    ),
    "Linear 128 x 128 on 8 x 64": (lambda: nn.Linear(128, 128), (8, 64, 128)),
}


def seconds(layer: nn.Module, x: Tensor, weight: Tensor) -> float:
    """Of one forward and backward pass."""
    began = time.perf_counter()
    y: Any = layer(x, x, x, need_weights=False)[0] if hasattr(layer, "in_proj_weight") else layer(x)
    (y * weight).sum().backward()
    return time.perf_counter() - began


def ratios(make: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int) -> list[float]:
    """Converted over plain, in each round."""
    torch.manual_seed(0)
    plain, converted = nn.ModuleDict({"layer": make()}), nn.ModuleDict({"layer": make()})
    quantize_model(converted, "E4M3", policy="uniform_full")
    x = torch.randn(shape, requires_grad=True)
    with torch.no_grad():
        y = plain["layer"](x, x, x)[0] if hasattr(plain["layer"], "in_proj_weight") else plain["layer"](x)
    weight = torch.randn_like(y)
    found = []
    for _ in range(rounds + 5):
        one = seconds(plain["layer"], x, weight)
        found.append(seconds(converted["layer"], x, weight) / one)
    return found[5:]


@pytest.mark.bench
def test_the_benchmark_runs() -> None:
    for make, shape in LAYERS.values():
        assert all(ratio > 0 for ratio in ratios(make, shape, 3))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| layer | × plain | 10th to 90th percentile |\n| --- | ---: | ---: |")
    for name, (make, shape) in LAYERS.items():
        found = ratios(make, shape, rounds)
        tenths = statistics.quantiles(found, n=10)
        print(f"| {name} | {statistics.median(found):.2f} | {tenths[0]:.2f} to {tenths[-1]:.2f} |")


if __name__ == "__main__":
    main()
