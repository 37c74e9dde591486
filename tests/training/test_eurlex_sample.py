"""The classifier on real EU law, beside what any method has to beat; the sample lies outside the project."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = Path(os.environ.get("ALTGRAD_EURLEX_SAMPLE", ROOT.parent / "shared" / "data" / "eurlex_sample"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SAMPLE / "train.jsonl").is_file(),
        reason=f"no EurLex sample in {SAMPLE}; ALTGRAD_EURLEX_SAMPLE names another folder",
    ),
]


def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_classify", ROOT / "tests" / "bench" / "classify.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scores() -> dict[str, tuple[float, float, float]]:
    """F1 micro, macro and macro over all labels on test, by method; fitted on training and validation documents where
    it is fitted twice."""
    classify, field = bench(), "labels_l1"
    both = ("train+dev",)
    encoder = classify.bench_encoder(SAMPLE, field, seed=0, protocols=both)["train+dev"]
    return {
        "encoder": encoder,
        "commonest": classify.bench_baseline(SAMPLE, field),
        "tfidf": classify.bench_tfidf(SAMPLE, field, both)["train+dev"],
    }


def test_the_encoder_learns_the_domains_about_as_well_as_tfidf_does(scores: dict[str, tuple[float, float, float]]):
    (micro, macro, _), commonest, tfidf = scores["encoder"], scores["commonest"], scores["tfidf"]
    assert micro >= 0.68
    assert micro > commonest[0] and macro > commonest[1]
    assert micro >= tfidf[0] - 0.06 and macro >= tfidf[1] - 0.06


def test_the_encoder_knows_the_rare_domains_too(scores: dict[str, tuple[float, float, float]]):
    # Four seeds gave .494 to .507, and .471 to .483 over all labels (docs/bench/classify.md).
    assert scores["encoder"][1] >= 0.48
    assert scores["encoder"][2] >= 0.45


def test_the_commonest_labels_score_what_is_known_of_them(scores: dict[str, tuple[float, float, float]]):
    # The yardstick of the goals, .564 and .138: the four commonest domains for every document.
    assert scores["commonest"][:2] == pytest.approx((0.5645, 0.1381), abs=5e-5)
