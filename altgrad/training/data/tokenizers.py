"""From text to token ids: bytes, a byte-pair encoding learned from the training text, words, or an encoder's own.

| name | vocabulary | for |
| --- | --- | --- |
| bytes | 256; needs no training and no download | both tasks |
| bpe, bpe-N | at most N (4096), byte-level, so that every text can be written; id 0 ends a document | both tasks |
| words, words-N | at most N (8000) lower-case words, in 2 documents to 30 % of them | classification |

Words in nearly every document say little of its labels and fill the context; they and rare ones are left out, as
TF-IDF's max_df and min_df do. Losses of different tokenizers compare as bits per byte. Learned vocabularies come from
training text alone, are the same wherever they are learned, and are saved with the run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from altgrad.training.config import tokenizer_parts

Item = TypeVar("Item")

END = "<|end|>"
UNKNOWN = "<|unknown|>"
SAMPLE_BYTES = 1 << 25
"""Training text that a byte-pair encoding is learned from, at most."""
PIECE_BYTES = 1 << 20
MOST_COMMON_SHARE, LEAST_DOCUMENTS = 0.3, 2


class Tokenizer(Protocol):
    """`vocabulary` ids from 0; `json` rebuilds a learned one, and is None for bytes."""

    name: str
    vocabulary: int
    json: str | None

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text (UTF-8)."""


class ByteTokenizer:
    """A token is a byte."""

    name: str = "bytes"
    vocabulary: int = 256
    json: str | None = None

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]


class LearnedTokenizer:
    """A vocabulary of the `tokenizers` library, from its JSON; ids in `dropped` stand for nothing and are left out."""

    def __init__(self, name: str, json: str, dropped: tuple[int, ...] = ()) -> None:
        from tokenizers import Tokenizer as Library

        self.name: str = name
        self.json: str | None = json
        self._library = Library.from_str(json)
        self._dropped = np.array(dropped)
        self.vocabulary: int = int(self._library.get_vocab_size())

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        found = self._library.encode_batch_fast(
            [text.decode("utf-8", "replace") for text in texts], add_special_tokens=False
        )
        ids = [np.array(item.ids, dtype=np.int64) for item in found]
        return [item[~np.isin(item, self._dropped)] for item in ids] if len(self._dropped) else ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids)))


class EncoderTokenizer:
    """The tokenizer that belongs to a Hugging Face encoder, cut to its context."""

    json: str | None = None

    def __init__(self, encoder: str, block: int) -> None:
        transformers = import_transformers(encoder)
        try:
            self._library: Any = transformers.AutoTokenizer.from_pretrained(encoder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"encoder {encoder!r}: no tokenizer can be loaded ({' '.join(str(error).split())[:200]})"
            ) from None
        self.name: str = encoder
        self.vocabulary: int = len(self._library)
        self._block = block

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        plain = [text.decode("utf-8", "replace") for text in texts]
        found = self._library(plain, truncation=True, max_length=self._block)["input_ids"]
        return [np.array(ids, dtype=np.int64) for ids in found]


def import_transformers(encoder: str) -> Any:
    """The module; ValueError that names the extra where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f"encoder {encoder!r} needs the package transformers: pip install 'altgrad[hf]'") from None
    return transformers


def learn(name: str, texts: Callable[[], Iterable[bytes]]) -> Tokenizer:
    """The tokenizer of that name; `texts()` starts reading the training documents."""
    kind, size = tokenizer_parts(name)
    if kind == "bytes":
        return ByteTokenizer()
    return _learn_bpe(name, size, texts()) if kind == "bpe" else _learn_words(name, size, texts())


def stored(name: str, json: str | None) -> Tokenizer:
    """The tokenizer again, from what it was saved as."""
    if json is None:
        return ByteTokenizer()
    return LearnedTokenizer(name, json, _dropped(tokenizer_parts(name)[0]))


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a learned vocabulary to tokenizer.json; bytes need no file."""
    if tokenizer.json is not None:
        (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")


def fits(vocabulary: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds the ids."""
    return np.dtype(np.uint8 if vocabulary <= 1 << 8 else np.uint16 if vocabulary <= 1 << 16 else np.uint32)


def _dropped(kind: str) -> tuple[int, ...]:
    return (0,) if kind == "words" else ()


def _learn_bpe(name: str, size: int, texts: Iterable[bytes]) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    library.train_from_iterator(_sample(texts), trainer)
    return LearnedTokenizer(name, library.to_str())


def _sample(texts: Iterable[bytes]) -> Iterator[str]:
    """The first part of the training text, in pieces."""
    left = SAMPLE_BYTES
    for text in texts:
        for start in range(0, min(len(text), left), PIECE_BYTES):
            yield text[start : min(start + PIECE_BYTES, left)].decode("utf-8", "replace")
        left -= len(text)
        if left <= 0:
            return


def _learn_words(name: str, size: int, texts: Iterable[bytes]) -> Tokenizer:
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel

    library = Library(WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\p{L}]+"), "removed")
    counts: Counter[str] = Counter()
    documents = 0
    for text in texts:
        plain = library.normalizer.normalize_str(text.decode("utf-8", "replace"))
        counts.update({word for word, _ in library.pre_tokenizer.pre_tokenize_str(plain)})
        documents += 1
    kept = [
        (word, count)
        for word, count in counts.items()
        if LEAST_DOCUMENTS <= count <= max(LEAST_DOCUMENTS, MOST_COMMON_SHARE * documents)
    ]
    kept.sort(key=lambda item: (-item[1], item[0]))
    vocabulary = {UNKNOWN: 0} | {word: index for index, (word, _) in enumerate(kept[: size - 1], 1)}
    library.model = WordLevel(vocabulary, unk_token=UNKNOWN)
    return LearnedTokenizer(name, json.dumps(json.loads(library.to_str())), _dropped("words"))


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`, the last one shorter: what is handed to a tokenizer at a time."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
