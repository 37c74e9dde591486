"""Loss and what follows from it: perplexity and bits per byte.

Bits per byte make runs with different tokenizers comparable: nats per token over ln 2, over bytes per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; inputs and targets are [batch, time]."""
    logits = model(inputs)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean validation loss in nats per token over batches of equal size.

    In evaluation mode, so that no scale history and no draw of stochastic rounding moves on.
    """
    was_training = model.training
    model.eval()
    losses = [token_loss(model, inputs, targets) for inputs, targets in batches]
    model.train(was_training)
    return float(torch.stack(losses).mean())


def bits_per_byte(loss: float, *, bytes_per_token: float = 1.0) -> float:
    """Nats per token as bits per byte."""
    return loss / math.log(2) / bytes_per_token


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
