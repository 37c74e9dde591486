"""Sweeps as jobs of a Ray cluster: what is refused before anything is sent, and real jobs on a cluster of its own."""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from altgrad.cli import main
from altgrad.commands import submit
from altgrad.sweep.engine import jobs
from altgrad.sweep.record.ledger import Ledger
from altgrad.training.data import splits

ROOT = Path(__file__).parents[2]
SMALL = {
    "name": "small",
    "formats": "E5M2",
    "optimizers": "adamw",
    "seeds": 1,
    "steps": 10,
    "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
    "data": {"batch": 2, "eval_batches": 1},
    "log_interval": 5,
    "eval_interval": 5,
    "checkpoint_interval": 5,
}


class FakeJob:
    """Ends at once, with an exit code, and does on the way what `works` does."""

    id = "raysubmit_fake"
    sent: list[str]

    parcel: jobs.Parcel

    def __init__(self, address: str) -> None:
        """Every cluster answers."""

    def send(self, entrypoint: str, parcel: jobs.Parcel) -> None:
        type(self).sent, type(self).parcel = shlex.split(entrypoint), parcel

    def follow(self, show: object) -> int:
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeJob]:
    monkeypatch.setattr(submit, "Job", FakeJob)
    monkeypatch.setattr(FakeJob, "sent", [], raising=False)
    return FakeJob


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--formats", "E5M"], ["--formats", "nearest: E5M2"]),
        (["--steps", "0"], ["--steps", "'0'"]),
        (["--address", "head:6379"], ["--address", "'head:6379'", "http://HOST:PORT"]),
        (["--data", "missing.txt"], ["--data", "missing.txt"]),
        (["--wandb", "onlin"], ["--wandb", "nearest: online"]),
        (["--frmats", "E5M2"], ["--frmats", "nearest: --formats"]),
        ([], ["--out: missing", "on the cluster"]),
        (["--config", "empty.yaml", "--send", "absent", "--out", "o"], ["absent: no such file"]),
        (["empty.py"], ["empty.py holds 0 sweeps"]),
        (["absent.py"], ["absent.py", "No such file"]),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_sent(
    flags: list[str],
    expected: list[str],
    tmp_path: Path,
    fake: type[FakeJob],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("steps: 10")
    (tmp_path / "empty.py").touch()
    assert main(["submit", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and all(part in captured.err for part in expected), captured.err
    assert captured.out == "" and fake.sent == []


def test_a_dashboard_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--address", "http://127.0.0.1:9", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--address: 'http://127.0.0.1:9': no Ray dashboard answers" in error


def test_the_job_gets_the_same_flags_with_paths_as_it_finds_them(
    tmp_path: Path, fake: type[FakeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT / "sweeps")
    flags = ["--formats", "E5M2,E4M3", "--steps=30", "--guards", "flip_yield/min < 0.2 for 3", "--fresh"]
    rest = ["--formats=E5M2,E4M3", "--steps=30", "--guards=flip_yield/min < 0.2 for 3", "--fresh", "--address=auto"]
    for file, start in (
        (["configs/e5m2_fp8.yaml"], ["python", "-m", "altgrad", "run", "sweeps/configs/e5m2_fp8.yaml"]),
        (["format_ablation.py"], ["python", "sweeps/format_ablation.py"]),
        ([], ["python", "-m", "altgrad", "run"]),
    ):
        assert main(["submit", *file, *flags, "--out", str(tmp_path / "o")]) == 0
        assert fake.sent[: len(start)] == start
        assert sorted(fake.sent[len(start) :]) == sorted([*rest, f"--out={tmp_path / 'o'}"])


def test_what_is_named_is_sent_and_nothing_beside_it(
    tmp_path: Path, fake: type[FakeJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for folder in (work / "data" / ".git", work / "data/deep/er", elsewhere / "one", elsewhere / "two"):
        folder.mkdir(parents=True)
    for name in (".env", "id_rsa", "data/private.bin", "data/.git/config", "other.txt"):
        (work / name).write_text("secret")
    for path in (work / "data/a.txt", work / "data/b.txt", elsewhere / "one/x.txt", elsewhere / "two/x.txt"):
        path.write_text("a text to train on " * 500)
    shutil.copy(work / "data/a.txt", work / "data/deep/er/c.txt")
    (work / "mine.py").write_text("from altgrad.sweep import SweepSpec\nimport helper\nSWEEP = SweepSpec(steps=10)")
    (work / "helper.py").touch()
    (elsewhere / "sweep.yaml").write_text("steps: 10\ndata: {source: data/*.txt}")
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(work)
    for number, (flags, named) in enumerate(
        (
            (["mine.py", "--send", "helper.py"], {"mine.py", "helper.py"}),
            ([str(elsewhere / "sweep.yaml")], {"named/sweep.yaml", "data/a.txt", "data/b.txt"}),
            (["--data", "data/a.txt", "--steps", "10"], {"data/a.txt"}),
            (["--data", "dat?/**/*.txt"], {"data/a.txt", "data/b.txt", "data/deep/er/c.txt"}),
            (["--data", "../elsewhere/*/x.txt"], {"named/elsewhere/one/x.txt", "named/elsewhere/two/x.txt"}),
        )
    ):
        assert main(["submit", *flags, "--out", "/shared/o"]) == 0
        packed = tmp_path / f"packed-{number}"
        fake.parcel.pack(packed)
        found = {str(path.relative_to(packed)) for path in packed.rglob("*") if path.is_file()}
        assert {name for name in found if not name.startswith("altgrad/")} == named
        assert "altgrad/analysis/templates/report.html.jinja" in found and not any("__pycache__" in n for n in found)
        data = next((word.removeprefix("--data=") for word in fake.sent if word.startswith("--data=")), None)
        if data is not None:
            monkeypatch.chdir(packed)
            assert {str(path) for path in splits._files(data, splits._root(data), "")[0]} == named - {
                "named/sweep.yaml"
            }
            monkeypatch.chdir(work)
    assert fake.sent[-1] == "--address=auto" and "--out=/shared/o" in fake.sent


def test_plain_ray_job_submit_sends_the_code_only(tmp_path: Path) -> None:
    from ray._private.runtime_env import packaging

    code = ("altgrad/__init__.py", "altgrad/sub/m.py", "cluster/env.sh", "sweeps/a.py", "pyproject.toml", "README.md")
    private = (
        ".env",
        "id_rsa",
        "data/x.bin",
        "altgrad/.env",
        "altgrad/sub/k.pem",
        "cluster/secrets.env",
        "sweeps/.env",
    )
    for name in (*code, *private):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).touch()
    shutil.copy(ROOT / ".rayignore", tmp_path / "p")
    packaging._zip_files(str(tmp_path / "p"), [], str(tmp_path / "sent.zip"), include_gitignore=True)
    assert set(zipfile.ZipFile(tmp_path / "sent.zip").namelist()) == set(code)


def test_more_than_ray_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.txt").write_text("x" * 1000)
    monkeypatch.setattr(jobs, "MOST_BYTES", 500)
    parcel = jobs.Parcel()
    parcel.add(tmp_path / "large.txt")
    with pytest.raises(ValueError, match=r"named/large.txt: .* MB are too much to send"):
        parcel.pack(tmp_path / "packed")


def test_a_job_that_counts_as_succeeded_is_not_believed_against_the_ledger(
    tmp_path: Path, fake: type[FakeJob], capsys: pytest.CaptureFixture[str]
) -> None:
    from altgrad.sweep.space.spec import SweepSpec

    trials = SweepSpec.model_validate(SMALL).trials("d" * 64)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, "d" * 64)
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": list(trials)}))
    assert main(["submit", "--out", str(tmp_path)]) == 1
    assert f"lacks {len(trials)} trials" in capsys.readouterr().err


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A Ray of this test's own; yields where its dashboard is."""
    import ray
    from ray.cluster_utils import Cluster

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        # Jobs go through the node's agent, whose usual port another Ray on this machine may have.
        port = found.getsockname()[1]
    started = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": 200_000_000,
            "include_dashboard": True,
            "dashboard_port": 0,
            "dashboard_agent_listen_port": port,
        },
    )
    try:
        yield f"http://{started.head_node.webui_url}"
    finally:
        ray.shutdown()
        started.shutdown()


@pytest.mark.slow
def test_sweeps_run_as_jobs_and_their_exit_codes_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    config = ROOT / "sweeps" / "submitted.json"
    try:
        config.write_text(json.dumps(SMALL))
        with cluster() as address:
            out = tmp_path / "job"
            assert main(["submit", str(config), "--address", address, "--out", str(out)]) == 0
            shown = capfd.readouterr().out
            assert "2 trials: 2 done" in shown and f"report: {out}/report/report.html" in shown
            with Ledger(out / "ledger.sqlite") as ledger:
                assert set(ledger.row_counts().values()) == {10}

            (tmp_path / "taken").mkdir()
            (tmp_path / "taken" / "thesis.tex").touch()
            refused = ["submit", str(config), "--address", address, "--out", str(tmp_path / "taken")]
            assert main(refused) == 2
            assert "holds other things" in capfd.readouterr().out

            plain = [
                str(Path(sys.executable).with_name("ray")),
                "job",
                "submit",
                "--address",
                address,
                "--working-dir",
                ".",
                "--",
                "python",
                "sweeps/format_ablation.py",
                f"--config=sweeps/{config.name}",
                "--address",
                "auto",
                "--out",
                str(tmp_path / "plain"),
            ]
            done = subprocess.run(plain, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0 and "2 trials: 2 done" in done.stdout, done.stdout + done.stderr
    finally:
        config.unlink()
