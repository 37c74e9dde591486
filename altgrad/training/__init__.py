"""Floor 2: one training loop and what it needs. Uses torch and `altgrad.quantization`; never Ray.

What is named here is loaded when it is first asked for: records of trials can be read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from altgrad.training.arm_configs import ARMS
    from altgrad.training.arms import ManifoldAdamW, RoundedAdamW, RoundedOptimizer, build_optimizer
    from altgrad.training.config import TrainConfig
    from altgrad.training.grid_optim import GridOptim
    from altgrad.training.guards import DEFAULT_GUARDS, GuardRule, when
    from altgrad.training.outcome import Outcome, OutcomeKind
    from altgrad.training.own_loop import build_arm, weight_signals
    from altgrad.training.trainer import Reporter, Trainer

__all__ = [
    "ARMS",
    "DEFAULT_GUARDS",
    "GridOptim",
    "GuardRule",
    "ManifoldAdamW",
    "Outcome",
    "OutcomeKind",
    "Reporter",
    "RoundedAdamW",
    "RoundedOptimizer",
    "TrainConfig",
    "Trainer",
    "build_arm",
    "build_optimizer",
    "weight_signals",
    "when",
]

_PLACES = {
    "arms": ("ManifoldAdamW", "RoundedAdamW", "RoundedOptimizer", "build_optimizer"),
    "config": ("ARMS", "TrainConfig"),
    "grid_optim": ("GridOptim",),
    "guards": ("DEFAULT_GUARDS", "GuardRule", "when"),
    "outcome": ("Outcome", "OutcomeKind"),
    "own_loop": ("build_arm", "weight_signals"),
    "trainer": ("Reporter", "Trainer"),
}


def __getattr__(name: str) -> Any:
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{place}"), name)
