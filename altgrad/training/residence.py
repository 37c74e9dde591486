"""Where an arm's weights live, and with it the arm that differs from it in nothing but the step rule.

What geometry gains is the difference between two arms whose weights live in the same place, float32 master weights or
the format's grid: against an arm that lives elsewhere it would count what the residence costs too.
"""

from __future__ import annotations

from altgrad.training.arm_configs import AnyOptimizerConfig, GridOptimConfig, ManifoldAdamWConfig, RoundedAdamWConfig
from altgrad.training.rules import RULES

FLOAT_BYTES = 4


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


def bytes_per_weight(optimizer: AnyOptimizerConfig, bits: int) -> tuple[float, float]:
    """What has to be kept of a weight between steps, and of the optimizer for it, bytes.

    `bits`: of the format. A master weight and every moment are float32; a weight on the grid takes the format's bits.
    """
    is_on_grid = isinstance(optimizer, GridOptimConfig) or getattr(optimizer, "rounding", None) is not None
    return bits / 8 if is_on_grid else FLOAT_BYTES, FLOAT_BYTES * state_tensors(optimizer)


def state_tensors(optimizer: AnyOptimizerConfig) -> int:
    """How many tensors of a weight's shape the optimizer keeps for it."""
    if isinstance(optimizer, GridOptimConfig):
        return 1 + (optimizer.normalize == "rms") + optimizer.carry
    return len(RULES[optimizer.kind].state) if optimizer.kind in RULES else 2
