"""Floor 2: one training loop and what it needs. Imports torch and `altgrad.quantization`; never Ray."""

from altgrad.training.arms import ManifoldAdamW, RoundedAdamW, RoundedOptimizer, build_optimizer
from altgrad.training.config import ARMS, TrainConfig
from altgrad.training.grid_optim import GridOptim
from altgrad.training.guards import DEFAULT_GUARDS, GuardRule, when
from altgrad.training.outcome import Outcome, OutcomeKind
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
    "build_optimizer",
    "when",
]
