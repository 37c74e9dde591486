"""The actor, without a cluster: it reports, it takes the next trial, and a trial's error stays that trial's."""

import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from altgrad.sweep.engine import executors
from altgrad.sweep.engine.driver import Follower
from altgrad.sweep.engine.executors import TrialActor, run_request
from altgrad.sweep.engine.faults import Breaker, fault
from altgrad.sweep.pace.schedulers import HealthScheduler
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.progress import Progress
from altgrad.sweep.record.recorder import Recorder
from altgrad.training.config import TrainConfig
from altgrad.training.data.corpus import _load, load_corpus
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import TrialFolder

CONFIG = TrainConfig.model_validate(
    {
        "steps": 10,
        "log_interval": 5,
        "eval_interval": 5,
        "checkpoint_interval": 5,
        "format": "E5M2",
        "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
        "data": {"batch": 2, "eval_batches": 1},
    }
)


def request(folder: Path) -> dict[str, Any]:
    return {"trial": run_request(folder.name, CONFIG, folder)}


@pytest.fixture
def actor(tmp_path: Path) -> TrialActor:
    return TrialActor(config=request(tmp_path / "a"))


def test_an_interval_a_step_and_the_ending_with_the_last(actor: TrialActor, tmp_path: Path) -> None:
    first, last = actor.step(), actor.step()
    assert first["step"] == 5 and math.isfinite(first["train_loss"]) and "done" not in first
    assert last == {"step": 10, "outcome": "done", "done": True}
    with TrialFolder(tmp_path / "a"):
        """The ended trial's folder is free."""


def test_a_reused_actor_frees_the_old_folder_and_runs_the_new(actor: TrialActor, tmp_path: Path) -> None:
    actor.step()
    assert actor.reset_config(request(tmp_path / "b"))
    with TrialFolder(tmp_path / "a"):
        """A trial that was stopped in the middle does not stay locked."""
    assert [actor.step()["step"], actor.step()["step"]] == [5, 10]
    assert (tmp_path / "b" / "outcome.json").exists() and not (tmp_path / "a" / "outcome.json").exists()


@pytest.mark.parametrize(
    ("error", "kind"), [(MemoryError("no room"), OutcomeKind.OOM), (KeyError("planted"), OutcomeKind.BUG)]
)
def test_an_error_is_an_outcome_with_its_traceback(
    actor: TrialActor, tmp_path: Path, error: Exception, kind: OutcomeKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(executors, "Trainer", broken)
    assert actor.step() == {"step": 0, "outcome": str(kind), "done": True}
    written = Outcome.from_dict(json.loads((tmp_path / "a" / "outcome.json").read_text()))
    assert written.kind is kind and type(error).__name__ in written.message
    assert "Traceback" in (tmp_path / "a" / "traceback.txt").read_text()
    monkeypatch.undo()
    actor.reset_config(request(tmp_path / "a"))
    actor.step()
    assert actor.step()["outcome"] == "done"
    assert not (tmp_path / "a" / "traceback.txt").exists()


def test_out_of_memory_is_first_answered_by_smaller_pieces(
    actor: TrialActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = executors.Trainer, list[int]()

    def scarce(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["workers"].micro_batches)
        if seen[-1] == 1:
            raise MemoryError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(executors, "Trainer", scarce)
    assert [actor.step()["step"], actor.step()["outcome"]] == [5, "done"] and seen == [1, 2]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["micro_batches"] == 2


def test_nothing_of_an_attempt_without_room_is_alive_in_the_next(
    actor: TrialActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, filled = executors.Trainer, list[Any]()

    class Memory:
        """What fills it."""

    def scarce(*args: Any, **kwargs: Any) -> Any:
        if not filled:
            memory = Memory()
            filled.append(weakref.ref(memory))
            raise MemoryError("no room")
        assert filled[0]() is None
        return real(*args, **kwargs)

    monkeypatch.setattr(executors, "Trainer", scarce)
    assert actor.step()["step"] == 5


def test_a_folder_that_another_process_owns_is_rays_to_retry(
    actor: TrialActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("altgrad.training.record.LOCK_WAIT_SECONDS", 0.2)
    with TrialFolder(tmp_path / "a"), pytest.raises(TimeoutError):
        actor.step()
    assert not (tmp_path / "a" / "outcome.json").exists()


TUNE = """Failure # 1 (occurred at 2026-11-29_03-00-00)
Traceback (most recent call last):
  File "/x/ray/air/execution/_internal/event_manager.py", line 110, in resolve_future
    result = ray.get(future)
             ^^^^^^^^^^^^^^^
"""
TASK = (
    TUNE
    + """ray.exceptions.RayTaskError({name}): ray::TrialActor.train() (pid=71, ip=10.0.0.7)
  File "/x/altgrad/sweep/executors.py", line 101, in step
    return self._interval()
           ^^^^^^^^^^^^^^^^
{error}
"""
)
CREATION = (
    TUNE
    + """ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task
RuntimeError: The actor with name TrialActor failed to import on the worker.

Traceback (most recent call last):
  File "/x/ray/_private/function_manager.py", line 674, in _load_actor_class_from_gcs
    actor_class = pickle.loads(pickled_class)
                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^
ModuleNotFoundError: No module named 'mine'
"""
)
INVALID = """pydantic_core._pydantic_core.ValidationError: 1 validation error for TrainConfig
policy
  Value error, 'mine' is not allowed: uniform is expected [type=value_error, input_value='mine', input_type=str]
    For further information visit https://errors.pydantic.dev/2/v/value_error"""
FAULTS = {
    "process": ("The actor died.\nThe worker process has died.", OutcomeKind.NODE_LOST, "The worker process has died."),
    "node": (
        TUNE + "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n"
        "The actor is dead because its node has died. Node Id: 5",
        OutcomeKind.NODE_LOST,
        "The actor is dead because its node has died. Node Id: 5",
    ),
    "memory": ("ray.exceptions.OutOfMemoryError: task was killed", OutcomeKind.OOM, None),
    "lock": ("TimeoutError: folder has been owned", OutcomeKind.TIMEOUT, None),
    "time": (TASK.format(name="TimeoutError", error="TimeoutError: owned"), OutcomeKind.TIMEOUT, "TimeoutError: owned"),
    "no GPU": (
        TASK.format(name="NoGpu", error="altgrad.training.devices.NoGpu: 1 GPU asked for"),
        OutcomeKind.NODE_LOST,
        "NoGpu: 1 GPU asked for",
    ),
    "module": (CREATION, OutcomeKind.BUG, "ModuleNotFoundError: No module named 'mine'"),
    "configuration": (
        TASK.format(name="ValidationError", error=INVALID),
        OutcomeKind.BUG,
        "policy: Value error, 'mine' is not allowed: uniform is expected",
    ),
    "many lines": (
        TASK.format(name="RuntimeError", error="RuntimeError: no kernel\nCompile with X to see more.\n"),
        OutcomeKind.BUG,
        "RuntimeError: no kernel",
    ),
    "no words": (TASK.format(name="KeyboardInterrupt", error="my.Own"), OutcomeKind.BUG, "Own"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_rays_words_tell_the_kind_of_a_fault_and_its_first_true_line(tmp_path: Path, case: str) -> None:
    text, kind, message = FAULTS[case]
    (tmp_path / "error.txt").write_text(text)
    trial = SimpleNamespace(error_file=str(tmp_path / "error.txt"), last_result={"step": 7})
    outcome = fault(trial, tmp_path / "trial")
    assert (outcome.kind, outcome.step, outcome.message) == (kind, 7, message or text)
    assert (tmp_path / "trial" / "traceback.txt").read_text().strip() == text.strip()
    silent = fault(SimpleNamespace(error_file=None, last_result=None), tmp_path / "trial")
    assert silent.kind is OutcomeKind.NODE_LOST


BUG, OOM, LOST, DONE = OutcomeKind.BUG, OutcomeKind.OOM, OutcomeKind.NODE_LOST, OutcomeKind.DONE
SERIES = {
    "equal bugs": ([(BUG, "x"), (BUG, "y"), (BUG, "x"), (BUG, "x")], "x"),
    "bugs between results": ([(BUG, "x"), (DONE, ""), (BUG, "x"), (DONE, ""), (BUG, "x")], "x"),
    "different bugs": ([(BUG, "x"), (BUG, "y"), (BUG, "z")], None),
    "numbers and hosts": (
        [(LOST, f"NoGpu: 1 GPU asked for, none usable on node-{n}: driver 57{n}") for n in range(3)],
        "NoGpu: 1 GPU asked for, none usable on node-2: driver 572",
    ),
    "nodes lost between results": ([(LOST, "died"), (DONE, ""), (LOST, "died"), (DONE, ""), (LOST, "died")], None),
    "one cell's memory": ([(OOM, "no room"), (OOM, "no room"), (DONE, ""), (OOM, "no room")], None),
    "all cells' memory": ([(OOM, "no room of 2 GiB"), (OOM, "no room of 3 GiB"), (OOM, "no room of 5 GiB")], "no room"),
}


@pytest.mark.parametrize("case", SERIES)
def test_equal_errors_break_the_sweep_and_different_ones_do_not(tmp_path: Path, case: str) -> None:
    series, reason = SERIES[case]
    trials = dict.fromkeys("abcdef"[: len(series)], CONFIG)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, "0" * 64)
        breaker = Breaker()
        follower = Follower(
            Recorder(ledger, tmp_path), Progress(trials, 4, live=False), HealthScheduler(trials), breaker
        )
        for trial_id, (kind, message) in zip(trials, series, strict=True):
            assert not breaker.stop_all()
            with TrialFolder(tmp_path / trial_id) as folder:
                folder.finish(Outcome(kind=kind, step=0, message=message))
            follower.on_trial_complete(0, [], SimpleNamespace(config={"trial": {"trial_id": trial_id}}, last_result={}))
    assert breaker.stop_all() is (reason is not None)
    assert reason is None or (breaker.reason or "").startswith(f"3 trials failed alike: {reason}")


def test_a_trial_refuses_data_that_are_not_those_of_its_id(tmp_path: Path) -> None:
    """The files changed under the sweep, on this node or since the trial began."""
    source = tmp_path / "text.txt"
    source.write_text("abcdefgh " * 400)
    config = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"source": str(source)})})
    promised = load_corpus(config.data).text_sha256
    folder = tmp_path / "trial"
    actor = TrialActor(config={"trial": run_request("trial", config, folder, text_sha256=promised)})
    assert actor.step()["step"] == 5
    actor.cleanup()
    source.write_text("ijklmnop " * 400)
    _load.cache_clear()
    actor.reset_config({"trial": run_request("trial", config, folder, text_sha256=promised)})
    assert actor.step()["done"]
    outcome = json.loads((folder / "outcome.json").read_text())
    found = load_corpus(config.data).text_sha256
    assert outcome["kind"] == "bug" and found != promised
    assert f"sha256 {found} here, {promised} in the sweep" in outcome["message"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5, "nothing is recorded under a wrong id"
