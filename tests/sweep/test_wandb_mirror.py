"""W&B shows what the trials' records hold, and nothing that W&B does reaches the sweep."""

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from altgrad.cli import main
from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.wandb_mirror import Mirror, mode_of
from altgrad.sweep.record.wandb_names import metric_name
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import TrialFolder, flat, write_json

SHA = "d" * 64
CONFIG = TrainConfig(format="E5M2", seed=3, log_interval=3, eval_interval=3, checkpoint_interval=6)
DONE = Outcome(OutcomeKind.DONE, 6, val_loss=2.5)


def train(out: Path, first: int, last: int, *, after: int = 0) -> None:
    """One attempt at the trial "t", which resumes behind `after` and trains the steps first to last."""
    rows = [{"step": step, "train_loss": 10.0 - step, "grad_norm_z": math.nan} for step in range(first, last + 1)]
    for row in rows:
        if row["step"] % 3 == 0:
            row |= {
                "val_loss": {3: 2.0, 6: 2.5}.get(int(row["step"]), 3.0),
                "stall_ratio": 0.25,
                "layers": {"lm_head": {"flip_yield": 1.5}},
            }
    with TrialFolder(out / "trials" / "t") as folder:
        folder.begin({"config": CONFIG.model_dump(mode="json"), "data_sha256": SHA}, after_step=after)
        folder.append(rows)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a sweep with the trial "t", six steps of which are recorded."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials({"t": CONFIG, "waiting": CONFIG}, SHA)
        ledger.record_outcome("t", DONE)
    write_json(tmp_path / "sweep.json", {"spec": {"name": "small"}, "git": {"sha": "c0ffee", "dirty": False}})
    train(tmp_path, 1, 6)
    return tmp_path


class FakeRun:
    """Keeps what it is told, or does to every call what `trouble` does."""

    def __init__(self, step: int = 0, trouble: Any = None) -> None:
        self.step, self._trouble = step, trouble
        self.logged: list[int] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self._trouble is not None:
            self._trouble()
        self.logged.append(step)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def fake(monkeypatch: pytest.MonkeyPatch, run: FakeRun) -> dict[str, Any]:
    """Puts a W&B of that one run in the real one's place; returns what it will be begun with."""
    begun: dict[str, Any] = {}

    def init(**how: Any) -> FakeRun:
        begun.update(how)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    return begun


def test_an_offline_run_holds_every_row_the_configuration_and_the_ending(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["wandb-sync", str(out), "--mode", "offline"]) == 0
        assert "1 runs in" in capsys.readouterr().out
        [folder] = (out / "wandb").glob("offline-run-*-t")
    tool = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)]
    text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in text.splitlines()]
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["run_id"], run["run_group"], run["job_type"]) == ("t", "small", "trial")
    expected = flat(CONFIG.model_dump(mode="json")) | {"data.sha256": SHA, "git.sha": "c0ffee"}
    config = run["config"]["update"]
    assert {name: config[name] for name in expected} == expected and config["seed"] == 3
    rows = [record["history"] for record in records if record["type"] == "history"]
    rows = [row.get("item", row) for row in rows]
    assert [row["trainer/step"] for row in rows] == [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in rows] == [9, 8, 7, 6, 5, 4]
    assert rows[5]["layers/lm_head/flip_yield"] == 1.5 and rows[2]["signals/stall_ratio"] == 0.25
    assert "layers/lm_head/flip_yield" not in rows[2], "signals of layers at checkpoints"
    done = subprocess.run([*tool[:3], "--summary", *tool[3:]], capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)["summary"]
    assert summary["outcome/kind"] == "done" and summary["val/loss"]["min"] == 2.0


def test_a_trial_that_starts_again_is_logged_once_and_what_is_online_is_not_sent_again(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(step=3)
    begun = fake(monkeypatch, run)
    mirror = Mirror(out, "online", pytest.fail)
    mirror.follow("t")
    while run.logged != [3, 4, 5, 6]:
        time.sleep(0.01)
    train(out, 4, 8, after=3)
    mirror.end("t", DONE)
    mirror.end("waiting", None)
    mirror.close()
    assert run.logged == [3, 4, 5, 6, 7, 8] and (run.exit_code, run.summary["outcome/kind"]) == (0, "done")
    assert (begun["id"], begun["mode"], begun["resume"]) == ("t", "online", "allow")


def test_an_interrupted_trial_is_no_finished_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    fake(monkeypatch, run)
    mirror = Mirror(out, "offline", pytest.fail)
    mirror.follow("t")
    mirror.close()
    assert (len(run.logged), run.exit_code, run.summary) == (6, 1, {})


def test_a_member_of_a_population_says_what_it_took_over(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(out / "sweep.json", {"spec": {"name": "small", "scheduler": "pbt"}, "argv": ["a"], "trials": ["x", "t"]})
    with Ledger(out / "ledger.sqlite") as ledger:
        ledger.add_mutations([("t", 4, "lr", 1e-3, 2e-3, "waiting"), ("waiting", 4, "lr", 2e-3, 1e-3, "t")])
    run = FakeRun()
    begun = fake(monkeypatch, run)
    mirror = Mirror(out, "offline", pytest.fail)
    mirror.end("t", DONE)
    mirror.close()
    assert json.loads(run.summary["sweep/mutations"]) == [[4, "lr", 1e-3, 2e-3, "waiting", 1]]
    assert json.loads(begun["config"]["sweep.manifest"]) == {"spec": {"name": "small", "scheduler": "pbt"}}
    assert begun["config"]["sweep.place"] == 1


def refuse() -> None:
    raise OSError("no\nroute")


def hang() -> None:
    threading.Event().wait()


TROUBLES = pytest.mark.parametrize(("trouble", "said"), [(refuse, "OSError: no route"), (hang, "not done 1 s after")])


@TROUBLES
def test_a_broken_mirror_says_so_once_and_lets_go(
    trouble: Any, said: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mirror, "patience", 1.0)
    fake(monkeypatch, FakeRun(trouble=trouble))
    notes: list[str] = []
    mirror = Mirror(out, "offline", notes.append)
    for _ in range(3):
        mirror.follow("t")
    mirror.end("t", DONE)
    mirror.close()
    assert mirror.is_broken and len(notes) == 1 and said in notes[0]


@pytest.mark.slow
@TROUBLES
def test_a_sweep_does_not_notice_a_broken_mirror(
    trouble: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Mirror, "patience", 1.0)
    fake(monkeypatch, FakeRun(trouble=trouble))
    spec = SweepSpec.model_validate(
        {
            "name": "tiny",
            "formats": "FP32",
            "optimizers": "adamw",
            "seeds": 2,
            "steps": 10,
            "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
            "data": {"batch": 2, "eval_batches": 1},
            "log_interval": 5,
            "eval_interval": 5,
            "checkpoint_interval": 5,
        }
    )
    result = run_sweep(spec, RunOptions(out=tmp_path / "tiny", wandb="offline"))
    assert set(result.endings) == {"done"} and result.left == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B")]
    assert len(notes) == 1 and said in notes[0] and "altgrad wandb-sync" in notes[0]


def test_a_rebuild_that_fails_keeps_the_earlier_run(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, FakeRun(trouble=refuse))
    earlier = out / "wandb" / "offline-run-20260101_000000-t"
    earlier.mkdir(parents=True)
    assert main(["wandb-sync", str(out), "--mode", "offline"]) == 1
    assert earlier.exists() and "no route" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "off"),
    ],
)
def test_the_mode_that_nobody_asked_for(
    environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mode_of(None) == mode and mode_of("off") == "off"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["run", "--wandb", "ofline"], ["--wandb", "'ofline'", "off, offline, online", "nearest: offline"]),
        (["run", "--wandb", "online"], ["--wandb", "'online'", "WANDB_API_KEY"]),
        (["wandb-sync", ".", "--mode", "onlin"], ["--mode", "'onlin'", "nearest: online"]),
        (["wandb-sync", "."], ["--mode", "'disabled'", "offline or online"]),
        (["wandb-sync", "nothing", "--mode", "offline"], ["nothing", "no sweep"]),
    ],
)
def test_bad_modes_are_one_line(
    command: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda prompt: prompt))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in expected), error
    assert list(tmp_path.iterdir()) == []


def test_names_say_what_was_measured_on_what() -> None:
    names = ("train_loss", "lr", "grad_norm", "val_loss", "val_f1_micro", "f1_micro", "bits_per_byte", "stall_ratio")
    assert [metric_name(name) for name in names] == [
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "val/loss",
        "val/f1_micro",
        "test/f1_micro",
        "val/bits_per_byte",
        "signals/stall_ratio",
    ]
