"""The ledger keeps what it is given, non-finite numbers included, and knows what is left."""

import math
import sqlite3
from pathlib import Path

import pytest

from altgrad.sweep.record.ledger import Ledger, as_asked
from altgrad.training.config import TrainConfig
from altgrad.training.guards import DEFAULT_GUARDS
from altgrad.training.outcome import GUARD_KINDS, Outcome, OutcomeKind

CONFIG = TrainConfig(steps=100)


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        opened.add_trials({"t": CONFIG}, "a" * 64)
        yield opened


@pytest.mark.parametrize("value", [1.5, math.inf, -math.inf, math.nan])
def test_rows_and_outcomes_round_trip(ledger: Ledger, value: float) -> None:
    ledger.record_rows("t", [{"step": 1, "train_loss": value}, {"step": 2, "val_loss": 3.0, "layers": {"a": {}}}])
    outcome = Outcome(kind=OutcomeKind.NONFINITE, step=2, signal="train_loss", value=value, train_loss=value)
    ledger.record_outcome("t", outcome)
    ((step, loss),) = ledger.signal("t", "train_loss")
    assert (step, repr(loss)) == (1, repr(value))
    assert repr(ledger.outcomes()["t"]) == repr(outcome)


def test_recording_twice_changes_nothing(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.record_rows("t", [{"step": step, "train_loss": 1.0} for step in (1, 2, 3)])
    assert ledger.row_counts() == {"t": 3}


def left(ledger: Ledger, **changes: object) -> bool:
    return bool(ledger.remaining({"t": CONFIG.model_copy(update=changes)}))


def test_a_trial_without_an_ending_is_left(ledger: Ledger) -> None:
    assert left(ledger)


def test_a_longer_run_goes_on_and_a_shorter_one_is_settled(ledger: Ledger) -> None:
    ledger.record_outcome("t", Outcome(kind=OutcomeKind.DONE, step=100))
    assert not left(ledger) and not left(ledger, steps=50) and left(ledger, steps=101)


ENDING = [rule for rule in DEFAULT_GUARDS if rule.kind != "warning"]


@pytest.mark.parametrize("rule", ENDING, ids=lambda rule: rule.signal)
def test_a_guards_ending_holds_while_the_guard_is_in_force(ledger: Ledger, rule) -> None:
    ledger.record_outcome("t", Outcome(kind=OutcomeKind(rule.kind), step=40, signal=rule.signal, limit=rule.limit))
    assert not left(ledger)
    assert left(ledger, guards=())
    assert left(ledger, guards=tuple(other for other in DEFAULT_GUARDS if other != rule))


@pytest.mark.parametrize("kind", [kind for kind in OutcomeKind if kind not in GUARD_KINDS | {OutcomeKind.DONE}])
def test_interruptions_and_bugs_are_tried_again_and_pruning_is_final(ledger: Ledger, kind: OutcomeKind) -> None:
    ledger.record_outcome("t", Outcome(kind=kind, step=40))
    assert left(ledger) == (kind is not OutcomeKind.PRUNED)


def test_trials_are_entered_all_or_none(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(sqlite3.Error):
            ledger.add_trials({"a": CONFIG, object(): CONFIG}, "0" * 64)  # type: ignore[dict-item]
        assert ledger.trials() == {}


AT_50 = {"train_loss": 2.9, "val_loss": 3.0, "bits_per_byte": 4.3}


def test_a_longer_run_is_worth_what_it_was_at_the_step_asked_for() -> None:
    longer = Outcome(kind=OutcomeKind.DONE, step=100, val_loss=2.0, seconds=7.0)
    short = CONFIG.model_copy(update={"steps": 50})
    assert as_asked(longer, short, AT_50) == Outcome(OutcomeKind.DONE, 50, **AT_50, seconds=7.0)
    unknown = as_asked(longer, short, None)
    assert unknown is not None and unknown.val_loss is None and "not evaluated at step 50" in unknown.message
    assert as_asked(longer, CONFIG.model_copy(update={"steps": 101}), None) is None


def test_a_stop_counts_up_to_the_step_asked_for() -> None:
    rule = next(rule for rule in DEFAULT_GUARDS if rule.kind == "stalled")
    stop = Outcome(OutcomeKind.STALLED, 60, signal=rule.signal, limit=rule.limit)
    for steps, kind in ((50, "done"), (60, "stalled"), (61, "stalled")):
        asked = as_asked(stop, CONFIG.model_copy(update={"steps": steps}), AT_50)
        assert asked is not None and asked.kind == kind


def test_an_unknown_signal_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="'loss' is not one of"):
        ledger.signal("t", "loss")
