"""The recorder reads what workers write, however often and in whatever pieces."""

import math
from pathlib import Path

import pytest

from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.recorder import Recorder
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import RESULT_KINDS, Outcome, OutcomeKind
from altgrad.training.record import TrialFolder, read_rows


@pytest.fixture
def recorder(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials({"t": TrainConfig()}, "a" * 64)
        yield Recorder(ledger, tmp_path / "trials")


def write(
    recorder: Recorder, first: int, last: int, *, after: int, loss: float = 1.0, outcome: Outcome | None = None
) -> None:
    """One attempt that resumes behind `after` and trains steps first to last."""
    with TrialFolder(recorder.folder / "t") as folder:
        folder.begin({}, after_step=after)
        folder.append({"step": step, "train_loss": loss} for step in range(first, last + 1))
        if outcome is not None:
            folder.finish(outcome)


def steps(recorder: Recorder) -> dict[int, float]:
    return dict(recorder.ledger.signal("t", "train_loss"))


def test_a_trial_that_has_not_begun_is_no_error(recorder: Recorder) -> None:
    recorder.follow("t")
    assert recorder.finish("t") is None and recorder.ingest(["t"]) == 0


def test_growing_and_half_written_files(recorder: Recorder) -> None:
    write(recorder, 1, 3, after=0)
    recorder.follow("t")
    with (recorder.folder / "t" / "metrics.jsonl").open("a") as file:
        file.write('{"step":4,"train_loss":')
        file.flush()
        recorder.follow("t")
        assert sorted(steps(recorder)) == [1, 2, 3]
        file.write('"nan"}\n')
    recorder.follow("t")
    assert sorted(steps(recorder)) == [1, 2, 3, 4] and math.isnan(steps(recorder)[4])


def test_a_resumed_worker_replaces_the_file(recorder: Recorder) -> None:
    write(recorder, 1, 9, after=0)
    recorder.follow("t")
    write(recorder, 6, 8, after=5, loss=2.0)
    recorder.follow("t")
    assert [steps(recorder)[step] for step in (5, 6, 8)] == [1.0, 2.0, 2.0]
    write(recorder, 9, 30, after=8, loss=3.0)
    recorder.follow("t")
    assert sorted(steps(recorder)) == list(range(1, 31)) and steps(recorder)[9] == 3.0


def test_a_replaced_file_is_read_anew_even_when_it_is_longer(recorder: Recorder) -> None:
    write(recorder, 1, 9, after=0)
    recorder.follow("t")
    write(recorder, 6, 30, after=5, loss=2.0)
    recorder.follow("t")
    assert [steps(recorder)[step] for step in (5, 6, 9, 30)] == [1.0, 2.0, 2.0, 2.0]


def test_ingest_takes_an_ending_whose_rows_are_known(recorder: Recorder) -> None:
    write(recorder, 1, 3, after=0, outcome=Outcome(kind=OutcomeKind.DONE, step=3))
    recorder.follow("t")
    assert recorder.ingest(["t"]) == 1
    assert recorder.ledger.outcomes()["t"].kind is OutcomeKind.DONE


def test_the_workers_ending_counts_before_the_drivers(recorder: Recorder) -> None:
    done, pruned = Outcome(kind=OutcomeKind.DONE, step=3), Outcome(kind=OutcomeKind.PRUNED, step=3)
    write(recorder, 1, 3, after=0, outcome=done)
    assert recorder.finish("t", pruned) == done == recorder.ledger.outcomes()["t"]


def test_the_drivers_ending_is_left_in_the_folder_too(recorder: Recorder) -> None:
    write(recorder, 1, 3, after=0)
    pruned = Outcome(kind=OutcomeKind.PRUNED, step=3, value=math.inf)
    assert recorder.finish("t", pruned) == pruned
    with Ledger(recorder.folder.parent / "other.sqlite") as other:
        other.add_trials({"t": TrainConfig()}, "a" * 64)
        assert Recorder(other, recorder.folder).ingest(["t"]) == 1
        assert other.outcomes()["t"] == pruned


def test_the_drivers_ending_says_where_the_trial_was(recorder: Recorder) -> None:
    devices = [{"kind": "A", "host": "one", "driver": ""}, {"kind": "B", "host": "one", "driver": "570"}]
    with TrialFolder(recorder.folder / "t") as folder:
        folder.begin({"devices": devices}, after_step=0)
    outcome = recorder.finish("t", Outcome(kind=OutcomeKind.PRUNED, step=3))
    assert outcome is not None and (outcome.device, outcome.driver, outcome.hostname) == ("A; B", "570", "one")
    assert recorder.ledger.outcomes()["t"] == outcome


@pytest.mark.parametrize(("kind", "stays"), [("done", False), ("stalled", False), ("pruned", False), ("bug", True)])
@pytest.mark.parametrize("by", ["finish", "ingest"])
def test_checkpoints_of_trials_with_a_result_can_be_dropped(
    recorder: Recorder, by: str, kind: str, stays: bool
) -> None:
    write(recorder, 1, 3, after=0, outcome=Outcome(kind=OutcomeKind(kind), step=3))
    state = recorder.folder / "t" / "checkpoint" / "state.pt"
    state.parent.mkdir()
    state.write_bytes(b"state")
    dropping = Recorder(recorder.ledger, recorder.folder, drops=lambda _, outcome: outcome.kind in RESULT_KINDS)
    for one in (recorder, dropping):
        one.finish("t") if by == "finish" else one.ingest(["t"])
        assert state.exists() == (stays or one is recorder)


def test_ingest_takes_what_a_killed_driver_left_and_then_nothing(recorder: Recorder) -> None:
    outcome = Outcome(kind=OutcomeKind.NONFINITE, step=9, signal="train_loss", value=math.nan)
    write(recorder, 1, 4, after=0)
    recorder.follow("t")
    write(recorder, 5, 9, after=4, outcome=outcome)
    fresh = Recorder(recorder.ledger, recorder.folder)
    assert fresh.ingest(["t", "never_begun"]) == 1
    assert sorted(steps(recorder)) == list(range(1, 10))
    assert repr(recorder.ledger.outcomes()["t"]) == repr(outcome)
    assert fresh.ingest(["t"]) == 0


def test_a_longer_runs_new_ending_replaces_the_old(recorder: Recorder) -> None:
    write(recorder, 1, 3, after=0, outcome=Outcome(kind=OutcomeKind.DONE, step=3))
    recorder.ingest(["t"])
    write(recorder, 4, 6, after=3, outcome=Outcome(kind=OutcomeKind.DONE, step=6))
    assert recorder.ingest(["t"]) == 1
    assert recorder.ledger.outcomes()["t"].step == 6
    assert len(read_rows(recorder.folder / "t" / "metrics.jsonl")[0]) == 6


def test_what_an_earlier_run_left_is_not_how_this_one_ends(recorder: Recorder) -> None:
    write(recorder, 1, 3, after=0, outcome=Outcome(OutcomeKind.DONE, 3))
    (recorder.folder / "t" / "hung.17").write_text('  File "x.py", line 1')
    recorder.expect("t")
    assert recorder.finish("t") is None and not list((recorder.folder / "t").glob("hung.*"))
    assert sorted(steps(recorder)) == [1, 2, 3]
