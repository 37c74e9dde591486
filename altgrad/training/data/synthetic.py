"""A made-up corpus with the shape of a labelled one, under its own name, for tests and first steps.

Every document draws one to three of eight labels; half of its words belong to one of its labels, half to none. So
labels can be learned from the text, quickly and by construction, and nothing in it says anything about law.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from altgrad.training.data.records import Piece

VERSION = 1
LABELS = tuple(f"topic_{index}" for index in range(8))
SIZES = {"train": 240, "val": 80, "test": 80}
WORDS = 60
_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")


def documents(split: str) -> Iterator[Piece]:
    """The documents of 'train', 'val' or 'test', the same on every machine."""
    generator = np.random.Generator(np.random.Philox(key=[VERSION, list(SIZES).index(split)]))
    for index in range(SIZES[split]):
        chosen = generator.choice(len(LABELS), size=generator.integers(1, 4), replace=False)
        about = generator.choice([*chosen, *[len(LABELS)] * len(chosen)], size=WORDS)
        ranks = np.minimum(generator.geometric(0.15, size=WORDS), 30)
        text = " ".join(_word(int(topic), int(rank)) for topic, rank in zip(about, ranks, strict=True))
        labels = tuple(LABELS[topic] for topic in sorted(chosen))
        yield Piece(f"{text.capitalize()}.", True, labels, f"data 'synthetic' {split}:{index}")


def _word(topic: int, rank: int) -> str:
    number, parts = topic * 31 + rank, []
    for _ in range(3):
        number, part = divmod(number, len(_SYLLABLES))
        parts.append(_SYLLABLES[part])
    return "".join(parts)
