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
    pytest.mark.skipif(not (SAMPLE / "train.jsonl").is_file(),
                       reason=f"no EurLex sample in {SAMPLE}; ALTGRAD_EURLEX_SAMPLE names another folder"),
]


def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_classify", ROOT / "tests" / "bench" / "classify.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scores() -> dict[str, tuple[float, float]]:
    """F1 micro and macro on test by method, fitted on training and validation documents where it is fitted twice."""
    classify, field = bench(), "labels_l1"
    encoder = classify.bench_encoder(SAMPLE, field, seed=0)["train+dev"]
    return {"encoder": encoder, "commonest": classify.bench_baseline(SAMPLE, field),
            "tfidf": classify.bench_tfidf(SAMPLE, field)["train+dev"]}


def test_the_encoder_learns_the_domains_about_as_well_as_tfidf_does(scores: dict[str, tuple[float, float]]):
    (micro, macro), commonest, tfidf = scores["encoder"], scores["commonest"], scores["tfidf"]
    assert micro >= 0.68
    assert micro > commonest[0] and macro > commonest[1]
    assert micro >= tfidf[0] - 0.06 and macro >= tfidf[1] - 0.06


def test_the_encoder_knows_rare_domains_about_as_well_as_it_did(scores: dict[str, tuple[float, float]]):
    # Four seeds gave .471 to .483 (docs/bench/classify.md); differences under .03 are noise.
    assert scores["encoder"][1] >= 0.45


@pytest.mark.xfail(reason="the mean of four seeds is .477, .003 below the goal of .48; seed 0 gave .483 on one "
                          "processor and may not on another: docs/bench/classify.md", strict=False)
def test_the_encoder_reaches_the_goal_for_rare_domains(scores: dict[str, tuple[float, float]]):
    assert scores["encoder"][1] >= 0.48
