"""Equal seeds mean equal batches; the split is by document; bad sources meet clear errors."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from altgrad.training.config import DataConfig
from altgrad.training.data import load_corpus, train_batch, val_batches
from altgrad.training.data.corpus import _load

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
    assert torch.equal(batches[0][0][0], torch.from_numpy(corpus.val[:32].astype("int64")))
    assert torch.equal(batches[-1][1][-1], torch.from_numpy(corpus.val[-32:].astype("int64")))


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
        (".", None, "no file of a kind that is read"),
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


def texts_of(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text * 200)
    return folder


def split_bytes(source: Path | str) -> tuple[set[str], set[str], str]:
    """Letters in the training split, letters in the validation split, the notes."""
    corpus = load_corpus(DataConfig(source=str(source)))
    train, val = (set(bytes(split.tolist()).decode()) - {"\0"} for split in (corpus.train, corpus.val))
    return train, val, " | ".join(corpus.notes)


def test_without_dev_text_validation_comes_from_train_and_test_is_left_alone(tmp_path: Path):
    train, val, notes = split_bytes(texts_of(tmp_path, {"train.txt": "t", "test.txt": "x", "README.md": "r"}))
    assert (train, val) == ({"t"}, {"t"})
    assert "test text is not read: test.txt" in notes and "held out" in notes and "README.md" in notes


@pytest.mark.parametrize("source", [".", "*/*.txt", "**/*.txt"])
def test_sub_folders_named_like_splits_are_the_splits(tmp_path: Path, source: str):
    texts_of(tmp_path, {"train/a.txt": "a", "train/test.txt": "b", "dev/a.txt": "d", "test/train.txt": "x"})
    train, val, notes = split_bytes(tmp_path / source)
    assert (train, val) == ({"a", "b"}, {"d"})
    assert "test text is not read: test/train.txt" in notes


def test_shards_are_their_split_and_names_above_the_source_say_nothing(tmp_path: Path):
    root = texts_of(
        tmp_path / "test",
        {"train-00000-of-00002.txt": "a", "train-00001-of-00002.txt": "b", "validation.txt": "d", "test_1.txt": "x"},
    )
    assert split_bytes(root)[:2] == ({"a", "b"}, {"d"})


def test_test_text_without_train_text_is_read_and_said_to_be(tmp_path: Path):
    train, val, notes = split_bytes(texts_of(tmp_path, {"a.txt": "a", "b.txt": "b", "test.txt": "x"}))
    assert train | val == {"a", "b", "x"} and "test.txt" in notes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("utf.jsonl", b'{"text": "a"}\n{"text": "\xff\xfe"}\n', r"utf.jsonl:2: no UTF-8 text"),
        ("num.jsonl", b'{"text": 5}\n', r"num.jsonl:1: field 'text' holds 5, which is no text"),
        ("list.jsonl", b"[1, 2]\n", r"list.jsonl:1: a record with field 'text' is expected, found \[1, 2\]"),
        ("broken.parquet", b"PAR1 nonsense", r"broken.parquet: not readable as parquet"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(DataConfig(source=str(tmp_path / name)))


def test_a_parquet_column_of_numbers_is_no_text_and_a_dictionary_of_text_is(tmp_path: Path):
    source = tmp_path / "int.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2, 3]}), source)
    with pytest.raises(ValueError, match=r"int.parquet: column 'text' holds int64"):
        load_corpus(DataConfig(source=str(source)))
    encoded = tmp_path / "dictionary.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(DOCUMENTS).dictionary_encode()}), encoded)
    assert load_corpus(DataConfig(source=str(encoded))).documents == 30


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("words " * 100)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data '': an empty name; allowed: 'pydoc'"):
        load_corpus(DataConfig(source=""))


TEXT = [f"Text number {i}, an é and a ü" for i in range(40)]


def save_arrow(folder: Path) -> None:
    import datasets

    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": TEXT}),
            "validation": datasets.Dataset.from_dict({"text": TEXT[:4]}),
        }
    ).save_to_disk(folder)


def named(value: str | bytes) -> str:
    """Not the content: gzip writes the time into it."""
    return value if isinstance(value, str) else "content"


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def csv_text(texts: list[str]) -> bytes:
    return ("text\r\n" + "".join(f'"{text}"\r\n' for text in texts)).encode("utf-8-sig")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(TEXT)),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXT))),
        ("a.csv", csv_text(TEXT)),
        ("a.csv.gz", gzip.compress(csv_text(TEXT))),
        ("a.ndjson.gz", gzip.compress(b"\xef\xbb\xbf" + jsonl(TEXT))),
    ],
    ids=named,
)
def test_packed_files_and_byte_order_marks_give_the_same_corpus(tmp_path: Path, name: str, content: bytes):
    (tmp_path / "plain.jsonl").write_bytes(jsonl(TEXT))
    (tmp_path / name).write_bytes(content)
    found = [load_corpus(DataConfig(source=str(tmp_path / each))).sha256 for each in ("plain.jsonl", name)]
    assert found[0] == found[1]


def test_texts_may_be_packed_and_have_a_byte_order_mark(tmp_path: Path):
    body = "\r\n".join(TEXT)
    (tmp_path / "a.txt").write_bytes(body.replace("\r\n", "\n").encode())
    (tmp_path / "b.txt").write_bytes(body.encode("utf-8-sig"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(body.encode()))
    found = {load_corpus(DataConfig(source=str(path))).sha256 for path in tmp_path.iterdir()}
    assert len(found) == 1


def test_folders_that_datasets_saved_are_read_by_their_splits(tmp_path: Path):
    save_arrow(tmp_path / "saved")
    corpus = load_corpus(DataConfig(source=str(tmp_path / "saved")))
    (tmp_path / "train.jsonl").write_bytes(jsonl(TEXT))
    (tmp_path / "dev.jsonl").write_bytes(jsonl(TEXT[:4]))
    assert corpus.sha256 == load_corpus(DataConfig(source=str(tmp_path / "*.jsonl"))).sha256
    assert corpus.documents == 44 and not corpus.notes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("weights.npy", b"\x93NUMPY" + bytes(200)),
        ("ids.bin", bytes(range(256))),
        ("picture.png", b"\x89PNG\r\n"),
        ("archive.tar.gz", gzip.compress(b"text" * 100)),
        ("packed.parquet.gz", gzip.compress(b"PAR1")),
        ("wide.txt", "text in two bytes".encode("utf-16")),
        ("zeros.md", b"text\0text"),
        ("cut.txt.gz", gzip.compress(b"text " * 10_000)[:60]),
        ("none.jsonl.gz", b"no gzip"),
        ("broken.arrow", b"no arrow"),
    ],
    ids=named,
)
def test_what_is_no_text_is_refused_and_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as refused:
        load_corpus(DataConfig(source=str(tmp_path / name)))
    assert any(word in str(refused.value) for word in ("allowed:", "is expected", "can't be read", "not readable"))


def test_a_folder_says_what_of_it_is_read(tmp_path: Path):
    (tmp_path / "data.jsonl").write_bytes(jsonl(TEXT))
    alone = load_corpus(DataConfig(source=str(tmp_path))).sha256
    for name in ("README.md", "logo.png", ".hidden.jsonl", "LICENSE", ".ipynb_checkpoints/dev.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jsonl(["a text that must not be read"] * 9))
    _load.cache_clear()
    corpus = load_corpus(DataConfig(source=str(tmp_path)))
    assert corpus.sha256 == alone
    (note,) = corpus.notes
    assert note.startswith("read: data.jsonl; not read: ") and "README.md" in note and "logo.png" in note
    assert load_corpus(DataConfig(source=str(tmp_path / "**" / "*"))).sha256 == alone


def test_a_folder_of_texts_alone_is_read(tmp_path: Path):
    for name in ("a.txt", "README.md"):
        (tmp_path / name).write_text(" ".join(TEXT))
    assert load_corpus(DataConfig(source=str(tmp_path))).documents == 2
