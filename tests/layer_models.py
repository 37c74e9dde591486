"""Layers other than nn.Linear that several tests convert."""

from typing import Any

from torch import Tensor, nn


class SelfAttention(nn.Module):
    """One tensor for queries, keys and values, as most models call it; the options are MultiheadAttention's."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **options)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y: Tensor = self.attention(x, x, x, **options)[0]
        return y
