"""Variables that Ray or the workers can't live with: one line that names the variable, before anything starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from smallest import SMALLEST

from altgrad.cli import main
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.engine import environment
from altgrad.sweep.engine.environment import RAY_ENVIRONMENT, blamed, check_environment
from altgrad.sweep.engine.preflight import knock
from altgrad.sweep.record.ledger import Ledger
from altgrad.training.data import corpus
from altgrad.training.outcome import OutcomeKind

LONG = "/tmp/" + "d" * 95


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TMPDIR", LONG, "too long"),
        ("RAY_TMPDIR", LONG, "too long"),
        ("TMPDIR", "/proc/nope", "can't be written"),
        ("RAY_TMPDIR", "/dev/null", "can't be written"),
        ("RAY_TMPDIR", "/dev/null/below", "can't be written"),
        ("TMPDIR", "", "absolute path"),
        ("TMPDIR", "tmp", "absolute path"),
        ("HOME", "/proc/nope", "auth_token"),
        ("HOME", "/dev/null", "auth_token"),
        ("RAY_AUTH_TOKEN_PATH", "/proc/nope", "file of a token"),
        ("RAY_AUTH_TOKEN_PATH", "", "file of a token"),
        ("PYTHONWARNINGS", "error", "not allowed"),
        ("PYTHONWARNINGS", "ignore,error::DeprecationWarning", "error::DeprecationWarning"),
        ("NUMBA_DISABLE_JIT", "1", "ALTGRAD_KERNEL=reference"),
        ("ALTGRAD_KERNEL", "garbage", "allowed: numba, triton, reference"),
        ("RAY_worker_niceness", "abc", "can't read"),
        *((name, "abc", "a whole number") for name in RAY_ENVIRONMENT if name.startswith(("RAY_", "TUNE_"))),
    ],
)
def test_a_variable_is_named(variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SpecError) as error:
        check_environment("local")
    text = str(error.value)
    assert variable in text and said in text and "\n" not in text


def test_the_interpreters_own_flag_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    with pytest.raises(SpecError, match=r"^PYTHONOPTIMIZE: 2 \(or -OO\)"):
        check_environment("local")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PYTHONWARNINGS", "ignore"),
        ("PYTHONWARNINGS", "once::DeprecationWarning"),
        ("NUMBA_DISABLE_JIT", "0"),
        ("RAY_worker_niceness", "5"),
        ("RAY_event_level", "warning"),
        ("TUNE_WARN_THRESHOLD_S", "5"),
        ("RAY_ADDRESS", "garbage"),
    ],
)
def test_what_ray_can_live_with_is_let_through(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    check_environment("local")


def test_a_cluster_has_its_own_scratch_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", LONG)
    check_environment("10.0.0.1:6379")


def test_rays_variables_are_named_with_an_error_that_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_given", {"RAY_OVERRIDE_RESOURCES"})
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", "{")
    with pytest.raises(SpecError, match=r"ValueError: Expecting.*RAY_OVERRIDE_RESOURCES=\{"), blamed():
        raise ValueError("Expecting property name\nin double quotes")
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES")
    with pytest.raises(ValueError, match=r"^own$"), blamed():
        raise ValueError("own")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster answers"),
        ("[::1]:1", "no Ray cluster answers"),
        ("nowhere.invalid:6379", "no Ray cluster answers"),
        ("http://127.0.0.1:1", "HOST:PORT"),
        ("ray://127.0.0.1:10001", "HOST:PORT"),
        ("garbage", "HOST:PORT"),
        ("127.0.0.1", "HOST:PORT"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("127.0.0.1:", "HOST:PORT"),
        ("-", "HOST:PORT"),
    ],
)
def test_a_dead_address_is_named_within_seconds(address: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    begun = time.monotonic()
    with pytest.raises(SpecError) as error:
        knock("auto")
    assert f"RAY_ADDRESS: {address!r}" in str(error.value) and said in str(error.value)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 200 OK\r\n\r\n", b"garbage" * 100], ids=["mute", "http", "noise"])
def test_what_listens_and_is_no_ray_is_named(answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altgrad.sweep.engine.preflight.REACH_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            held = []
            while True:
                try:
                    held.append(server.accept()[0])
                    if answer is not None:
                        held[-1].sendall(answer)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="does not speak Ray's protocol"):
            knock(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(SpecError, match=r"RAY_ADDRESS: .* does not speak"):
            knock("auto")


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    file = folder / "smallest.json"
    file.write_text(json.dumps(SMALLEST | {"seeds": 1, "steps": 20, "eval_interval": 10}))
    return subprocess.run(
        [sys.executable, "-m", "altgrad", "run", str(file), "--out", str(folder / "out"), *words],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | variables,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("variable", ["ALTGRAD_CACHE", "XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize("place", ["/proc/nope", "/dev/null"])
def test_a_cache_that_cant_be_written_is_named(
    variable: str, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ALTGRAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # whose token is the next thing that HOME is asked for
    monkeypatch.setenv(variable, place)
    corpus._load.cache_clear()  # of tests before, in this process
    assert main(["plan", "--formats", "E5M2", "--optimizers", "adamw"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"altgrad: {variable}: {place!r}: the cache") and said.count("\n") == 1
    assert "ALTGRAD_CACHE names another place" in said


@pytest.mark.parametrize("words", [(), ("--plan",)], ids=["run", "plan"])
def test_a_command_ends_in_one_line_and_touches_nothing(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, *words, TMPDIR=LONG)
    assert done.returncode == 2 and done.stderr.startswith("altgrad: TMPDIR: '/tmp/ddd"), done
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_NUM_THREADS": "garbage", "NUMBA_NUM_THREADS": "garbage", "MKL_NUM_THREADS": "-1"}
        | {"MPLBACKEND": "garbage", "MPLCONFIGDIR": "/proc/nope", "COLUMNS": "x", "LINES": "x", "NO_COLOR": "1"}
        | {"CUDA_VISIBLE_DEVICES": "", "TZ": "garbage/zone", "HF_HOME": "/proc/nope", "NUMBA_CACHE_DIR": "/proc/nope"}
        | {"WANDB_MODE": "offline", "WANDB_DIR": "/proc/nope", "WANDB_PROJECT": "a/b%c", "PYTHONOPTIMIZE": "1"},
        {"NUMBA_DISABLE_JIT": "1", "ALTGRAD_KERNEL": "reference", "RAY_CHDIR_TO_TRIAL_DIR": "1"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_what_is_odd_and_harmless_harms_nothing(tmp_path: Path, variables: dict[str, str]) -> None:
    done = run(tmp_path, **variables)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    with Ledger.reading(tmp_path / "out" / "ledger.sqlite") as ledger:
        assert {outcome.kind for outcome in ledger.outcomes().values()} == {OutcomeKind.DONE}
