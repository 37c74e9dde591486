"""A guard fires on its planted fault, with its evidence, and stays silent on a healthy run."""

import math

import pytest
from pydantic import ValidationError

from altgrad.training.guards import DEFAULT_GUARDS, NAMED_RULES, GuardPanel, GuardRule, when
from altgrad.training.outcome import OutcomeKind


def interval(end: int, **last: object) -> list[dict]:
    rows = [
        {"step": step, "train_loss": 5.0 - 0.02 * step, "grad_norm": 1.0, "loss_excess": -0.02 * step}
        for step in range(end - 9, end + 1)
    ]
    rows[-1] |= {"flip_yield": 0.95, "nonfinite_weights": 0} | last
    return rows


def run(panel: GuardPanel, intervals: list[list[dict]]):
    for rows in intervals:
        verdict = panel.check(rows)
        if verdict is not None:
            return verdict
    return None


def test_the_defaults_are_silent_on_a_healthy_run():
    assert run(GuardPanel(DEFAULT_GUARDS), [interval(end) for end in range(10, 210, 10)]) is None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_loss_inside_an_interval_is_caught_at_its_own_step(poison):
    rows = interval(30)
    rows[3]["train_loss"] = poison
    verdict = run(GuardPanel(DEFAULT_GUARDS), [interval(10), interval(20), rows])
    assert (verdict.kind, verdict.signal, verdict.step, verdict.limit) == (
        OutcomeKind.NONFINITE,
        "train_loss",
        24,
        None,
    )


def test_non_finite_weights_name_their_layer():
    verdict = run(GuardPanel(DEFAULT_GUARDS), [interval(10, nonfinite_weights=3, nonfinite_layer="lm_head.weight")])
    assert (verdict.kind, verdict.layer, verdict.value) == (OutcomeKind.NONFINITE, "lm_head.weight", 3)


def test_a_low_flip_yield_must_last_and_names_the_worst_layer():
    layers = {"a": {"flip_yield": 0.15}, "b": {"flip_yield": 0.05}, "c": {"flip_yield": math.nan}}
    low = [interval(end, flip_yield=0.1, layers=layers) for end in (30, 40, 50)]
    panel = GuardPanel(DEFAULT_GUARDS)
    assert run(panel, low[:2]) is None
    verdict = panel.check(low[2])
    assert (verdict.kind, verdict.signal, verdict.layer) == (OutcomeKind.STALLED, "flip_yield", "b")
    assert (verdict.value, verdict.limit, verdict.first_seen, verdict.step) == (0.1, 0.2, 30, 50)


def test_one_good_check_starts_the_count_again():
    low, good = {"flip_yield": 0.1}, {"flip_yield": 0.9}
    course = [interval(30, **low), interval(40, **low), interval(50, **good), interval(60, **low), interval(70, **low)]
    assert run(GuardPanel(DEFAULT_GUARDS), course) is None


def test_a_nan_signal_is_neither_above_nor_below():
    course = [interval(end, flip_yield=math.nan) for end in range(30, 90, 10)]
    assert run(GuardPanel(DEFAULT_GUARDS), course) is None


def test_divergence_is_judged_against_the_first_loss():
    course = [interval(end) for end in (10, 20, 30)]
    for rows in course:
        for row in rows:
            row["loss_excess"] = 1.2
    verdict = run(GuardPanel(DEFAULT_GUARDS), course)
    assert (verdict.kind, verdict.step, verdict.first_seen) == (OutcomeKind.DIVERGED, 30, 1)


def test_a_restored_panel_reaches_the_same_verdict_at_the_same_step():
    course = [interval(end, flip_yield=0.1) for end in (30, 40, 50, 60)]
    straight = run(GuardPanel(DEFAULT_GUARDS), course)
    first = GuardPanel(DEFAULT_GUARDS)
    assert run(first, course[:2]) is None
    second = GuardPanel(DEFAULT_GUARDS)
    second.load_state_dict(first.state_dict())
    assert run(second, course[2:]) == straight


def test_a_rule_with_an_unknown_signal_or_a_misplaced_limit_is_refused():
    with pytest.raises(ValidationError, match=r"is not known.*nearest: flip_yield"):
        GuardRule(kind="stalled", signal="flip_yeild", test="below", limit=0.2)
    with pytest.raises(ValidationError, match="limit"):
        GuardRule(kind="stalled", signal="flip_yield", test="below")
    with pytest.raises(ValidationError, match="limit"):
        GuardRule(kind="nonfinite", signal="train_loss", test="nonfinite", limit=1.0)


@pytest.mark.parametrize("limit", [math.nan, math.inf, -math.inf])
def test_a_limit_that_nothing_can_cross_is_refused(limit):
    with pytest.raises(ValidationError, match="finite"):
        GuardRule(kind="diverged", signal="train_loss", test="above", limit=limit)


def test_a_rule_reads_as_a_sentence_or_as_text():
    rule = when("flip_yield/min").below(0.2).for_checks(3).after(50)
    assert rule == GuardRule.model_validate("flip_yield/min < 0.2 for 3 after 50")
    assert (rule.kind, rule.test, rule.limit, rule.checks, rule.after_step) == ("stalled", "below", 0.2, 3, 50)
    assert when("grad_norm").is_nonfinite() == GuardRule.model_validate("grad_norm is nonfinite")
    assert when("overflow/max").above(9).ending_as("stalled") == GuardRule.model_validate("overflow/max > 9 as stalled")
    assert GuardRule.model_validate("literal_stall") == when("stall_ratio").above(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flip_yeild < 0.2", "nearest: flip_yield"),
        ("flip_yield < 0", "never below"),
        ("stall_ratio > 1", "never above"),
        ("grad_norm/min < 1", "of layers"),
        ("flip_yield/ < 1", "of layers"),
        ("flip_yield", "is no rule"),
        ("flip_yield < often", "limit"),
        ("flip_yield < 0.2 for 0", "checks"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        GuardRule.model_validate(text)


@pytest.mark.parametrize(
    ("signal", "value", "layer"),
    [("flip_yield/min", 0.1, "b"), ("flip_yield/b", 0.1, "b"), ("flip_yield/mean", 0.35, "b")],
)
def test_rules_over_layers_and_on_one_layer(signal, value, layer):
    layers = {"a": {"flip_yield": 0.6}, "b": {"flip_yield": 0.1}, "c": {"flip_yield": float("nan")}}
    panel = GuardPanel([when(signal).below(0.4)])
    verdict = panel.check([{"step": 9}, {"step": 10, "flip_yield": 0.9, "layers": layers}])
    assert verdict is not None and verdict.value == pytest.approx(value)
    assert (verdict.signal, verdict.layer, verdict.step) == (signal, layer, 10)
    assert GuardPanel([when("flip_yield/a").below(0.4)]).check([{"step": 10, "layers": layers}]) is None


def test_a_warning_is_recorded_and_ends_nothing():
    warning = when("grad_norm").above(2.0).ending_as("warning")
    rows = interval(10)
    rows[4]["grad_norm"] = 3.0
    panel = GuardPanel([warning])
    assert panel.check(rows) is None
    assert [(w.signal, w.step, w.value) for w in panel.warnings] == [("grad_norm", 5, 3.0)]
    assert panel.check(interval(20)) is None and panel.warnings == []


@pytest.mark.parametrize("name", NAMED_RULES)
def test_rules_have_names(name):
    assert GuardRule.model_validate(name) == NAMED_RULES[name]
