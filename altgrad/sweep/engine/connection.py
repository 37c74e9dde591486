"""This process's connection to Ray: how it begins, and that nothing of it stays when it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.job_config import JobConfig

import altgrad
from altgrad import search_path
from altgrad.sweep.engine.environment import blamed, safe_path
from altgrad.sweep.record.folder import cores
from altgrad.training.devices import gpu_count

AUTH_MODE = "RAY_AUTH_MODE"
OBJECT_STORE_BYTES = 200_000_000


class Connection:
    """At most one at a time; ending one that was not begun is harmless."""

    def __init__(self) -> None:
        self._mode = os.environ.get(AUTH_MODE)

    def connect(self, address: str) -> str | None:
        """Starts a local Ray, or connects to a running one; returns where its dashboard is."""
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            quiet |= {"num_cpus": cores(), "num_gpus": gpu_count()}
            quiet |= {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": True}
        with _sigterm_stays_the_callers(), blamed(), safe_path():
            found = ray.init(address=address, job_config=OwnPath(), **quiet).dashboard_url
        return f"http://{found}" if found else None

    def disconnect(self) -> None:
        """Disconnects, and ends what Ray was started here.

        A local Ray asks for a token and makes this process do so too, for good: a cluster without tokens could then not
        answer it, would take it for dead, and its actors would never run. What Ray chose by itself is taken back.
        """
        ray.shutdown()
        if self._mode is None and os.environ.pop(AUTH_MODE, None) is not None:
            # In this order: a thread of Ray that still ends would read the token again under the old configuration.
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()


class OwnPath(JobConfig):
    """Of Ray's driver. Its workers find this package where the driver does, and nothing else of the driver's path.

    Ray itself puts the driver's current folder, and the folder of its script, before all others on its workers' path:
    a file random.py there would end every worker.
    """

    def __init__(self) -> None:
        # A checkout that is not installed is found only from where the driver stands or was started.
        root = str(Path(altgrad.__file__).parents[1])
        super().__init__(_py_driver_sys_path=[] if search_path.is_found_by_workers() else [root])

    def _runtime_env_has_working_dir(self) -> bool:
        """What Ray asks before it adds the two folders, and asks for nothing else."""
        return True


@contextlib.contextmanager
def _sigterm_stays_the_callers() -> Iterator[None]:
    """Undoes Ray's own handler, under which SIGTERM during a sweep aborts in C++ without a word."""
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM and callable(on_term):
            on_term(signal.SIGTERM, None)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)
