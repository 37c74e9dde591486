"""GridOptim: whole rungs, unbiased, clipped, on the grid, and nothing moves without a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from altgrad.quantization import get_format, quantize
from altgrad.quantization.ops import code_index
from altgrad.training import GridOptim

FORMATS = ("E0M7", "E3M4", "E4M3", "E5M2", "E7M0")
LITERAL = {"normalize": "none", "step_unit": "rungs", "momentum": 0.0, "lr": 1.0}


def normal(seed: int = 0, shape=(64, 64)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02)


def step(optimizer: GridOptim, weight: nn.Parameter, grad: Tensor) -> tuple[int, int]:
    weight.grad = grad
    flips, updates = optimizer.step()
    return flips, updates


def codes(weight: nn.Parameter, name: str) -> Tensor:
    return code_index(weight.detach(), name, weight.grid.scale)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("normalize", ["rms", "none"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_hundred_steps_without_gradient_from_rest_flip_nothing(name, normalize, carry):
    weight = normal()
    optimizer = GridOptim([weight], lr=0.1, format=name, normalize=normalize, carry=carry)
    before = weight.detach().clone()
    assert [step(optimizer, weight, torch.zeros_like(before)) for _ in range(100)] == [(0, 0)] * 100
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("velocity", [0.03, 0.25, 0.9, 1.7, 4.6])
@pytest.mark.parametrize("clip", [1.0, 3.0])
def test_rungs_moved_are_the_clipped_velocity_on_average(velocity, clip):
    count = 100_000
    weight = nn.Parameter(torch.full((count,), 0.5))
    optimizer = GridOptim([weight], format="E4M3", rung_clip=clip, tensor_scale=2.0**-6, **LITERAL)
    before = codes(weight, "E4M3")
    step(optimizer, weight, torch.full((count,), velocity))
    moved = (before - codes(weight, "E4M3")).double()
    wanted = min(velocity, clip)
    deviation = (wanted % 1) * (1 - wanted % 1)
    assert abs(moved.mean() - wanted) <= 4 * (deviation / count) ** 0.5
    assert moved.max() <= clip and moved.min() >= 0


@pytest.mark.parametrize("carry", [False, True])
def test_no_weight_ever_moves_further_than_rung_clip(carry):
    weight = normal()
    optimizer = GridOptim([weight], format="E3M4", rung_clip=2.0, carry=carry, **LITERAL)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        before = codes(weight, "E3M4")
        step(optimizer, weight, torch.randn(64, 64, generator=generator) * 5)
        assert (codes(weight, "E3M4") - before).abs().max() <= 2


def test_with_carry_the_place_stays_within_one_rung_of_the_exact_sum():
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = GridOptim([weight], format="E0M7", carry=True, rung_clip=2.0, tensor_scale=1.0, **LITERAL)
    generator, exact = torch.Generator().manual_seed(1), torch.zeros(4096, dtype=torch.float64)
    for _ in range(50):
        grad = torch.randn(4096, generator=generator) * 0.4
        exact -= grad.clamp(-2, 2).double()
        step(optimizer, weight, grad)
        assert (codes(weight, "E0M7") - exact).abs().max() <= 1 + 1e-4


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_always_on_the_grid(name, carry):
    weight = normal()
    optimizer = GridOptim([weight], lr=1e-2, format=name, carry=carry)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step(optimizer, weight, torch.randn(64, 64, generator=generator))
        assert torch.equal(quantize(weight.detach(), name, weight.grid.scale), weight.detach())
    values = get_format(name).values * weight.grid.scale
    assert torch.isin(weight.detach(), values).all()


def test_a_doubled_scale_alone_counts_no_flip():
    # All weights lie at the end of the grid and want out: the scale doubles, no code under it counts as moved.
    weight = nn.Parameter(torch.full((2048,), 127 / 128))
    optimizer = GridOptim([weight], format="E0M7", tensor_scale=1.0, **LITERAL)
    optimizer.count_every = 1
    counts = []
    for _ in range(3):
        step(optimizer, weight, -torch.ones(2048))
        counts.append(optimizer.counts[weight])
    assert [int(c.rescaled) for c in counts] == [0, 0, 1] and float(weight.grid.scale) == 2.0
    assert [int(c.flips) for c in counts] == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_leaves_the_weight(bad):
    weight = normal()
    optimizer = GridOptim([weight], lr=1e-2, format="E4M3")
    before = weight.detach().clone()
    grad = torch.ones(64, 64)
    grad[1, 2] = bad
    assert step(optimizer, weight, grad) == (0, 0)
    assert torch.equal(weight.detach(), before) and int(optimizer.skipped) == 1


def test_a_nan_weight_stays_visible():
    weight = normal()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    optimizer = GridOptim([weight], lr=1e-2, format="E4M3")
    step(optimizer, weight, torch.ones(64, 64))
    assert weight[0, 0].isnan() and weight.isnan().sum() == 1


def test_the_stall_ratio_stays_in_bounds_on_sparse_gradients_with_momentum():
    weight = normal()
    optimizer = GridOptim([weight], lr=2e-2, format="E4M3")
    optimizer.count_every = 1
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        grad = torch.randn(64, 64, generator=generator) * (torch.rand(64, 64, generator=generator) < 0.02)
        flips, updates = step(optimizer, weight, grad)
        assert 0 <= flips <= updates
        assert int(optimizer.counts[weight].gradient) <= int((grad != 0).sum())


def test_loaded_weights_are_taken_at_their_nearest_point():
    weight = normal()
    optimizer = GridOptim([weight], lr=1e-2, format="E4M3")
    step(optimizer, weight, torch.ones(64, 64))
    loaded = normal(seed=5).detach()
    with torch.no_grad():
        weight.copy_(loaded)
    optimizer.state[weight]["exp_avg"].zero_()
    step(optimizer, weight, torch.zeros(64, 64))
    assert torch.equal(weight.detach(), quantize(loaded, "E4M3", weight.grid.scale))


def test_equal_seeds_give_equal_runs_and_others_do_not():
    def run(seed: int) -> Tensor:
        weight = normal()
        optimizer = GridOptim([weight], lr=3e-3, format="E4M3", seed=seed)
        for _ in range(5):
            step(optimizer, weight, normal(seed=9).detach())
        return weight.detach()

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))
