"""Scores against hand-counted examples, and the threshold against a search over all of them."""

import math

import numpy as np
import pytest
import sklearn.metrics

from altgrad.training.metrics import (
    CLASSIFICATION_SCORES,
    baseline_f1,
    best_threshold,
    bits_per_byte,
    classification_scores,
)

TRUTH = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=np.float32)
CHANCES = np.array([[0.9, 0.6, 0.1], [0.4, 0.8, 0.2], [0.3, 0.1, 0.0], [0.7, 0.9, 0.1]], dtype=np.float32)


def test_scores_of_an_example_counted_by_hand():
    found = classification_scores(TRUTH, CHANCES, 0.5)
    # Given: (0,0) hit, (0,1) false, (1,1) hit, (3,0) false, (3,1) hit; missed: (1,0).
    assert (found["precision"], found["recall"]) == (pytest.approx(3 / 5), pytest.approx(3 / 4))
    assert found["f1_micro"] == pytest.approx(2 * 3 / (5 + 4))
    # No document has the third label.
    assert found["f1_macro"] == pytest.approx((2 * 1 / (2 + 2) + 2 * 2 / (3 + 2)) / 2)
    assert found["subset_accuracy"] == 1 / 4 and found["hamming_loss"] == pytest.approx(3 / 12)
    pairs = [(a > b) + 0.5 * (a == b) for a in CHANCES[TRUTH == 1] for b in CHANCES[TRUTH == 0]]
    assert found["roc_auc_micro"] == pytest.approx(np.mean(pairs))
    assert 0 < found["pr_auc_micro"] < 1 and set(found) == set(CLASSIFICATION_SCORES)


def test_macro_f1_is_over_the_labels_that_some_document_has():
    truth = np.array([[1, 1, 0], [1, 0, 0]], dtype=np.float32)
    of_first, never_right = 2 * 2 / (2 + 2), 0.0
    nothing_false = np.array([[1, 0, 0], [1, 0, 0]], dtype=np.float32)
    falsely_third = np.array([[1, 0, 1], [1, 0, 0]], dtype=np.float32)
    for chances in (nothing_false, falsely_third):
        found = classification_scores(truth, chances, 0.5)
        assert found["f1_macro"] == pytest.approx((of_first + never_right) / 2)
    # A label given falsely is not lost: it counts among all decisions.
    assert found["f1_micro"] == pytest.approx(2 * 2 / (3 + 3))
    assert classification_scores(truth, nothing_false, 0.5)["f1_micro"] == pytest.approx(2 * 2 / (3 + 2))


def test_a_single_label_is_scored_as_one_of_many_would_be():
    single = np.array([[1], [0], [0], [0]], dtype=np.float32)
    given = np.array([[1], [1], [0], [0]], dtype=np.float32)
    for absent in (0, 1):
        beside = [np.pad(each, ((0, 0), (0, absent))) for each in (single, given)]
        found = classification_scores(*beside, 0.5)
        assert found["f1_macro"] == found["f1_micro"] == pytest.approx(2 * 1 / (1 + 2))
        assert (found["precision"], found["recall"]) == (pytest.approx(1 / 2), 1)


def test_macro_f1_is_scikit_learns_where_every_label_is_present():
    generator = np.random.default_rng(1)
    truth, chances = generator.random((60, 9)) < 0.3, generator.random((60, 9))
    expected = sklearn.metrics.f1_score(truth, chances >= 0.4, average="macro")
    assert classification_scores(truth, chances, 0.4)["f1_macro"] == pytest.approx(expected)


def test_the_best_threshold_is_the_best_of_all():
    generator = np.random.default_rng(0)
    targets = (generator.random((40, 7)) < 0.2).astype(np.float32)
    chances = np.clip(0.3 * targets + 0.7 * generator.random((40, 7)), 0, 1).astype(np.float32)
    threshold, f1 = best_threshold(targets, chances)
    every = [classification_scores(targets, chances, value)["f1_micro"] for value in np.unique(chances)]
    assert f1 == pytest.approx(max(every))
    assert classification_scores(targets, chances, threshold)["f1_micro"] == pytest.approx(f1)


def test_numbers_that_are_none_stay_so():
    broken = CHANCES.copy()
    broken[0, 0] = math.nan
    assert all(map(math.isnan, classification_scores(TRUTH, broken, 0.5).values()))
    assert math.isnan(best_threshold(TRUTH, broken)[1])
    nothing = np.zeros_like(TRUTH)
    assert best_threshold(nothing, CHANCES) == (0.5, 0.0)
    undefined = classification_scores(nothing, CHANCES, 0.5)
    assert math.isnan(undefined["roc_auc_micro"]) and math.isnan(undefined["f1_macro"])


def test_the_baseline_gives_the_commonest_labels():
    frequencies = np.array([0.1, 0.9, 0.5])
    # Best k on validation is 1 (label 1 only): 2 hits, 2 given, 2 wanted.
    val = np.array([[0, 1, 0], [0, 1, 0]], dtype=np.float32)
    test = np.array([[0, 1, 1], [1, 0, 0], [0, 1, 0]], dtype=np.float32)
    assert baseline_f1(frequencies, val, test) == pytest.approx(2 * 2 / (3 + 4))
    unseen = np.concatenate([test, np.ones((3, 1), np.float32)], axis=1)
    assert baseline_f1(frequencies, np.pad(val, ((0, 0), (0, 1))), unseen) == pytest.approx(2 * 2 / (3 + 7))


def test_bits_per_byte_divides_by_the_bytes_of_a_token():
    assert bits_per_byte(math.log(2) * 8, bytes_per_token=4.0) == pytest.approx(2.0)
