"""A sweep as a job of a Ray cluster: sent with the project's files, followed to its end.

The driver then runs on the cluster's head and needs nobody who stays connected. What is sent is the folder that holds
this package, without what was built or computed in it. No environment variable goes along: a runtime environment can be
read in the dashboard, so keys are set on the head.

A job whose driver was killed can count as succeeded. So the sweep's own ledger has the last word where it can be read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altgrad

ROOT = Path(altgrad.__file__).resolve().parents[1]
EXCLUDED = (
    "/.venv/",
    "/runs/",
    "/build/",
    "/dist/",
    ".git/",
    "wandb/",
    "__pycache__/",
    "*.egg-info/",
    ".*_cache/",
    ".hypothesis/",
)
POLL_SECONDS = 1.0
START_SECONDS = 60.0
"""for a cluster that has just come up: its dashboard answers before its jobs' agent does"""


class Job:
    """A job that has been sent to the cluster whose dashboard is at `address`.

    ConnectionError where none answers there. `id` is the job's on the cluster.
    """

    def __init__(self, address: str, entrypoint: str) -> None:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.ERROR)  # it tells every file that it leaves out
        try:
            self._client = JobSubmissionClient(address)
            self.id = self._send(entrypoint)
        except RuntimeError as error:
            raise ConnectionError(str(error)) from None

    def _send(self, entrypoint: str) -> str:
        environment = {"working_dir": str(ROOT), "excludes": list(EXCLUDED)}
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return str(self._client.submit_job(entrypoint=entrypoint, runtime_env=environment))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)

    def follow(self, show: Callable[[str], None]) -> int:
        """Shows the job's log until it ends; returns its exit code, 1 for a job that ended without one.

        ConnectionError where the cluster can't be asked any more.
        """
        try:
            asyncio.run(self._tail(show))
        except (RuntimeError, OSError) as error:
            show(f"the log has broken off ({error}); waiting for the job's end\n")
        while not (status := self._ask(self._client.get_job_status)).is_terminal():
            time.sleep(POLL_SECONDS)
        info = self._ask(self._client.get_job_info)
        if str(status) == "SUCCEEDED":
            return 0
        if not info.driver_exit_code and info.message:
            show(f"the job has {str(status).lower()}: {info.message.splitlines()[0]}\n")
        return info.driver_exit_code if (info.driver_exit_code or 0) > 0 else 1

    async def _tail(self, show: Callable[[str], None]) -> None:
        async for text in self._client.tail_job_logs(self.id):
            show(text)

    def _ask(self, question: Callable[[str], Any]) -> Any:
        try:
            return question(self.id)
        except (RuntimeError, OSError) as error:
            raise ConnectionError(str(error)) from None


def sent_path(path: Path) -> Path:
    """The file as the job finds it, relative to what is sent; ValueError for one that is not sent."""
    whole = path.resolve()
    if not whole.is_relative_to(ROOT):
        raise ValueError(f"{path} is not sent: a file under {ROOT} is expected")
    return whole.relative_to(ROOT)
