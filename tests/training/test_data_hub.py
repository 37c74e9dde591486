"""Short names lead to the hub: its revision is recorded, a copy serves offline, and silence is an error at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import REVISION, files_below, hub_of
from test_data_labels import NAMES, write_eurlex57k, write_lex_glue

LOAD = """
import json, sys
from altgrad.training.config import DataConfig
from altgrad.training.data import load_corpus, load_documents
for name, what, revision in json.loads(sys.argv[1]):
    try:
        data = DataConfig(source=name, revision=revision)
        found = (load_documents if what == "labels" else load_corpus)(data)
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
    else:
        print(json.dumps({"sha256": found.sha256, "provenance": dict(found.provenance), "train": len(found.train),
                          "labels": list(getattr(found, "labels", ()))}))
"""
CARD = """---
configs:
- config_name: eurlex
  data_files:
  - split: train
    path: eurlex/train.parquet
  - split: validation
    path: eurlex/validation.parquet
  - split: test
    path: eurlex/test.parquet
---
"""


def load(home: Path, *asked: tuple[str, str, str | None], **environment: str) -> list[dict]:
    """What a process of its own finds for each (source, 'labels' or 'text', revision): the hub's library reads its
    environment once."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_HOME": str(home), "ALTGRAD_CACHE": str(home / "altgrad"), "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(asked)],
        env=kept | own,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(asked), done.stdout
    return found


@pytest.mark.slow
def test_eurlex_comes_from_lex_glue_with_its_revision_and_then_offline(tmp_path: Path):
    source = write_lex_glue(tmp_path / "files", {"train": 40, "validation": 5, "test": 5})
    repository = {"README.md": CARD.encode(), **files_below(source, "eurlex/")}
    newest, pinned, missing = (("eurlex", "labels", revision) for revision in (None, REVISION, "f" * 40))
    with hub_of({"coastalcph/lex_glue": repository}) as endpoint:
        online, again, gone = load(tmp_path / "home", newest, pinned, missing, HF_ENDPOINT=endpoint)
    assert again == online and "does not answer for coastalcph/lex_glue" in gone["error"]
    assert online["labels"] == NAMES and online["train"] == 40
    assert online["provenance"] == {"repository": "coastalcph/lex_glue", "config": "eurlex", "revision": REVISION}
    offline, again, other, text = load(
        tmp_path / "home", newest, pinned, missing, ("eurlex", "text", None), HF_HUB_OFFLINE="1"
    )
    assert offline == again == online
    assert f"revision {'f' * 40} is wanted, {REVISION} is what there is" in other["error"]
    assert text["train"] > 40 and text["provenance"]["revision"] == REVISION
    (empty,) = load(tmp_path / "elsewhere", newest, HF_HUB_OFFLINE="1")
    assert "it is not in the cache of datasets" in empty["error"]


@pytest.mark.parametrize(
    ("variable", "place"),
    [("HF_HOME", "/dev/null"), ("HF_HOME", "/proc/nope"), ("HF_DATASETS_CACHE", "/dev/null/below")],
)
def test_a_cache_of_datasets_that_cant_be_written_is_named(tmp_path: Path, variable: str, place: str):
    source = write_lex_glue(tmp_path / "files", {"train": 4, "validation": 2, "test": 2})
    repository = {"README.md": CARD.encode(), **files_below(source, "eurlex/")}
    with hub_of({"coastalcph/lex_glue": repository}) as endpoint:
        asked = {"HF_ENDPOINT": endpoint, "ALTGRAD_CACHE": str(tmp_path / "altgrad"), variable: place}
        (found,) = load(tmp_path / "home", ("eurlex", "labels", None), **asked)
    assert f"; {variable}: the cache {place}" in found["error"] and "can't be written" in found["error"]


@pytest.mark.slow
def test_eurlex_57k_comes_with_its_own_label_field(tmp_path: Path):
    source = write_eurlex57k(tmp_path / "files", 400)
    with hub_of({"pietrolesci/eurlex-57k": files_below(source, "data/")}) as endpoint:
        (found,) = load(tmp_path / "home", ("eurlex-57k", "labels", None), HF_ENDPOINT=endpoint)
    assert found["train"] == 101 and len(found["labels"]) == 400


def test_multi_eurlex_is_read_in_english(tmp_path: Path):
    source = write_lex_glue(tmp_path / "files", {"train": 12, "validation": 3, "test": 3})
    other = write_lex_glue(tmp_path / "other", {"train": 99, "validation": 3, "test": 3})
    repository = {**files_below(source, "en/"), **files_below(other, "de/")}
    with hub_of({"coastalcph/multi_eurlex": repository}) as endpoint:
        (found,) = load(tmp_path / "home", ("multi_eurlex", "labels", None), HF_ENDPOINT=endpoint)
    assert found["train"] == 12 and found["labels"] == NAMES


def test_a_hub_that_does_not_answer_is_said_at_once_with_the_alternatives(tmp_path: Path):
    names = ("eurlex", "eurlex-57k", "multi_eurlex")
    started = time.monotonic()
    answers = load(tmp_path, *((name, "labels", None) for name in names), HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - started < 30
    for name, found in zip(names, answers, strict=True):
        assert f"data '{name}': the Hugging Face hub does not answer" in found["error"]
        for alternative in ("JSONL, parquet or CSV", "--data PATH", "pydoc or synthetic", "HF_HUB_OFFLINE=1"):
            assert alternative in found["error"]
