"""Equal seeds mean equal batches; the split is by document; bad sources meet clear errors."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from altgrad.training.config import DataConfig
from altgrad.training.data import load_corpus, train_batch, val_batches

DOCUMENTS = [f"document {i}: " + "words and more words " * 20 for i in range(30)]


def test_pydoc_is_always_there_and_is_real_text():
    corpus = load_corpus(DataConfig())
    assert len(corpus.train) > 300_000 and len(corpus.val) > 10_000
    assert b"expression" in bytes(corpus.val.tolist())


def test_batches_are_a_pure_function_of_seed_and_step():
    corpus = load_corpus(DataConfig())
    kwargs = {"block": 32, "batch": 4}
    first = train_batch(corpus, seed=1, step=7, **kwargs)
    train_batch(corpus, seed=3, step=1, **kwargs)
    again = train_batch(corpus, seed=1, step=7, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ({"seed": 2, "step": 7}, {"seed": 1, "step": 8}):
        assert not torch.equal(first[0], train_batch(corpus, **kwargs, **other)[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])


def test_validation_windows_are_fixed_and_cover_the_split():
    corpus = load_corpus(DataConfig())
    batches = list(val_batches(corpus, block=32, batch=4, count=3))
    assert len(batches) == 3 and all(x.shape == (4, 32) for x, _ in batches)
    assert torch.equal(batches[0][0][0], corpus.val[:32].long())
    assert torch.equal(batches[-1][1][-1], corpus.val[-32:].long())


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "glob"])
def test_every_kind_of_source_gives_the_same_corpus(tmp_path: Path, kind: str):
    if kind == "jsonl":
        source = tmp_path / "a.jsonl"
        source.write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(DOCUMENTS)))
    elif kind == "parquet":
        source = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), source)
    else:
        for i, text in enumerate(DOCUMENTS):
            (tmp_path / f"{i:02}.txt").write_text(text)
        source = tmp_path if kind == "folder" else tmp_path / "*.txt"
    corpus = load_corpus(DataConfig(source=str(source)))
    held = [text for i, text in enumerate(DOCUMENTS) if i % 10 == 9]
    assert bytes(corpus.val.tolist()).decode() == "".join(text + "\0" for text in held)
    assert corpus.documents == 30
    assert corpus.sha256 == "".join(corpus.sha256)
    direct = load_corpus(DataConfig(source=str(source), text_field="text", val_fraction=0.1001))
    assert direct.sha256 == corpus.sha256


def test_no_validation_document_is_in_the_training_split(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    corpus = load_corpus(DataConfig(source=str(tmp_path / "a.jsonl")))
    train = bytes(corpus.train.tolist()).decode().split("\0")
    val = bytes(corpus.val.tolist()).decode().split("\0")
    assert set(train[:-1]).isdisjoint(val[:-1]) and len(train) + len(val) - 2 == 30


def test_files_named_like_splits_are_the_splits_and_others_are_said_to_be_ignored(tmp_path: Path):
    (tmp_path / "train.txt").write_text("t" * 100)
    (tmp_path / "dev.txt").write_text("d" * 50)
    (tmp_path / "test.txt").write_text("x" * 50)
    (tmp_path / "README.md").write_text("about")
    corpus = load_corpus(DataConfig(source=str(tmp_path)))
    assert bytes(corpus.train.tolist()) == b"t" * 100 + b"\0"
    assert bytes(corpus.val.tolist()) == b"d" * 50 + b"\0"
    assert any("README.md" in note for note in corpus.notes)


def test_a_single_text_is_cut_near_its_end(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a" * 900 + "b" * 100)
    corpus = load_corpus(DataConfig(source=str(tmp_path / "a.txt")))
    assert bytes(corpus.val.tolist()) == b"b" * 100 + b"\0"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", "", "holds no text"),
        ("bad.jsonl", '{"text": "a"}\n{oops\n', "bad.jsonl:2"),
        ("field.jsonl", '{"body": "a"}\n', "it has: body"),
        (".", None, "no text, JSONL or parquet"),
    ],
)
def test_a_bad_source_is_refused_with_what_is_wrong(tmp_path: Path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(DataConfig(source=str(tmp_path / name)))


def test_a_split_too_small_for_the_block_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abc " * 20)
    corpus = load_corpus(DataConfig(source=str(tmp_path / "a.txt")))
    with pytest.raises(ValueError, match="too few for a block of 128"):
        list(val_batches(corpus, block=128, batch=1, count=1))
