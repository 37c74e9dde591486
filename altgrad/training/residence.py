"""Where an arm's weights live, and with it the arm that differs from it in nothing but the step rule.

What geometry gains is the difference between two arms whose weights live in the same place, float32 master weights or
the format's grid: against an arm that lives elsewhere it would count what the residence costs too.
"""

from __future__ import annotations

from altgrad.training.config import AnyOptimizerConfig, GridOptimConfig, ManifoldAdamWConfig, RoundedAdamWConfig


def plain_arm(optimizer: AnyOptimizerConfig) -> str:
    """The AdamW arm of the same residence; "" for an arm whose steps do not follow the format's geometry."""
    if isinstance(optimizer, GridOptimConfig):
        return RoundedAdamWConfig(rounding="stochastic").arm
    if isinstance(optimizer, ManifoldAdamWConfig):
        return RoundedAdamWConfig(rounding=optimizer.rounding).arm
    return ""


def control_arm(optimizer: AnyOptimizerConfig) -> str:
    """The arm that takes the same steps over float32 weights that no layer rounds; "" where there is none."""
    if not isinstance(optimizer, ManifoldAdamWConfig) or not optimizer.quantized:
        return ""
    is_twin = optimizer.rounding is None and optimizer.precondition == "update"
    return ManifoldAdamWConfig(quantized=False).arm if is_twin else ""
