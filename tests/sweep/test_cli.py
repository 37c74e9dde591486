"""Bad input: exit code 2, one line on stderr with flag, value, what is allowed and the nearest; nothing is
touched.
"""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.cli import _parser, main, sweep_main
from altgrad.sweep.record.folder import owned
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.presets import PRESETS
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import TrialFolder

SWEEP_FILE = Path(__file__).parents[2] / "sweeps" / "format_ablation.py"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = [
    (["--formats", "E9M9"], ["--formats", "'E9M9'"]),
    (["--formats", "E5M2,E4M"], ["--formats", "'E4M'", "E4M3"]),
    (["--seeds", "0"], ["--seeds", "'0'", "greater than or equal to 1"]),
    (["--seeds", "two"], ["--seeds", "'two'", "integer"]),
    (["--data", "missing.txt"], ["--data", "'missing.txt'", "pydoc", "nearest: missing.text"]),
    (["--rung-clip", "-1"], ["--rung-clip", "'-1'", "greater than 0"]),
    (["--rung-clip=3,nan"], ["--rung-clip", "'nan'", "finite"]),
    (["--lrs", "fast"], ["--lrs", "'fast'", "number"]),
    (["--optimizers", "admaw"], ["--optimizers", "'admaw'", "manifold, ", "nearest: adamw"]),
    (["--policies", "clasic"], ["--policies", "'clasic'", "uniform, ", "nearest: classic"]),
    (["--scheduler", "ahsa"], ["--scheduler", "'ahsa'", "'none', 'asha' or 'pbt'", "nearest: asha"]),
    (["--task", "ln"], ["--task", "'ln'", "'lm'", "nearest: lm"]),
    (["--guards", "onn"], ["--guards", "'onn'", "on, off", "nearest: on"]),
    (["--guards", "flip_yield/median < 0.2"], ["guards", "no layer 'median'", "min, max, mean, sum", "nearest: me"]),
    (["--guards", "flip_yield/lm_haed < 0.2"], ["guards", "no layer 'lm_haed'", "nearest: lm_head"]),
    (["--steps", "1.5"], ["--steps", "'1.5'", "integer"]),
    (["--preset", "quik"], ["--preset", "'quik'", "quick, standard, study", "nearest: quick"]),
    (["--max-concurrent", "0"], ["--max-concurrent", "'0'", "at least 1"]),
    (["--address", "ray://head:10001"], ["--address", "'ray://head:10001'", "HOST:PORT"]),
    (["--config", "bad.yaml"], ["bad.yaml", "formts", "['E5M2']", "optimizers", "nearest: formats"]),
    (["--config", "elsewhere.json"], ["elsewhere.json: data", "'mising.text'", "nearest: missing.text"]),
    (["--config", "absent.yaml"], ["absent.yaml", "no such file"]),
    (["--frmats", "E5M2"], ["--frmats", "--optimizers", "nearest: --formats"]),
    (["--steps"], ["--steps", "expected one argument"]),
    (["--out", "taken"], ["--out", "taken", "other things"]),
    (["--out", "missing.text"], ["--out", "missing.text is a file"]),
    (["--out", "missing.text/sub"], ["--out", "missing.text/sub", "missing.text is a file"]),
    (["--out", ""], ["--out", "''", "a path is expected"]),
    (["--max-concurrent", "²"], ["--max-concurrent", "'²'", "at least 1"]),
    (["--preset", ""], ["--preset", "''", "quick, standard, study"]),
    (["--data", ""], ["--data", "''", "'pydoc'"]),
    (["--data", "missing.text"], ["--data", "missing.text", "too few for a block of 128"]),
    (["--formats", ""], ["--formats", "''", "FP32, E0M7"]),
    (["--lrs", ""], ["--lrs", "''", "numbers above 0"]),
    (["--scheduler", "asha", "--steps", "20"], ["scheduler='asha'", "steps=20", "first_rung"]),
    (["--keep-checkpoints", "lst"], ["--keep-checkpoints", "'lst' is no choice", "all, last, none", "nearest: last"]),
    (
        ["--keep-checkpoints", "none", "--scheduler", "pbt", "--lrs", "1e-3,3e-3"],
        ["--keep-checkpoints", "members take over each other's", "all or last is expected"],
    ),
    (["--first-seed", "-1"], ["--first-seed", "greater than or equal to 0"]),
    (["--workers-per-trial", "512", "--config", "batch.json"], ["--workers-per-trial", "512", "this machine has"]),
    (["--gpus-per-trial", "512"], ["--gpus-per-trial", "512 GPUs", "this machine has"]),
    (["--search", "gird"], ["--search", "'gird'", "'grid', 'random' or 'optuna'", "nearest: grid"]),
    (["--num-samples", "3"], ["num_samples=3", "random"]),
    (["--search", "optuna", "--num-samples", "0"], ["--num-samples", "'0'", "greater than or equal to 1"]),
    (["--scheduler", "hyperband"], ["--scheduler", "'hyperband' is not offered", "nearest: asha"]),
    (["--address", "127.0.0.1:9"], ["--address", "'127.0.0.1:9'", "no Ray cluster answers"]),
]


@pytest.mark.parametrize(("flags", "expected"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
@pytest.mark.parametrize("entry", ["command", "sweep file"])
def test_bad_input_is_one_clear_line_and_touches_nothing(
    flags: list[str], expected: list[str], entry: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "missing.text").write_text("a text")
    (elsewhere / "bad.yaml").write_text("formts: [E5M2]")
    (elsewhere / "elsewhere.json").write_text('{"data": {"source": "mising.text"}}')
    (elsewhere / "batch.json").write_text('{"data": {"batch": 512}}')
    (elsewhere / "taken").mkdir()
    (elsewhere / "taken" / "thesis.tex").write_text("precious")
    before = sorted(elsewhere.rglob("*"))
    code = main(["run", *flags]) if entry == "command" else sweep_main(SweepSpec(), flags)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    for part in expected:
        assert part in captured.err
    assert sorted(elsewhere.rglob("*")) == before


def test_auto_without_a_cluster_leaves_no_folder(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray.init", nobody)
    assert main(["run", "--address", "auto"]) == 2
    assert "--address: 'auto': no Ray cluster answers" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("flags", [["--out", "taken"], ["--out", "afile/sub"]])
def test_a_plan_finds_what_a_run_would(flags: list[str], elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "afile").touch()
    (elsewhere / "taken").mkdir()
    (elsewhere / "taken" / "thesis.tex").touch()
    assert main(["plan", *flags]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_plan_says_which_text_is_left_aside(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], unmeasured: None
) -> None:
    for name in ("train", "test"):
        (elsewhere / f"{name}.txt").write_text("words " * 1000)
    assert main(["plan", "--data", "."]) == 0
    assert capsys.readouterr().out.count("data: test text is not read: test.txt\n") == 1


@pytest.mark.parametrize("content", ["", "garbage " * 100])
@pytest.mark.parametrize("command", ["status", "why", "report"])
def test_a_ledger_that_is_none_is_one_clear_line(
    command: str, content: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "ledger.sqlite").write_text(content)
    assert main([command, str(elsewhere)]) == 2
    captured = capsys.readouterr()
    assert "ledger.sqlite is" in captured.err and captured.err.count("\n") == 1
    assert (elsewhere / "ledger.sqlite").read_text() == content


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "altgrad", "formats"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_bad_input_loads_no_ray() -> None:
    code = (
        "import sys; from altgrad.cli import main; rc = main(['run', '--seeds', '0']); print(rc, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_an_unreadable_folder_is_found_beforehand(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (elsewhere / "closed").mkdir(mode=0o555)
    assert main(["run", "--out", "closed/sweep"]) == 2
    assert "no permission on" in capsys.readouterr().err


def test_planning_runs_nothing(elsewhere: Path, capsys: pytest.CaptureFixture[str], unmeasured: None) -> None:
    assert main(["plan", "--formats", "FP32,E5M2", "--optimizers", "adamw,grid", "--rung-clip", "1,3"]) == 0
    text = capsys.readouterr().out
    assert "10 trials of 100 steps in 4 cells, 2 seeds" in text
    assert "left out: 4 trials by fp32_is_the_reference" in text
    assert list(elsewhere.iterdir()) == []


def test_the_sweep_file_is_the_quick_preset_and_has_no_side_effects(elsewhere: Path) -> None:
    names = runpy.run_path(str(SWEEP_FILE))
    assert names["SWEEP"] == PRESETS["quick"]
    assert list(elsewhere.iterdir()) == []


def test_a_preset_replaces_the_sweep_files_value(capsys: pytest.CaptureFixture[str], unmeasured: None) -> None:
    assert sweep_main(SweepSpec(formats=("E5M2",)), ["--plan", "--preset", "standard", "--seeds", "1"]) == 0
    assert f"trials of {PRESETS['standard'].steps} steps" in capsys.readouterr().out


def test_two_files_at_once_are_refused(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "a.yaml", "--config", "b.yaml"]) == 2
    assert "one file, please" in capsys.readouterr().err


@pytest.fixture
def sweep(elsewhere: Path) -> Path:
    """A ledger with a finished, a stopped and two unfinished trials."""
    out = elsewhere / "runs" / "mine"
    trials = SweepSpec(formats=("E5M2",), optimizers=("grid",)).trials("a" * 64)
    done, stopped, started, _ = trials
    with Ledger(out / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, "a" * 64)
        ledger.record_rows(started, [{"step": 1, "train_loss": 2.0}])
        ledger.record_outcome(done, Outcome(kind=OutcomeKind.DONE, step=100))
        ledger.record_outcome(
            stopped,
            Outcome(
                kind=OutcomeKind.STALLED,
                step=40,
                signal="flip_yield",
                layer="lm_head",
                value=0.1,
                limit=0.2,
                message="too few flips",
            ),
        )
    return out


def test_status_counts(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(sweep)]) == 0
    text = capsys.readouterr().out
    assert "2 of 4 trials ended, 1 steps recorded; no driver is running" in text
    counts = dict(line.rsplit(maxsplit=1) for line in text.splitlines()[1:])
    assert counts == {"done": "1", "stalled by flip_yield": "1", "started": "1", "waiting": "1"}


def test_why_tells_the_reason(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(sweep)]) == 0
    _header, line, begun = capsys.readouterr().out.splitlines()
    for part in ("BF16", "stalled by flip_yield", "lm_head", "40", "too few flips"):
        assert part in line
    assert "unfinished" in begun and "its driver is gone" not in begun and "has not begun; no driver" in begun
    trial_id = line.split()[0]
    assert main(["why", str(sweep), trial_id[:5]]) == 0
    assert trial_id in capsys.readouterr().out
    assert main(["why", str(sweep), "zzz"]) == 2


def test_why_tells_of_trials_that_run_and_that_were_lost(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger(sweep / "ledger.sqlite") as ledger:
        endings, lost = ledger.outcomes(), Outcome(OutcomeKind.NODE_LOST, 7, message="NoGpu: none")
        (begun, waiting) = (trial_id for trial_id in ledger.trials() if trial_id not in endings)
        ledger.record_outcome(waiting, lost)
    for trial_id in (begun, waiting):
        (sweep / "trials" / trial_id).mkdir(parents=True)
    (sweep / "trials" / waiting / "traceback.txt").write_text("Traceback")

    def said(trial_id: str) -> str:
        assert main(["why", str(sweep), trial_id]) == 0
        return capsys.readouterr().out.splitlines()[1]

    assert "its driver is gone; the same command goes on from the last checkpoint" in said(begun)
    assert f"NoGpu: none; traceback: {sweep / 'trials' / waiting / 'traceback.txt'}" in said(waiting)
    with owned(sweep):
        assert "it waits, or runs on another node" in said(begun)
        with TrialFolder(sweep / "trials" / begun):
            assert "is at work" in said(begun)


def test_a_folder_without_a_sweep_names_its_neighbour(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "why", "report"):
        assert main([command, str(sweep.parent / "mnie")]) == 2
        assert "nearest: mine" in capsys.readouterr().err
    assert not (sweep.parent / "mnie").exists()


def test_formats_and_doctor_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    assert "E5M2" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert "kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variable", "words", "address"),
    [
        (None, [], "local"),
        ("10.0.0.1:6379", [], "auto"),
        ("10.0.0.1:6379", ["--address", "local"], "local"),
        ("http://10.0.0.1:8265", [], "local"),
        ("local", [], "local"),
    ],
)
def test_in_a_ray_job_the_default_is_the_jobs_cluster(
    variable: str | None, words: list[str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    words = ["run", *words]
    assert _parser(words).parse_args(words).address == address
