"""The environment variables of a run, before Ray starts.

What would end in Ray as a hang, a crash without a word or a traceback is here one line that names the variable, its
value and what is allowed. What can't be foreseen (Ray reads hundreds of RAY_ variables) is at least named when Ray does
not start.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from altgrad import search_path
from altgrad.sweep.complaints import SpecError

RAY_ENVIRONMENT = {
    "PYDANTIC_ERRORS_INCLUDE_URL": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "30",
}
"""Ray reads these at import: no telemetry, no chatter, no second record; how many trials wait for an actor is for our
queue to say. The first keeps an address out of the messages that a trial leaves. A user's own values win."""
SOCKET_BYTES = 107
"""The longest path of a Unix socket."""
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/dash_MetricsHead"
"""The longest that Ray puts below its scratch folder."""
NEEDED = ("torch", "numpy", "numba", "llvmlite", "ray", "pydantic", "pandas", "pyarrow", "psutil", "yaml", "grpc")
"""What workers import."""
RAYS_OWN = re.compile(r"RAY_[a-z]\w*")
"""Settings of Ray's C++ side, which has lower case where its Python side has capitals."""
PLAIN_VALUE = re.compile(r"[0-9]{1,9}|true|false")
CRASH_SECONDS = 60
_given: set[str] = set()
"""Ray's variables that were set before Ray itself sets some."""


def set_ray_environment() -> None:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Keeps the current folder off the path of the Python processes that are started meanwhile, and of theirs."""
    if "PYTHONSAFEPATH" in os.environ:
        yield
        return
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]


def check_environment(address: str) -> None:
    """SpecError, naming the variable, where Ray or the workers can't live with it."""
    from altgrad.quantization.kernels.dispatch import check_kernels

    try:
        check_kernels()
    except (ValueError, ModuleNotFoundError) as error:
        raise SpecError(str(error)) from None
    _given.update(name for name in os.environ if name.startswith(("RAY_", "TUNE_")) and name not in RAY_ENVIRONMENT)
    _check_python()
    _check_numbers()
    _check_rays_own()
    if address == "local":
        _check_scratch()
        _check_token()


@contextlib.contextmanager
def blamed() -> Iterator[None]:
    """Names Ray's variables with an error of Ray's start, where some are set."""
    try:
        yield
    except Exception as error:
        own = [f"{name}={os.environ[name]}" for name in sorted(_given & set(os.environ))]
        if isinstance(error, ConnectionError | SpecError) or not own:
            raise
        said = " ".join(str(error).split())[:200]
        raise SpecError(
            f"Ray does not start ({type(error).__name__}: {said}); set in the environment: {', '.join(own)}"
        ) from error


def _check_python() -> None:
    for part in os.environ.get("PYTHONWARNINGS", "").split(","):
        action = part.partition(":")[0].strip()
        if action and "error".startswith(action):
            raise SpecError(
                f"PYTHONWARNINGS: {part!r} is not allowed: Ray's processes give warnings themselves, and would end of "
                "them; python -W error is for one process alone"
            )
    if (line := search_path.hidden_installation(NEEDED)) is not None:
        raise SpecError(line)
    if sys.flags.optimize > 1:
        raise SpecError("PYTHONOPTIMIZE: 2 (or -OO) is not allowed: Ray needs its docstrings; 1 is allowed")


def _check_numbers() -> None:
    for name, default in RAY_ENVIRONMENT.items():
        value = os.environ.get(name, default)
        if name.startswith(("RAY_", "TUNE_")) and not re.fullmatch(r"[0-9]{1,9}", value):
            raise SpecError(f"{name}: {value!r} is not allowed: a whole number is expected, like {default}")


def _check_rays_own() -> None:
    """Ray ends the process that imports it, without a word, at a value that it can't read: so another one tries."""
    own = {name: value for name, value in os.environ.items() if RAYS_OWN.fullmatch(name)}
    if all(PLAIN_VALUE.fullmatch(value) for value in own.values()):
        return
    words = [sys.executable, "-P", "-c", "import ray._raylet"]
    try:
        done = subprocess.run(words, capture_output=True, timeout=CRASH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return
    if done.returncode < 0:
        said = ", ".join(f"{name}={value}" for name, value in own.items() if not PLAIN_VALUE.fullmatch(value))
        raise SpecError(f"{said}: Ray can't read this value; mostly a number, true or false is expected")


def _check_scratch() -> None:
    """Ray's scratch folder: where it is, as Ray itself decides it; whether sockets and files can be made there."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    place = "/tmp" if name is None else os.environ[name]
    if not os.path.isabs(place):  # noqa: PTH117
        raise SpecError(f"{name}: {place!r} is not allowed: the absolute path of a folder is expected")
    most = SOCKET_BYTES - len(SOCKET.format(pid=os.getpid()))
    if len(os.fsencode(place.rstrip("/"))) > most:
        raise SpecError(
            f"{name}: {place!r} is too long: Ray makes Unix sockets below it, whose paths have {SOCKET_BYTES} bytes at "
            f"most, so {most} are allowed; RAY_TMPDIR names a place for Ray alone"
        )
    scratch = Path(place, "ray")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch):
            pass
    except OSError as error:
        where = f"{name}: {place!r}" if name else place
        raise SpecError(
            f"{where}: Ray's scratch folder {scratch} can't be written ({error.strerror}); RAY_TMPDIR names another "
            "place"
        ) from None


def _check_token() -> None:
    """Whether Ray finds the token of its cluster, or can leave one where it looks for it."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    if (named := os.environ.get("RAY_AUTH_TOKEN_PATH")) is not None:
        if not os.access(named, os.R_OK) or not Path(named).is_file():
            raise SpecError(f"RAY_AUTH_TOKEN_PATH: {named!r} is not allowed: the file of a token is expected")
        return
    home = os.environ.get("HOME", "")
    try:
        place = Path.home() / ".ray" / "auth_token"
        if place.is_file():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except (OSError, RuntimeError) as error:
        raise SpecError(
            f"HOME: {home!r}: Ray keeps its cluster's token in ~/.ray/auth_token, which can't be written "
            f"({getattr(error, 'strerror', None) or error}); RAY_AUTH_TOKEN_PATH names the file of a token, and "
            "RAY_AUTH_MODE=disabled goes without"
        ) from None
