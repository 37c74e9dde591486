"""The processes that share one training, and the pieces in which each does its part of a batch.

The batch of a step belongs to the configuration; who works through it does not. With `world` workers of
`micro_batches` pieces each, every piece is an equal share of the batch, so that the mean over pieces and workers is
the mean over the batch. Gradients and loss are averaged in one collective per step, scale histories join in one more
where there are shared ones. From there on every worker does the same arithmetic on the same numbers (stochastic
rounding draws by seed and step), and weights stay equal without being sent. Only the first worker observes, judges
and writes; what it decides, the others are told once per log interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from altgrad.quantization import ScaleTracker, rounded_weights
from altgrad.quantization.scaling import synchronize_amax

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Piece `rank` of `world` equal pieces of a batch."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Workers:
    """This process's place among `world` of them, joined by torch.distributed's default group where world > 1."""

    rank: int = 0
    world: int = 1
    micro_batches: int = 1
    """pieces in which this process works through its share, gradients added up: less memory, more time"""

    @property
    def is_first(self) -> bool:
        """Whether this process observes, judges and writes."""
        return self.rank == 0

    @property
    def shares(self) -> list[Share]:
        """This process's pieces of a batch."""
        first, pieces = self.rank * self.micro_batches, self.world * self.micro_batches
        return [Share(first + i, pieces) for i in range(self.micro_batches)]

    def check(self, batch: int) -> None:
        """ValueError where a batch can't be shared evenly."""
        pieces = self.world * self.micro_batches
        if batch % pieces:
            raise ValueError(
                f"data.batch={batch} can't be shared evenly by {self.world} workers in "
                f"{self.micro_batches} micro-batches: a multiple of {pieces} is expected"
            )

    @torch.no_grad()
    def average(self, loss: Tensor, model: nn.Module) -> Tensor:
        """The mean loss, 0-d, over all workers; the gradients of the model become their means in place."""
        synchronize_amax(_shared_trackers(model))
        if self.world == 1:
            return loss
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
        distributed.all_reduce(flat)
        flat /= self.world
        for gradient, mean in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        return flat[0]

    def from_first(self, value: T) -> T:
        """What the first worker holds, for all of them."""
        if self.world == 1:
            return value
        sent = [value]
        distributed.broadcast_object_list(sent, src=0)
        return sent[0]


ALONE = Workers()


def _shared_trackers(model: nn.Module) -> list[ScaleTracker]:
    weights = rounded_weights(model).values()
    trackers = [quantizer.tracker for roles in weights for quantizer in roles.quantizers().values()]
    return [tracker for tracker in trackers if isinstance(tracker, ScaleTracker) and tracker.shared]
