"""A resident weight and its layer keep one grid, through copying, saving, converting back and disagreeing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from altgrad.quantization import dequantize_model, quantize_model, quantized_parameters
from altgrad.training import GridOptim, RoundedAdamW


def model_on_grid(name: str = "E4M3") -> tuple[nn.Sequential, GridOptim]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    quantize_model(model, format=name)
    return model, GridOptim(model.parameters(), lr=1e-2, format=name)


def moved(model: nn.Module) -> int:
    """How many weights a layer would round again."""
    return sum(int((layer.quantized_weight() != layer.weight).sum()) for layer in (model[0], model[2]))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, sign: float = 1.0) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(16, 32, generator=generator)).square().mean().mul(sign).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copied_model_keeps_its_grid_and_trains_on_to_the_same_numbers(copied):
    model, optimizer = model_on_grid()
    train(model, optimizer)
    assert moved(copied(model)) == moved(model) == 0
    other_model, other = copied((model, optimizer))
    for _ in range(4):
        train(model, optimizer)
        train(other_model, other)
    assert torch.equal(model[0].weight, other_model[0].weight)
    assert moved(other_model) == 0


@pytest.mark.parametrize("make", [lambda p: RoundedAdamW(p, format="E4M3"), lambda p: GridOptim(p, format="E4M3")])
def test_a_pickled_optimizer_goes_on(make):
    model = nn.Sequential(nn.Linear(32, 8))
    model, optimizer = pickle.loads(pickle.dumps((model, make(model.parameters()))))
    train(model, optimizer)
    assert optimizer.telemetry and optimizer.counts


@pytest.mark.parametrize("assign", [False, True])
def test_a_fresh_model_given_the_state_keeps_the_grid(assign):
    model, optimizer = model_on_grid()
    train(model, optimizer)
    fresh = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
    quantize_model(fresh, format="E4M3")
    fresh.load_state_dict(model.state_dict(), assign=assign)
    assert moved(fresh) == 0
    later = GridOptim(fresh.parameters(), lr=1e-2, format="E4M3")
    assert torch.equal(fresh[0].weight, model[0].weight)
    later.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    train(fresh, later)
    assert torch.equal(fresh[0].weight, model[0].weight)


def test_resuming_model_first_is_exact_after_the_scale_has_grown():
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
        quantize_model(model, format="E0M7")
        return model

    model = build()
    optimizer = RoundedAdamW(model.parameters(), lr=5e-2, format="E0M7", rounding="stochastic")
    start = float(model[0].weight.grid.scale)
    train(model, optimizer, 60, sign=-1.0)  # weights grow
    assert float(model[0].weight.grid.scale) > start
    resumed = build()
    resumed.load_state_dict(model.state_dict())
    other = RoundedAdamW(resumed.parameters(), lr=5e-2, format="E0M7", rounding="stochastic")
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed[0].weight, model[0].weight)
    train(model, optimizer)
    train(resumed, other)
    assert torch.equal(resumed[0].weight, model[0].weight)


def test_converting_back_forgets_the_grid():
    model, _ = model_on_grid("E7M0")
    before = model[0].weight.detach().clone()
    dequantize_model(model)
    quantize_model(model, format="E0M7")
    assert not hasattr(nn.Linear(2, 2).weight, "grid") and model[0].grid.scale is None
    assert model[0].quantized_weight().abs().max() == pytest.approx(before.abs().max().item(), rel=1e-2)


def test_a_master_arm_takes_over_from_a_resident_one():
    model, _ = model_on_grid()
    RoundedAdamW(model.parameters(), format="E4M3")
    assert model[0].grid.scale is None


@pytest.mark.parametrize("make", [lambda p: GridOptim(p, format="E4M3"), lambda p: RoundedAdamW(p, format="E5M2")])
def test_an_optimizer_of_another_format_is_refused(make):
    model = nn.Sequential(nn.Linear(4, 4))
    quantize_model(model, format="E3M4")
    with pytest.raises(ValueError, match="already takes E3M4"):
        make([model[0].weight])
    assert list(quantized_parameters(model)) == ["0"]
