"""A small GPT, in the names that everyone's scripts expect (`transformer.h.0.mlp.c_fc`, `lm_head`).

Pre-norm blocks, learned positions, no biases, the head tied to the embedding. It is written in plain float32
modules: which of its layers compute in which format is decided afterwards, once, by `quantize_model`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altgrad.training.config import ModelConfig


class Attention(nn.Module):
    """Multi-head self-attention, [batch, time, width] to the same; causal unless a mask [batch, time] is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=False)
        self.c_proj = nn.Linear(config.width, config.width, bias=False)

    def split(self, parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, time, 3 width] as query, key and value, [batch, heads, time, width / heads] each."""
        batch, time, width = parts.shape
        query, key, value = parts.view(batch, time, 3, self.heads, width // 3 // self.heads).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, time, width = x.shape
        query, key, value = self.split(self.c_attn(x))
        allowed = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=mask is None)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, time, width))
        return out


class MLP(nn.Module):
    """Four times the width, GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width, bias=False)
        self.c_proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual, which they enter times `residual_scale`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, bias=False)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config)
        self.residual_scale = config.residual_scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.add(x, self.attn(self.ln_1(x), mask), alpha=self.residual_scale)
        return torch.add(x, self.mlp(self.ln_2(x)), alpha=self.residual_scale)


class GPT(nn.Module):
    """Token ids [batch, time] to logits [batch, time, vocabulary]."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.block = config.block
        blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        embedding = nn.Embedding(vocabulary, config.width)
        self.transformer = nn.ModuleDict(
            {
                "wte": embedding,
                "wpe": nn.Embedding(config.block, config.width),
                "h": blocks,
                "ln_f": nn.LayerNorm(config.width, bias=False),
            }
        )
        self.lm_head = nn.Linear(config.width, vocabulary, bias=False)
        self.lm_head.weight = embedding.weight
        initialise(self, config.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        for block in cast(nn.ModuleList, self.transformer["h"]):
            x = block(x)
        logits: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return logits

    def critical_layers(self) -> tuple[str, ...]:
        """Layers whose collapse costs the most, by their role: the (tied) head and each residual branch's last."""
        return ("lm_head", *residual_outputs(self))


def initialise(model: nn.Module, layers: int) -> None:
    """Draws every matrix from N(0, 0.02²), those that end a residual branch smaller."""
    ends = {model.get_submodule(name).weight for name in residual_outputs(model)}
    for parameter in model.parameters():
        if parameter.dim() == 2:
            # Residual branches start smaller, so that the stream's variance does not grow with depth (GPT-2).
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if parameter in ends else 0.02)


def residual_outputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that write into the residual stream."""
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]
    return tuple(f"{name}.{branch}.c_proj" for name, _ in blocks for branch in ("attn", "mlp"))


def build_model(config: ModelConfig, *, vocabulary: int, seed: int) -> GPT:
    """The model with the weights of this seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config, vocabulary)
