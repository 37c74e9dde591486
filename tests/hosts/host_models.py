"""A small converted model and the plain loop that every host is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from altgrad.quantization import LayerRule, PrecisionPolicy, QuantizedLinear, Role, ScaleRule, quantize_model
from altgrad.training import GridOptim, ManifoldAdamW, RoundedAdamW
from altgrad.training.arms import RoundedOptimizer

WIDTH, BATCH = 16, 8

ARMS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda params: RoundedAdamW(params, lr=1e-2, format="E4M3"),
    "manifold": lambda params: ManifoldAdamW(params, lr=1e-2, format="E4M3"),
    "manifold_sr": lambda params: ManifoldAdamW(params, lr=1e-2, format="E4M3", rounding="stochastic"),
    "eco": lambda params: RoundedAdamW(params, lr=1e-2, format="E4M3", rounding="stochastic", error_feedback=True),
    "grid": lambda params: GridOptim(params, lr=1e-2, format="E4M3"),
    "grid_carry": lambda params: GridOptim(params, lr=1e-2, format="E4M3", carry=True),
    "lion": lambda params: RoundedOptimizer(params, "lion", lr=1e-3, format="E4M3"),
    "muon": lambda params: RoundedOptimizer(params, "muon", lr=1e-2, format="E4M3", rounding=None),
}

STATEFUL = LayerRule(
    pattern="",
    weight=Role(format="E4M3", rounding="stochastic"),
    activation=Role(format="E4M3", scale=ScaleRule(kind="delayed", history=4)),
    gradient=Role(format="E5M2", scale=ScaleRule(kind="delayed", history=4), rounding="stochastic"),
)
"""Roles that keep something from step to step."""


class Net(nn.Module):
    """Two blocks with norms and biases between converted layers; its loss is a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def net(format: str | None = "E4M3", *, stateful: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net()
    if stateful:
        quantize_model(model, policy=PrecisionPolicy(rules=(STATEFUL,)))
    elif format is not None:
        quantize_model(model, format=format)
    return model


def batch(step: int, rows: int = BATCH) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1000 + step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4].sin()).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int] = range(6)) -> list[float]:
    """The plain loop: losses of the steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rounded_again(model: nn.Module) -> int:
    """Weights that a layer would move although an optimizer keeps them on the grid."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(int((layer.quantized_weight() != layer.weight).sum()) for layer in layers)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
