"""What a gradient becomes, for the arms that are not built on Adam's unit step; and the registry they are named in.

A rule is a pure function of one tensor's gradient, weight and state: it returns the direction that `lr` multiplies,
and the new state. Where the weights live, rounding, counting, skipping and resuming are the plumbing's, so a new arm is
a function here and a row in `RULES`.

| rule | direction | unit of lr |
| --- | --- | --- |
| sgdm | m = momentum · m + g (arXiv 1902.00384, heavy ball) | weights per unit of gradient |
| lion | sign(momentum · m + (1 - momentum) · g) (arXiv 2302.06675) | change of every weight per step |
| madam | w · (1 - exp(-lr · sign(w) · ĝ)) / lr, ĝ = clip(g / √v̂, ± 10) (arXiv 2006.14560) | relative change |
| muon | 0.2 · √max(rows, columns) · UVᵀ of the Nesterov momentum (arXiv 2502.16982) | AdamW's, by its RMS of 0.2 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from altgrad.registry import Registry

State = Mapping[str, Tensor]
Update = Callable[[Tensor, Tensor, State, Mapping[str, Any], Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(grad, weight, state, group, number of this step) -> (direction, new state), all float32 of the weight's shape."""

MADAM_CLIP = 10.0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration and, below, how often it runs: singular values end within 0.7 … 1.2."""
NEWTON_SCHULZ_STEPS = 5


def sgdm(
    grad: Tensor, weight: Tensor, state: State, group: Mapping[str, Any], step: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Heavy-ball momentum."""
    velocity = state["exp_avg"] * group["momentum"] + grad
    return velocity, {"exp_avg": velocity}


def lion(
    grad: Tensor, weight: Tensor, state: State, group: Mapping[str, Any], step: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sign of an interpolated momentum."""
    mean, momentum, beta2 = state["exp_avg"], group["momentum"], group["beta2"]
    direction = (mean * momentum + grad * (1 - momentum)).sign()
    return direction, {"exp_avg": mean * beta2 + grad * (1 - beta2)}


def madam(
    grad: Tensor, weight: Tensor, state: State, group: Mapping[str, Any], step: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """A multiplicative step: no weight changes its sign, and one that is zero stays."""
    beta2, rate = group["beta2"], group["lr"]
    second = state["exp_avg_sq"] * beta2 + grad * grad * (1 - beta2)
    root = (second / (1 - beta2**step)).sqrt()
    normalized = torch.where(root > 0, grad / root, 0.0).clamp(-MADAM_CLIP, MADAM_CLIP)
    direction = weight * -torch.expm1(normalized * weight.sign() * -rate) / rate if rate > 0 else weight * 0
    return direction, {"exp_avg_sq": second}


def muon(
    grad: Tensor, weight: Tensor, state: State, group: Mapping[str, Any], step: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The nearest semi-orthogonal matrix to the momentum; for matrices (further axes count as columns).

    Not for embeddings and heads, whose rows are learned one by one: give these the rule 'adam'.
    """
    momentum = group["momentum"]
    velocity = state["exp_avg"] * momentum + grad * (1 - momentum)
    ahead = velocity * momentum + grad * (1 - momentum)
    matrix = ahead.flatten(1)
    direction = orthogonalized(matrix) * (0.2 * max(matrix.shape) ** 0.5)
    return direction.view_as(weight), {"exp_avg": velocity}


def orthogonalized(matrix: Tensor) -> Tensor:
    """UVᵀ of the matrix' singular value decomposition, roughly, by a Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@dataclass(frozen=True)
class Rule:
    """A row of the registry: the update, the names of its state, its default parameters and the unit of its lr."""

    update: Update
    state: tuple[str, ...]
    unit: str
    defaults: dict[str, float] = field(default_factory=dict)
    least_axes: int = 0
    """Tensors with fewer axes take the rule 'adam'."""
    takes_rows: bool = True
    """whether it suits embeddings, whose rows are learned one by one; else these take the rule 'adam'"""


RULES: Registry[Rule] = Registry(
    {
        "sgdm": Rule(sgdm, ("exp_avg",), "weights per unit of gradient", {"lr": 0.1, "momentum": 0.9}),
        "lion": Rule(
            lion, ("exp_avg",), "change of every weight per step", {"lr": 5e-4, "momentum": 0.9, "beta2": 0.95}
        ),
        "madam": Rule(madam, ("exp_avg_sq",), "relative change of a weight per step", {"lr": 3e-2, "beta2": 0.95}),
        "muon": Rule(
            muon,
            ("exp_avg",),
            "AdamW's: mean |change| per weight and step, by RMS",
            {"lr": 2e-3, "momentum": 0.95},
            least_axes=2,
            takes_rows=False,
        ),
    }
)
"""Arms by rule; each keeps its weights as a float32 master or on the grid, as `rounding` says."""
