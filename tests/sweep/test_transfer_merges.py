"""Exports and imports where both sides know something: what goes further stands, and nothing of it is lost."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from altgrad.analysis import load
from altgrad.sweep.record.layout import shards
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.record.shards import alone
from altgrad.sweep.record.transfer import export_sweep, import_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import TrialFolder, read_outcome, read_rows, write_json
from tests.sweep.trained import SPEC, train

ONE = SPEC.changed(formats=("BF16",), optimizers=("adamw",), seeds=1)
BUDGET = Outcome(OutcomeKind.BUDGET, 5, message="spent")


def only(out: Path) -> str:
    """The id of a sweep's only trial."""
    with Ledger.reading(out / "ledger.sqlite") as ledger:
        (name,) = ledger.trials()
    return name


def recorded_as(out: Path, outcome: Outcome) -> None:
    """The trial as one that ended so behind its first rows."""
    name = only(out)
    folder = out / "trials" / name
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    with TrialFolder(folder) as record:
        record.begin({}, after_step=outcome.step)
        record.finish(outcome)
    (out / "ledger.sqlite").unlink()
    train(out, ONE, first=0)
    with Ledger(out / "ledger.sqlite") as ledger:
        Recorder(ledger, out / "trials").ingest([name])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("done") / "sweep", ONE)


@pytest.fixture(scope="module")
def budget(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the trial as an interruption at step 5."""
    out = tmp_path_factory.mktemp("budget") / "sweep"
    shutil.copytree(done, out)
    recorded_as(out, BUDGET)
    export_sweep(out, out.with_name("export"))
    return out.with_name("export")


def test_a_result_that_only_a_file_knows_stays(done: Path, budget: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "here")
    (tmp_path / "here" / "ledger.sqlite").unlink()
    train(tmp_path / "here", ONE, first=0)
    assert import_sweep(budget, tmp_path / "here").entered == 0
    folder = tmp_path / "here" / "trials" / only(done)
    outcome = read_outcome(folder / "outcome.json")
    assert outcome is not None and outcome.kind is OutcomeKind.DONE
    assert len(read_rows(folder / "metrics.jsonl")[0]) == ONE.steps


def test_a_trial_on_its_way_goes_on_where_it_is(budget: Path, tmp_path: Path) -> None:
    here = train(tmp_path / "here", ONE, interrupted=[0])
    import_sweep(budget, here)
    train(here, ONE)
    rows, _ = read_rows(here / "trials" / only(here) / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, ONE.steps + 1))


def test_a_result_takes_the_place_of_a_trial_on_its_way(done: Path, tmp_path: Path) -> None:
    here = train(tmp_path / "here", ONE, interrupted=[0])
    export_sweep(done, tmp_path / "export")
    assert import_sweep(tmp_path / "export", here).entered == 1
    assert not (here / "trials" / only(here) / "checkpoint").exists(), "it would go on behind half a record"


def test_a_trial_that_went_further_comes_in_again(done: Path, tmp_path: Path) -> None:
    here, there, folder = tmp_path / "here", tmp_path / "there", tmp_path / "export"
    shutil.copytree(done, here)
    export_sweep(here, folder)
    import_sweep(folder, there)
    train(here, ONE.changed(steps=40))
    export_sweep(here, folder)
    found = import_sweep(folder, there)
    assert (found.entered, found.known, found.differing) == (1, 0, 0)
    assert load(there).outcomes["step"].tolist() == [40]
    assert json.loads((there / "sweep.json").read_text())["spec"]["base"]["steps"] == 40


def test_a_sweep_that_grows_grows_where_it_was_imported(done: Path, tmp_path: Path) -> None:
    here, there, folder = tmp_path / "here", tmp_path / "there", tmp_path / "export"
    shutil.copytree(done, here)
    export_sweep(here, folder)
    import_sweep(folder, there)
    train(here, ONE.changed(seeds=2))
    export_sweep(here, folder)
    import_sweep(folder, there)
    assert (here / "sweep.json").read_text() == (there / "sweep.json").read_text()
    assert len(load(there).trials) == 2


def test_what_belongs_to_the_sweep_alone_is_exported_too(done: Path, tmp_path: Path) -> None:
    here, folder = tmp_path / "here", tmp_path / "export"
    shutil.copytree(done, here)
    export_sweep(here, folder)
    write_json(here / "sweep.json", json.loads((here / "sweep.json").read_text()) | {"argv": ["--margin", ".2"]})
    assert export_sweep(here, folder).shard is not None
    with Ledger(here / "ledger.sqlite") as ledger:
        ledger._connection.execute("INSERT INTO spend VALUES (1.0, 2.0, 3.0, 4.0)")
    assert export_sweep(here, folder).shard is not None and export_sweep(here, folder).shard is None
    assert load(folder).spend["hours"].tolist() == [2.0] and len(shards(folder)) == 3


def test_a_result_is_not_replaced_by_an_interruption(done: Path, budget: Path, tmp_path: Path) -> None:
    export_sweep(done, tmp_path / "export")
    (shard,) = shards(budget)
    shutil.copytree(shard, tmp_path / "export" / shard.name.replace("0001", "0009"))
    assert load(tmp_path / "export").outcomes["kind"].tolist() == ["done"]


def test_where_the_text_lies_is_no_news(done: Path, tmp_path: Path) -> None:
    export_sweep(done, tmp_path / "export")
    import_sweep(tmp_path / "export", tmp_path / "there")
    with Ledger(tmp_path / "there" / "ledger.sqlite") as ledger:
        ((name, config),) = ledger.configs().items()
        moved = config.model_copy(update={"data": config.data.model_copy(update={"source": "/elsewhere/text"})})
        ledger.add_trials({name: moved}, "0" * 64)
    assert export_sweep(tmp_path / "there", tmp_path / "export").shard is None


def test_rarely_measured_signals_keep_their_last_value(tmp_path: Path) -> None:
    observe = SPEC.base.observe.model_copy(update={"shadow_every": 7})
    spec = ONE.changed(log_interval=1, steps=61, eval_interval=61, observe=observe)
    spec = SweepSpec.model_validate(spec.model_dump() | {"checkpoint_interval": 61})
    out = train(tmp_path / "sweep", spec)
    export_sweep(out, tmp_path / "export")
    one, other = load(out), load(tmp_path / "export")
    assert one.trials["gradient_cosine"].tolist() == other.trials["gradient_cosine"].tolist()
    for signal in ("gradient_cosine", "effective_rank"):
        assert one.rows[signal].dropna().tolist() == other.rows[signal].dropna().tolist(), "few: all of them"
    assert other.rows["flip_yield"].count() == 24 < one.rows["flip_yield"].count()


def test_an_unfinished_population_starts_anew(tmp_path: Path) -> None:
    """Its members' checkpoints are not exported, and what they took over counts nowhere without them."""
    spec = SPEC.changed(formats=("BF16",), optimizers=("grid",), seeds=1)
    trials = spec.trials("0" * 64)
    config = next(iter(trials.values()))
    here = tmp_path / "here"
    with Ledger(here / "ledger.sqlite") as ledger:
        ledger.add_trials(dict.fromkeys(("aaa-0", "aaa-1", "bbb-0", "bbb-1"), config), "0" * 64)
        for name in ("aaa-0", "bbb-0", "bbb-1"):
            ledger.record_outcome(name, Outcome(OutcomeKind.DONE, 20, val_loss=2.0))
        ledger.add_mutations([("aaa-1", 10, "lr", 1.0, 2.0, "aaa-0"), ("bbb-1", 10, "lr", 1.0, 2.0, "bbb-0")])
    export_sweep(here, tmp_path / "export")
    import_sweep(tmp_path / "export", tmp_path / "there")
    with Ledger.reading(tmp_path / "there" / "ledger.sqlite") as ledger:
        assert set(ledger.outcomes()) == {"bbb-0", "bbb-1"} and set(ledger.trials()) == {
            "aaa-0",
            "aaa-1",
            *ledger.outcomes(),
        }
        assert [row[0] for row in ledger.mutations(["aaa-1", "bbb-1"])[0]] == ["bbb-1"]


def test_a_second_export_waits_for_the_first(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    other = threading.Thread(target=export_sweep, args=(done, folder))
    with alone(folder):
        other.start()
        other.join(0.5)
        assert other.is_alive() and not shards(folder)
    other.join(30)
    assert len(shards(folder)) == 1 and list(folder.iterdir()) == shards(folder)
