"""One correct cache, however many processes want it; learned tokenizers; memory that does not grow with the corpus."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from altgrad.training.config import DataConfig
from altgrad.training.data import cache as text_cache
from altgrad.training.data import load_corpus, load_documents
from altgrad.training.data.cache import cached

READ = """
import json, sys
from altgrad.training.config import DataConfig
from altgrad.training.data import load_corpus
corpus = load_corpus(DataConfig(source=sys.argv[1], tokenizer=sys.argv[2]))
print(json.dumps([corpus.sha256, len(corpus.train), str(corpus.train.filename)]))
"""
MEASURE = """
import resource, sys
from altgrad.training.config import DataConfig
from altgrad.training.data import load_corpus, train_batch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = load_corpus(DataConfig(source=sys.argv[1]))
for step in range(20):
    train_batch(corpus, block=256, batch=8, seed=0, step=step)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(corpus.train) + len(corpus.val))
"""


def start(code: str, *arguments: str, cache: Path) -> subprocess.Popen:
    environment = {**os.environ, "ALTGRAD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def answers(processes: list[subprocess.Popen]) -> list:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        found.append(out.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-400"])
def test_two_processes_at_once_make_one_correct_cache(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch):
    texts = [f"document {i} " + "says something of its own " * (i % 50) for i in range(4000)]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cache = tmp_path / "cache"
    first, second = map(json.loads, answers([start(READ, str(source), tokenizer, cache=cache) for _ in range(2)]))
    assert first == second
    assert not list(cache.glob("*.partial"))
    assert len([path for path in cache.iterdir() if path.is_dir()]) == (1 if tokenizer == "bytes" else 2)
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "other"))
    alone = load_corpus(DataConfig(source=str(source), tokenizer=tokenizer))
    assert [alone.sha256, len(alone.train)] == first[:2]
    assert Path(alone.train.filename).is_relative_to(tmp_path / "other")
    assert Path(alone.train.filename).read_bytes() == Path(first[2]).read_bytes()
    if tokenizer == "bytes":
        kept = [text for i, text in enumerate(texts) if i % 10 != 9]
        assert Path(first[2]).read_bytes() == b"".join(text.encode() + b"\0" for text in kept)


def test_an_entry_is_built_once_and_a_damaged_one_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path))
    built = []

    def build(folder: Path) -> dict:
        built.append(folder)
        (folder / "data").write_bytes(b"12345")
        return {"answer": 42}

    entry = cached({"k": 1}, build)
    assert cached({"k": 1}, build) == entry and len(built) == 1 and entry.meta == {"answer": 42}
    (entry.folder / "data").write_bytes(b"123")
    assert (cached({"k": 1}, build).folder / "data").read_bytes() == b"12345" and len(built) == 2
    assert cached({"k": 2}, build).folder != entry.folder


def test_what_a_dead_builder_left_is_cleared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path))

    def fails(folder: Path) -> dict:
        (folder / "half").write_text("x")
        raise ValueError("bad data")

    with pytest.raises(ValueError, match="bad data"):
        cached({"k": 1}, fails)
    entry = cached({"k": 1}, lambda folder: {})
    entry.folder.rename(entry.folder.with_suffix(".partial"))
    (entry.folder.with_suffix(".partial") / "half").write_text("x")
    assert [path.name for path in cached({"k": 1}, lambda folder: {}).folder.iterdir()] == ["meta.json"]


def test_a_place_that_can_not_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="ALTGRAD_CACHE names another place"):
        cached({"k": 1}, lambda folder: {})


def test_changed_content_is_another_entry(tmp_path: Path):
    source = tmp_path / "a.jsonl"
    digests = set()
    for word in ("one", "two"):
        source.write_text(
            "".join(json.dumps({"text": f"{word} {i}", "labels": [f"l{i % 2}"]}) + "\n" for i in range(30))
        )
        data = DataConfig(source=str(source), val_fraction=0.1 if word == "one" else 0.1001)
        digests |= {load_corpus(data).sha256, load_documents(data).sha256}
    assert len(digests) == 4


def test_byte_pairs_write_every_text_and_compare_in_bits_per_byte():
    plain, pairs = (load_corpus(DataConfig(tokenizer=name)) for name in ("bytes", "bpe-1024"))
    assert pairs.tokenizer.vocabulary == 1024 and pairs.train.dtype == np.uint16
    documents = bytes(plain.val).split(b"\0")[:-1]
    ends = np.flatnonzero(np.asarray(pairs.val) == 0)
    assert len(ends) == len(documents)
    assert pairs.tokenizer.decode(pairs.val[: ends[0]].tolist()).encode() == documents[0]
    assert pairs.bytes_per_token == len(plain.val) / len(pairs.val) > 2
    odd = "Ünïcode, \U0001f600 and \x01"
    (ids,) = pairs.tokenizer.encode([odd.encode()])
    assert pairs.tokenizer.decode(ids.tolist()) == odd


def test_words_are_those_of_some_but_not_most_training_documents():
    documents = load_documents(DataConfig(source="synthetic", tokenizer="words-100"))
    vocabulary = json.loads(documents.tokenizer.json)["model"]["vocab"]
    assert len(vocabulary) == documents.tokenizer.vocabulary == 100
    assert documents.train.tokens.min() >= 0 and documents.train.tokens.max() < 100
    assert all(word == word.lower() for word in vocabulary)


def test_an_unknown_tokenizer_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'bqe' is no tokenizer; allowed: bytes, bpe, .*; nearest: bpe"):
        DataConfig(tokenizer="bqe")
    with pytest.raises(ValueError, match="a vocabulary of 257"):
        DataConfig(tokenizer="bpe-10")


def write_text(path: Path, megabytes: int) -> int:
    block = "".join(json.dumps({"text": f"{i} " + "words of a corpus, generated. " * 330}) + "\n" for i in range(100))
    with path.open("w") as file:
        return sum(file.write(block) for _ in range(megabytes))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path):
    write_text(tmp_path / "a.jsonl", 100)
    (answer,) = answers([start(MEASURE, str(tmp_path / "a.jsonl"), cache=tmp_path / "cache")])
    before, peak, size = map(int, answer.split())
    assert size > 95e6
    assert peak - before < 60e3, f"{(peak - before) / 1e3:.0f} MB over the {before / 1e3:.0f} MB of the imports"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_gigabyte_needs_less_than_one_and_a_half(tmp_path: Path, name: str):
    write_text(tmp_path / name, 1010)
    (answer,) = answers([start(MEASURE, str(tmp_path / name), cache=tmp_path / "cache")])
    _, peak, size = map(int, answer.split())
    print(f"{name}: {size / 1e9:.2f} GB of text, peak {peak / 1e6:.2f} GB")
    assert size > 0.99e9 and peak < 1.5e6


def test_a_lock_that_another_process_keeps_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path))
    monkeypatch.setattr(text_cache, "SAID_AFTER_SECONDS", 0.1)
    built = cached({"of": "this"}, lambda folder: {}).folder
    (built / text_cache.META).unlink()
    lock = built.with_suffix(".lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        free = threading.Timer(0.5, fcntl.flock, (held, fcntl.LOCK_UN))
        free.start()
        cached({"of": "this"}, lambda folder: {})
        free.join()
    assert [str(lock) in record.getMessage() for record in caplog.records] == [True]
