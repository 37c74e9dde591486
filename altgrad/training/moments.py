"""Adam's unit step, once, for every arm that is built on it (arXiv 1412.6980)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def adam_direction(grad: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """m̂ / (√v̂ + eps), fresh; advances the moments in `state` (float32, of the gradient's shape).

    `state["step"]` is the number of this step, 1 for the first.
    """
    beta1, beta2 = betas
    step = float(state["step"])
    first: Tensor = state["exp_avg"].lerp_(grad, 1 - beta1)
    second: Tensor = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    return first.div(1 - beta1**step).div_(denominator)
