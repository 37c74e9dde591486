"""Labelled documents from every kind of file, with exactly the columns of LexGLUE and EURLEX57K."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from altgrad.training.config import DataConfig
from altgrad.training.data import load_documents
from altgrad.training.data.documents import Documents

NAMES = [f"10{index:04}" for index in range(100)]


def write_lex_glue(folder: Path, counts: dict[str, int], **changes) -> Path:
    """Parquet as coastalcph/lex_glue has it: text, and labels as a list of ClassLabel."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=NAMES))}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        rows = {
            "text": [f"Regulation {split} {i} on milk" for i in range(count)],
            "labels": [[i % 3, 7 + i % 90] for i in range(count)],
        }
        for name, value in changes.get(split, {}).items():
            rows[name] = value
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def write_eurlex57k(folder: Path, labels: int) -> Path:
    """Parquet with EURLEX57K's columns: celex_id, title, text, eurovoc_concepts (strings)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in {"train": labels // 4 + 1, "validation": 6, "test": 6}.items():
        rows = [
            {
                "celex_id": f"3{i:05}",
                "title": f"Title {i}",
                "text": f"Decision {i} {split}",
                "eurovoc_concepts": [str(10_000 + (4 * i + k) % labels) for k in range(4)],
            }
            for i in range(count)
        ]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def read(source: Path | str, **changes) -> Documents:
    return load_documents(DataConfig(source=str(source), **changes))


def labels_of(documents: Documents, split: str) -> list[set[str]]:
    own = getattr(documents, split)
    names = documents.labels + documents.unseen
    targets = own.targets(np.arange(len(own)), len(names)).bool()
    return [{names[j] for j in line.nonzero().ravel().tolist()} for line in targets]


def texts_of(documents: Documents, split: str) -> list[str]:
    own = getattr(documents, split)
    tokens, lengths = own.inputs(np.arange(len(own)), 10_000)
    return [bytes(line[:n].tolist()).decode() for line, n in zip(tokens, lengths, strict=True)]


def test_lex_glue_keeps_its_declared_names_however_few_rows_there_are(tmp_path: Path):
    documents = read(write_lex_glue(tmp_path, {"train": 5, "validation": 2, "test": 3}))
    assert documents.labels == tuple(NAMES) and documents.unseen == ()
    assert [len(documents.train), len(documents.val), len(documents.test)] == [5, 2, 3]
    assert labels_of(documents, "test") == [{NAMES[i % 3], NAMES[7 + i % 90]} for i in range(3)]
    assert texts_of(documents, "val") == ["Regulation validation 0 on milk", "Regulation validation 1 on milk"]


def test_eurlex57k_has_4271_labels_under_its_own_field(tmp_path: Path):
    documents = read(write_eurlex57k(tmp_path, 4271))
    assert len(documents.labels) == 4271
    assert labels_of(documents, "val")[1] == {"10004", "10005", "10006", "10007"}
    assert documents.frequencies().sum() * len(documents.train) == pytest.approx(4272)


def test_missing_labels_and_empty_texts_are_left_out_and_counted(tmp_path: Path):
    source = write_lex_glue(
        tmp_path,
        {"train": 4, "validation": 2, "test": 2},
        train={"labels": [[1], None, [], [2]], "text": ["a", "b", "c", " "]},
    )
    documents = read(source)
    assert texts_of(documents, "train") == ["a", "c"]
    assert labels_of(documents, "train") == [{NAMES[1]}, set()]
    assert "left out for want of text: 1 documents" in documents.notes
    assert "left out for want of labels: 1 documents" in documents.notes


RECORDS = [{"text": f"Text, number {i}\nof many", "labels": [f"l{i % 3}", "common"]} for i in range(30)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "csv_of_pandas", "parquet"])
def test_every_kind_of_record_gives_the_same_documents(tmp_path: Path, kind: str):
    path = tmp_path / f"a.{kind.split('_')[0]}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    elif kind == "parquet":
        datasets.Dataset.from_list(RECORDS).to_parquet(path)
    else:
        shape = str if kind == "csv_of_pandas" else ";".join
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "labels"])
            writer.writeheader()
            writer.writerows({"text": r["text"], "labels": shape(r["labels"])} for r in RECORDS)
    documents = read(path)
    assert documents.labels == ("common", "l0", "l1", "l2")
    held = {"val": [i for i in range(30) if i % 10 == 9], "test": [i for i in range(30) if i % 10 == 8]}
    for split, rows in held.items():
        assert texts_of(documents, split) == [RECORDS[i]["text"] for i in rows]
        assert labels_of(documents, split) == [set(RECORDS[i]["labels"]) for i in rows]
    assert len(documents.train) == 24 and sum("held out" in note for note in documents.notes) == 2


def test_a_label_that_only_test_documents_have_counts_as_missed(tmp_path: Path):
    for split, label in {"train": "a", "dev": "a", "test": "z"}.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": "words", "labels": [label]}))
    documents = read(tmp_path)
    assert (documents.labels, documents.unseen) == (("a",), ("z",))
    assert labels_of(documents, "test") == [{"z"}]
    assert any("count as missed: z" in note for note in documents.notes)


def folder_of(tmp_path: Path, **splits: bytes) -> Path:
    for name in ("train", "dev", "test"):
        content = splits.get(name, b'{"text": "a", "labels": ["x"]}\n')
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("splits", "changes", "message"),
    [
        ({}, {"label_field": "label"}, r"no field 'label' for labels; it has: text, labels; nearest: labels"),
        ({}, {"text_field": "body"}, r"train.jsonl:1: no field 'body'; it has: text, labels"),
        ({}, {"label_names": ("xx", "y")}, r"train.jsonl:1: label 'x' is outside the vocabulary \(xx, y\)"),
        ({"dev": b""}, {}, r"the validation split holds no document"),
        ({"test": b'{"text": "", "labels": ["x"]}'}, {}, r"the test split holds no document"),
        ({"train": b'{"text": "a", "labels": [1.5]}'}, {}, r"field 'labels' holds \[1.5\]; names or whole numbers"),
        ({"train": b'{"text": "a", "labels": {"x": 1}}'}, {}, r"names or whole numbers are expected"),
        ({"train": b'{"text": "a", "labels": []}'}, {}, r"no training document has a label"),
        ({"train": b'{"text": "\xff", "labels": ["x"]}'}, {}, r"train.jsonl:1: no UTF-8 text"),
        ({"test": b'{"text": "a", "labels": ["x"]}\n{"text": "cut sh'}, {}, r"test.jsonl:2: not a JSON record"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, splits, changes, message):
    with pytest.raises(ValueError, match=message):
        read(folder_of(tmp_path, **splits), **changes)


def test_a_class_label_outside_its_names_is_refused(tmp_path: Path):
    source = write_lex_glue(tmp_path, {"train": 3, "validation": 2, "test": 2})
    import pyarrow.parquet

    path = source / "test.parquet"
    table = pyarrow.parquet.read_table(path)
    broken = table.set_column(1, table.schema.field(1), pyarrow.array([[3], [100]], table.schema.field(1).type))
    pyarrow.parquet.write_table(broken, path)
    with pytest.raises(ValueError, match=r"test.parquet: row 1: label 100 is outside the vocabulary of 100 labels"):
        read(source)


def test_a_truncated_parquet_file_is_named(tmp_path: Path):
    path = write_lex_glue(tmp_path, {"train": 50, "validation": 2, "test": 2}) / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train.parquet: not readable as parquet"):
        read(tmp_path)


def test_bytes_that_are_no_utf8_in_parquet_are_named(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    write_lex_glue(tmp_path, {"validation": 2, "test": 2})
    raw = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    labels = pyarrow.array([["x"], ["y"]])
    pyarrow.parquet.write_table(pyarrow.table({"text": raw, "labels": labels}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet: not readable as parquet \(.*utf-8"):
        read(tmp_path)


def test_a_cut_off_csv_file_is_named(tmp_path: Path):
    (tmp_path / "a.csv").write_text('text,labels\nfine,x\n"cut sho')
    with pytest.raises(ValueError, match=r"a.csv:\d+: not a CSV record \(unexpected end of data\)"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(("source", "message"), [("pydoc", "'pydoc' has no labels"), ("a.txt", "plain text has no")])
def test_text_without_labels_is_no_ground_for_classification(tmp_path: Path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("words " * 100)
    with pytest.raises(ValueError, match=message):
        read(source)


def test_the_synthetic_corpus_exists_under_its_own_name():
    documents = read("synthetic", tokenizer="words")
    assert (len(documents.train), len(documents.val), len(documents.test)) == (240, 80, 80)
    assert len(documents.labels) == 8
    again = read("synthetic", tokenizer="words", batch=3)
    assert again.sha256 == documents.sha256


def test_inputs_are_cut_and_padded():
    own = read("synthetic").train
    rows = np.array([0, 5])
    tokens, lengths = own.inputs(rows, 12)
    assert tokens.shape == (2, 12) and lengths.tolist() == [12, 12] and tokens.dtype == torch.int64
