"""The record survives kills: rows once each, strict JSON, one owner at a time."""

import math
import multiprocessing
import time
from pathlib import Path

import pytest

from altgrad.training import record
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import TrialFolder, from_plain, read_rows, to_plain


def test_nonfinite_numbers_survive_a_round_trip_through_strict_json():
    row = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1.5, "e": "text"}
    back = from_plain(to_plain(row))
    assert math.isnan(back["a"]) and back["b"][0] == math.inf and back["b"][1]["c"] == -math.inf
    assert back["d"] == 1.5 and back["e"] == "text"


def test_an_attempt_that_resumes_drops_the_rows_behind_its_checkpoint(tmp_path: Path):
    folder = TrialFolder(tmp_path / "t")
    with folder:
        folder.begin({}, after_step=0)
        folder.append([{"step": step, "train_loss": 1.0} for step in range(1, 8)])
    with folder:
        folder.begin({}, after_step=4)
        folder.append([{"step": 5, "train_loss": math.nan}])
    rows, _ = read_rows(folder.metrics_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert math.isnan(rows[-1]["train_loss"])


def test_a_line_cut_short_by_a_kill_is_not_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":2}\n{"st')
    rows, offset = read_rows(path)
    assert [row["step"] for row in rows] == [1, 2]
    with path.open("a") as file:
        file.write('ep":3}\n')
    assert [row["step"] for row in read_rows(path, offset)[0]] == [3]


def _hold(path: str, seconds: float) -> None:
    with TrialFolder(Path(path)):
        Path(path, "held").touch()
        time.sleep(seconds)


def test_a_second_owner_waits_for_the_first_to_die(tmp_path: Path):
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path), 60.0))
    holder.start()
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.05)
        record_wait = record.LOCK_WAIT_SECONDS
        record.LOCK_WAIT_SECONDS = 0.3
        try:
            with pytest.raises(TimeoutError, match="owned by another process"), TrialFolder(tmp_path):
                pass
        finally:
            record.LOCK_WAIT_SECONDS = record_wait
        holder.kill()
        with TrialFolder(tmp_path):
            assert (tmp_path / ".lock").exists()
    finally:
        holder.kill()
        holder.join()


def test_an_outcome_is_whole_or_absent_and_reads_back(tmp_path: Path):
    outcome = Outcome(
        kind=OutcomeKind.STALLED, step=40, signal="flip_yield", layer="lm_head", value=0.1, limit=0.2, first_seen=20
    )
    folder = TrialFolder(tmp_path)
    with folder:
        folder.begin({}, after_step=0)
        assert not folder.outcome_path.exists()
        folder.finish(outcome)
    import json

    assert Outcome.from_dict(json.loads(folder.outcome_path.read_text())) == outcome
    assert not list(tmp_path.glob("*.partial"))
