"""The classifier on real EU law, beside what any method has to beat; the sample lies outside the project."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
SAMPLE = Path(os.environ.get("ALTGRAD_EURLEX_SAMPLE", ROOT.parent / "shared" / "data" / "eurlex_sample"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SAMPLE / "train.jsonl").is_file(),
                       reason=f"no EurLex sample in {SAMPLE}; ALTGRAD_EURLEX_SAMPLE names another folder"),
]


def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_classify", ROOT / "tests" / "bench" / "classify.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_encoder_learns_the_domains_as_well_as_tfidf_does(tmp_path: Path):
    classify, field = bench(), "labels_l1"
    both = classify.joined(SAMPLE, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        micro, macro = classify.bench_encoder(SAMPLE, both, field, seed=0)["train+dev"]
    finally:
        torch.set_num_threads(threads)
    commonest = classify.bench_baseline(SAMPLE, field)
    tfidf = classify.bench_tfidf(SAMPLE, both, field)["train+dev"]
    assert micro >= 0.68 and macro >= 0.48
    assert micro > commonest[0] and macro > commonest[1]
    assert micro >= tfidf[0] - 0.06 and macro >= tfidf[1] - 0.06
