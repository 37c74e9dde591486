"""What observers share: what they look at, when they are called, what they hand back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from altgrad.quantization import FloatFormat, multiplied_parameters
from altgrad.training.optimizer import GridAwareOptimizer

Readings = dict[tuple[str, str], Tensor]
"""(layer, signal) to a 0-d tensor; the layer "" is the row itself."""

Layers = dict[str, dict[str, Any]]
"""Layer to signal to a plain number."""


@dataclass
class Subject:
    """What is looked at.

    `formats`: the weights that have one, by layer; `watched`: the weight matrices whose ranks and gradients are
    followed, by layer (those with a format, or of every product where none has); `critical`: names of the layers
    whose collapse costs the most; `epoch`: the steps of a pass over the training data.
    """

    model: nn.Module
    optimizer: GridAwareOptimizer
    formats: Mapping[str, tuple[nn.Parameter, FloatFormat]]
    critical: tuple[str, ...] = ()
    epoch: float = math.nan
    watched: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.watched = self.rounded or multiplied_parameters(self.model)

    @property
    def rounded(self) -> dict[str, nn.Parameter]:
        """The weights that have a format, by layer."""
        return {name: parameter for name, (parameter, _) in self.formats.items()}


@dataclass(frozen=True)
class Moment:
    """A training step, and what is due: `check` ends a log interval, `detail` is a check on the rarer schedule."""

    step: int
    check: bool
    detail: bool
    shadow: bool = False


class Observer:
    """Looks at a step and changes nothing; each method may be left out.

    `start_step`, `before_update` (gradients are there, untouched) and `after_update` are called at every step,
    `collect` and `finish` at a check: the first hands over 0-d tensors without waiting for them, the second gets the
    plain numbers of all observers and may derive from them. What begins with an underscore stays out of the row.
    """

    def start_step(self, moment: Moment) -> None:
        """Before the forward pass."""

    def before_update(self) -> None:
        """After the backward pass."""

    def after_update(self) -> None:
        """After the optimizer's step."""

    def collect(self) -> Readings:
        """What is to be fetched, and the start of the next interval."""
        return {}

    def finish(self, layers: Layers, row: dict[str, Any]) -> None:
        """Derives signals from fetched numbers, in place."""

    def close(self) -> None:
        """Takes its hooks off the model."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken."""
