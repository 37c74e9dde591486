"""The report of a sweep's W&B runs has every number that the report of its ledger has."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from altgrad.analysis.layer_signals import layers_of
from altgrad.analysis.sweeps import read_sweep
from altgrad.cli import main
from altgrad.sweep.options import RunOptions
from altgrad.sweep.record import wandb_mirror
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.ledger_schema import ROW_SIGNALS
from altgrad.sweep.record.wandb_files import Reading
from altgrad.sweep.record.wandb_names import WORDS, Signals, metric_name, metrics_of, outcome_of, summary_of
from altgrad.sweep.record.wandb_runs import OfflineRuns
from altgrad.sweep.record.wandb_sweep import sweep_from
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.catalogue import SIGNALS
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import to_plain
from tests.sweep.trained import SPEC, train
from tests.sweep.wandb_server import ENTITY, server_of

SWEEP = SweepSpec.model_validate(
    SPEC.model_dump()
    | {
        "formats": ["E7M0"],
        "optimizers": ["adamw_nearest"],
        "lrs": [2e-3, 30.0],
        "seeds": 1,
        "margin": 0.2,
        "equal_within": 0.01,
        "axes": {"schedule.kind": ["constant", "cosine"]},
        "guards": "on",
        "interventions": [{"kind": "format_shift", "rules": ["flip_yield/min < .9 for 2 after 5"]}],
    }
)
"""Trials end done, diverged and with a layer in another format, in two settings."""
COUNT = len(SWEEP.expand())
WORDS_OF_WANDB = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def mirror(out: Path) -> Path:
    """Makes the runs of the sweep's trials; returns their folder."""
    with Ledger(out / "ledger.sqlite") as ledger:
        outcomes = ledger.outcomes()
        ends = {name: outcomes.get(name) for name in ledger.trials()}
    assert wandb_mirror.rebuild(out, ends, "offline", pytest.fail)
    return out / "wandb"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with its runs, all ended but the last two trials: one is interrupted, one has not begun."""
    out = train(tmp_path_factory.mktemp("swept") / "small", SWEEP, first=COUNT - 1, interrupted=[COUNT - 2])
    mirror(out)
    return out


def rebuilt(place: Path, out: Path) -> list[str]:
    """Makes the sweep of the runs in `place`, in `out`; returns what is said of it."""
    return sweep_from(OfflineRuns(place), None, out)


def frames(out: Path) -> tuple[pd.DataFrame, pd.DataFrame, Any]:
    """The sweep's trials and rows, and what else a report takes of it."""
    sweep = read_sweep(out)
    settings = {label: list(records.trials["trial_id"]) for label, records in sweep.settings.items()}
    trials = sweep.selected.trials.drop(columns="created")
    return trials, sweep.selected.rows, (settings, sweep.margin(None), sweep.equal_within(None), sweep.axes)


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = frames(found), frames(expected)
    pd.testing.assert_frame_equal(ours[0], theirs[0], check_exact=True)
    pd.testing.assert_frame_equal(ours[1], theirs[1], check_exact=True)
    assert ours[2] == theirs[2]
    pd.testing.assert_series_equal(last_of_layers(found), last_of_layers(expected), check_exact=True)


def last_of_layers(out: Path) -> pd.Series:
    """The last value of every signal of every layer."""
    table = layers_of(out, list(frames(out)[0]["trial_id"])).to_pandas().sort_values("step")
    return table.groupby(["trial_id", "signal", "layer"])["value"].last()


def test_every_signal_comes_back_from_its_metric() -> None:
    names = dict.fromkeys((*ROW_SIGNALS, *SIGNALS))
    assert len({metric_name(name) for name in (*names, *WORDS)}) == len(names) + len(WORDS)
    values = [0.1, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 3.0]
    row: dict[str, Any] = {name: values[place % len(values)] for place, name in enumerate(names)}
    row |= {"step": 7, "formats": "lm_head: E7M0->E6M1", "shifts": ["lm_head: E7M0->E6M1"], "warnings": ["nan"]}
    row |= {"nonfinite_layer": "transformer.h.0.mlp.c_fc"}
    layers = ("lm_head", "transformer.h.0.attn.qkv", "a/b")
    metrics = metrics_of(row | {"layers": {layer: {name: row[name] for name in SIGNALS} for layer in layers}})
    metrics |= {"_step": 7, "_runtime": 1.5, "_wandb": {"runtime": 2}, "val/mine": 3}
    told = {name: WORDS_OF_WANDB.get(str(v), v) if isinstance(v, float) else v for name, v in metrics.items()}
    for said in (metrics, told, told | {"train/loss": None}):
        signals = Signals()
        found = signals.row(said)
        own = found.pop("layers")
        expected = row if said["train/loss"] is not None else {k: v for k, v in row.items() if k != "train_loss"}
        assert to_plain(found) == to_plain(expected)
        assert [*own] == [*layers] and all(to_plain(v) == to_plain({n: row[n] for n in SIGNALS}) for v in own.values())
        assert signals.unknown == {"val/mine"}


@pytest.mark.parametrize("kind", list(OutcomeKind))
def test_every_ending_comes_back_from_its_summary(kind: OutcomeKind) -> None:
    bare = Outcome(kind, 3)
    whole = Outcome(
        *(kind, 3, "flip_yield/min", "lm_head", math.inf, 1.0, 2, "nan: stopped", "lm_head: E7M0->E6M1"),
        *(math.nan, 2.0, 3.0, 4.5, "CPU", "550", "here"),
    )
    for outcome in (bare, whole, replace(whole, message="")):
        summary = summary_of(outcome, known=())
        assert to_plain(outcome_of(summary).to_dict()) == to_plain(outcome.to_dict())
        words = {name: WORDS_OF_WANDB.get(str(v), v) if isinstance(v, float) else v for name, v in summary.items()}
        assert to_plain(outcome_of(words).to_dict()) == to_plain(outcome.to_dict())
    before = summary_of(whole, known=())
    assert outcome_of(before | summary_of(bare, known=before)) == bare, "of an ending before nothing is left"
    assert outcome_of({"val/loss": 2.0}) is None


def test_a_sweep_comes_back_from_its_offline_runs(swept: Path, tmp_path: Path) -> None:
    [note] = rebuilt(swept / "wandb", tmp_path / "back")
    assert note.startswith("1 runs have not ended") and "unfinished: " in note
    assert_same(tmp_path / "back", swept)
    kinds = set(frames(swept)[0]["outcome"])
    assert {"done", "diverged", "pending"} <= kinds and frames(swept)[0]["formats"].any(), "what the sweep is here for"
    ends = frames(swept)[0].query("outcome == 'diverged'")["step"]
    assert (ends % SWEEP.base.checkpoint_interval != 0).any(), "layers are there beside checkpoints"


def test_runs_of_earlier_versions_are_read_without_their_sweep(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(swept, tmp_path / "old")
    monkeypatch.setattr(wandb_mirror, "_of_sweep", lambda *_: {})
    place = mirror(tmp_path / "old")
    notes = rebuilt(place, tmp_path / "back")
    assert any("earlier AltGrad" in note for note in notes)
    ours, theirs = (frames(out)[0].set_index("trial_id").sort_index() for out in (tmp_path / "back", swept))
    pd.testing.assert_frame_equal(ours, theirs.loc[ours.index], check_exact=True)
    assert len(ours) == COUNT - 1 and read_sweep(tmp_path / "back").margin(None) == 0.1


def test_a_run_in_several_folders_is_one(swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    shutil.copytree(swept, out)
    shutil.move(out / "wandb", tmp_path / "first")
    train(out, SWEEP)
    mirror(out)
    for folder in (tmp_path / "first").glob("offline-run-*"):
        shutil.move(folder, out / "wandb" / folder.name)
    assert len(list((out / "wandb").glob("offline-run-*"))) == 2 * COUNT - 1
    assert rebuilt(out, tmp_path / "back") == []
    assert_same(tmp_path / "back", out)


def damaged(content: bytes, place: float) -> bytes:
    at = int(len(content) * place)
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("tear", "said"),
    [
        pytest.param(lambda content: content[: len(content) // 2], "ends within a record, at byte", id="cut"),
        pytest.param(lambda content: damaged(content, 0.3), "is damaged at byte", id="damaged"),
        pytest.param(lambda content: content[:40], "ends within a record, at byte 7", id="nothing"),
        pytest.param(lambda content: b"SQLite" + content, "does not begin", id="other"),
    ],
)
def test_a_torn_file_is_named_and_what_is_whole_is_read(tear: Any, said: str, swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept / "wandb", tmp_path / "wandb")
    path = max(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_size)
    name, whole = path.stem.removeprefix("run-"), path.read_bytes()
    assert len(whole) > 1 << 15, "a record in several parts"
    path.write_bytes(tear(whole))
    notes = rebuilt(tmp_path / "wandb", tmp_path / "back")
    assert any(note.startswith(f"{path} {said}") for note in notes), notes
    rows, known = frames(tmp_path / "back")[1], frames(swept)[1]
    others = known["trial_id"] != name
    pd.testing.assert_frame_equal(
        rows[rows["trial_id"] != name].reset_index(drop=True), known[others].reset_index(drop=True), check_exact=True
    )
    own, before = rows[rows["trial_id"] == name], known[~others]
    assert len(own) < len(before) and (len(own) > 0) == ("run" in {r.WhichOneof("record_type") for r in records(path)})
    expected = before[before["step"].isin(own["step"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(own.reset_index(drop=True), expected, check_exact=True)


def records(path: Path) -> list[Any]:
    return list(Reading(path).records())


def served(swept: Path) -> list[dict[str, Any]]:
    """The sweep's runs as a server has them, and one of another program."""
    runs = OfflineRuns(swept)
    [group] = runs.groups()
    found: list[dict[str, Any]] = [vars(run) | {"job_type": "trial"} for run in runs.runs(group)]
    other = {"id": "other", "group": None, "job_type": None, "config": {"lr": 1}, "metrics": [], "summary": {}}
    return [*found, other]


@pytest.fixture(scope="module")
def projects(swept: Path) -> Mapping[str, list[dict[str, Any]]]:
    runs = served(swept)
    foreign = {"config": {"lr": 1}, "job_type": "trial", "group": "theirs", "id": "theirs"}
    return {
        "altgrad": runs,
        "several": [*runs, runs[0] | {"group": "second"}],
        "foreign": [runs[-1]],
        "posing": [runs[-1] | foreign],
    }


@pytest.fixture
def online(projects: Mapping[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server of W&B that the client takes for its own, and a folder to stand in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    with server_of(projects) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        yield


@pytest.mark.usefixtures("online")
def test_a_projects_runs_give_the_same_report(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_report(out: Path, *, to: Path, **_: Any) -> Any:
        assert (out, to) == (Path("altgrad-report/sweep"), Path("altgrad-report"))
        raise OSError("enough")

    monkeypatch.setattr("altgrad.analysis.report.write_report", write_report)
    for _ in range(2):
        assert main(["report", "--wandb", f"{ENTITY}/altgrad"]) == 2
        said = capsys.readouterr()
        assert "1 runs of other programs are left out" in said.out and "enough" in said.err
    assert_same(tmp_path / "altgrad-report" / "sweep", swept)


@pytest.mark.parametrize("is_other", [False, True], ids=["file", "folder"])
def test_what_stands_where_the_report_would_go_stays(
    is_other: bool, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    if is_other:
        (to / "sweep").mkdir(parents=True)
    else:
        to.touch()
    assert main(["report", "--wandb", str(swept), "--to", str(to)]) == 2
    error = capsys.readouterr().err
    assert ("earlier report" if is_other else "can't be written") in error and str(to) in error
    assert (to / "sweep").is_dir() if is_other else to.is_file()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(["altgrod"], ["'altgrod'", "no folder", "find project altgrod"], id="no_project"),
        pytest.param(["nobody/altgrad"], ["'nobody/altgrad'", "no folder", "find project altgrad"], id="no_entity"),
        pytest.param(["several"], ["several sweeps", "--group NAME", "tiny (7 runs)", "second (1 runs)"], id="groups"),
        pytest.param(["altgrad", "--group", "tinny"], ["--group: 'tinny'", "nearest: tiny"], id="no_group"),
        pytest.param(["foreign"], ["no runs of AltGrad", "1 of other programs"], id="foreign"),
        pytest.param(["posing"], ["no run of 'theirs'", "1 runs of other programs"], id="posing"),
        pytest.param(["runs/quick/wandb"], ["'runs/quick/wandb' is no folder", "'entity/project'"], id="no_folder"),
        pytest.param(["empty"], ["'empty' is a folder without runs", "offline-run-", "find project"], id="empty"),
        pytest.param(["./empty"], ["'./empty' is a folder without runs", "no project's name"], id="empty_path"),
        pytest.param(["file"], ["'file' is a file", "find project file"], id="file"),
        pytest.param(["altgrad", "somewhere"], ["somewhere and --wandb"], id="both"),
        pytest.param(["altgrad", "--margin", "-1"], ["--margin", "'-1'"], id="margin"),
    ],
)
def test_what_is_no_place_of_runs_is_one_line(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty" / "wandb").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert main(["report", "--wandb", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in expected), error
    assert not list(tmp_path.glob("*report*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], ["--wandb", "folder is expected"]), (["--group", "x"], ["--group", "--wandb PROJECT"])],
    ids=["nothing", "group_alone"],
)
def test_a_report_is_of_something(words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in expected), error


def test_without_credentials_a_project_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)
    assert main(["report", "--wandb", "mine/altgrad"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "WANDB_API_KEY" in error and "'mine/altgrad' is no folder here" in error


@pytest.mark.slow
def test_a_real_sweep_is_reported_from_its_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "real"
    spec = SWEEP.model_copy(update={"axes": {}, "optimizers": ("adamw_nearest",)})
    result = run_sweep(spec, RunOptions(out=out, wandb="offline"))
    assert result.left == 0
    assert main(["report", str(out)]) == 0
    shutil.move(out / "wandb", tmp_path / "wandb")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--wandb", "wandb", "--to", "back"]) == 0
    ours, theirs = tmp_path / "back", out / "report"
    assert (ours / "results.csv").read_bytes() == (theirs / "results.csv").read_bytes()
    pages = [(folder / "report.md").read_text(encoding="utf-8") for folder in (ours, theirs)]
    tables = [[line for line in page.splitlines() if line.startswith("|")] for page in pages]
    assert [line.replace("](sweep/trials/", "](../trials/") for line in tables[0]] == tables[1]
    links = re.findall(r"\]\((sweep/trials/[^)]*)\)", pages[0])
    assert links and all((ours / link).is_dir() for link in links)
    assert {path.name for path in (ours / "figures").iterdir()} == {p.name for p in (theirs / "figures").iterdir()}
