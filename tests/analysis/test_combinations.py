"""Every format with every arm in every layer type: a few real steps, then where the weights are."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from altgrad.analysis.test_matrix import TINY, VOCABULARY, Combination, combinations
from altgrad.quantization import named_policy, quantize, quantize_model, quantized_parameters
from altgrad.training.arm_configs import ARMS
from altgrad.training.arms import build_optimizer
from altgrad.training.config import TrainConfig
from altgrad.training.model import build_model

STEPS = 4
ON_THE_GRID = {name for name, arm in ARMS.items() if arm.kind == "grid" or arm.rounding is not None}
MAY_STAND_STILL = {"adamw_nearest", "grid_literal"}
"""Rounding to nearest, or raw velocities, may rightly move nothing in a few steps."""


@cache
def trained(name: str, arm: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weight before and after, and last gradient, by layer."""
    torch.set_num_threads(1)
    config = TrainConfig(format=name, optimizer=ARMS[arm], model=TINY)
    model = build_model(TINY, vocabulary=VOCABULARY, seed=0)
    quantize_model(model, policy=named_policy("uniform", name))
    optimizer = build_optimizer(config, model)
    parameters = quantized_parameters(model)
    before = {layer: weight.detach().clone() for layer, (weight, _) in parameters.items()}
    tokens = torch.randint(VOCABULARY, (4, TINY.block + 1), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return {
        layer: (before[layer], weight, weight.grad)
        for layer, (weight, _) in parameters.items()
        if weight.grad is not None
    }


def named(item: Combination) -> str:
    return f"{item.format}-{item.arm}-{item.layer.short}"


@pytest.mark.parametrize("item", combinations(), ids=named)
def test_combination(item: Combination) -> None:
    layers = trained(item.format, item.arm)
    before, weight, grad = layers[item.layer.weight]
    assert torch.isfinite(weight).all() and torch.isfinite(grad).all()
    assert (grad != 0).any(), "no gradient reached the weight"
    if item.arm in ON_THE_GRID:
        assert torch.equal(quantize(weight.detach(), item.format, weight.grid.scale), weight.detach())
    if item.arm not in MAY_STAND_STILL:
        assert not torch.equal(weight.detach(), before), "the arm moved nothing"
