"""Document classifiers: a small transformer encoder from scratch, or a Hugging Face encoder by name.

The encoder reads a document's first tokens in both directions and averages the residual stream over them. The norm
comes behind the average, not before it: a token's weight in the average is then the model's to choose, which few
labelled documents need more than depth. The norms inside the blocks take it away again there, and what the blocks
add then drowns it: with documents by the hundred `residual_scale` wants to be small (docs/bench/classify.md has the
figures). Every label has its own logit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from altgrad.training.config import ModelConfig
from altgrad.training.data.tokenizers import import_transformers
from altgrad.training.model import Block, initialise, residual_outputs


class DocumentClassifier(nn.Module):
    """Token ids [batch, time] and lengths [batch] to logits [batch, labels]."""

    def __init__(self, config: ModelConfig, vocabulary: int, labels: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, config.width),
                "wpe": nn.Embedding(config.block, config.width),
                "h": nn.ModuleList(Block(config) for _ in range(config.layers)),
                "ln_f": nn.LayerNorm(config.width, bias=False),
            }
        )
        self.classifier = nn.Linear(config.width, labels)
        nn.init.zeros_(self.classifier.bias)
        initialise(self, config.layers)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = positions < lengths[:, None]
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        for block in cast(nn.ModuleList, self.transformer["h"]):
            x = block(x, mask)
        mean = (x * mask[..., None]).sum(1) / lengths[:, None]
        logits: Tensor = self.classifier(self.transformer["ln_f"](mean))
        return logits

    def critical_layers(self) -> tuple[str, ...]:
        """Layers whose collapse costs the most, by their role: the classifier and each residual branch's last."""
        return ("classifier", *residual_outputs(self))


class PretrainedClassifier(nn.Module):
    """A Hugging Face encoder with a new classification head; token ids and lengths to logits."""

    def __init__(self, config: ModelConfig, labels: int) -> None:
        super().__init__()
        assert config.encoder is not None
        transformers = import_transformers(config.encoder)
        try:
            # A checkpoint's own head, made for other labels, gives way to a new one.
            self.encoder: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
                config.encoder,
                num_labels=labels,
                problem_type="multi_label_classification",
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"encoder {config.encoder!r} can't be loaded ({' '.join(str(error).split())[:200]})"
            ) from None
        # It arrives in evaluation mode.
        self.train()
        self._head = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)][-1]

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        logits: Tensor = self.encoder(input_ids=tokens, attention_mask=mask.long()).logits
        return logits

    def critical_layers(self) -> tuple[str, ...]:
        """The output layer, whatever its name: the last linear layer of the model."""
        return (self._head,)


def build_classifier(config: ModelConfig, *, vocabulary: int, labels: int, seed: int) -> nn.Module:
    """The classifier with the weights of this seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.encoder is not None:
            return PretrainedClassifier(config, labels)
        return DocumentClassifier(config, vocabulary, labels)
