"""A sweep as a job of a Ray cluster: sent with the files that it names, followed to its end.

The driver then runs on the cluster's head and needs nobody who stays connected. What is sent is this package and what
the command names, nothing that happens to lie beside it: a project's folder also holds keys and private data, and of a
package that came as a wheel it is all of site-packages. No environment variable goes along: a runtime environment can
be read in the dashboard, so keys are set on the head.

A job whose driver was killed can count as succeeded. So the sweep's own ledger has the last word where it can be read.
"""

from __future__ import annotations

import asyncio
import glob
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altgrad

ROOT = Path(altgrad.__file__).resolve().parents[1]
NAMED = "named"
"""The folder that holds, in what is sent, files from elsewhere than the project's and the present folder."""
MOST_BYTES = 400_000_000
"""Ray takes no more than 500 MiB."""
POLL_SECONDS = 1.0
START_SECONDS = 60.0
"""for a cluster that has just come up: its dashboard answers before its jobs' agent does"""


class Parcel:
    """What is sent: the package, and the files, folders and globs that were named, each at its place there."""

    def __init__(self) -> None:
        self._places: dict[Path, Path] = {}

    def add(self, path: Path) -> Path:
        """Where the job finds the file or the folder, or what the glob matches; ValueError where there is nothing."""
        if glob.has_magic(str(path)) and not path.exists():
            marks = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
            folder = Path(*path.parts[:marks]).absolute()
            found = [Path(one).absolute() for one in glob.glob(str(path), recursive=True) if Path(one).is_file()]
            if not found:
                raise ValueError(f"{path}: no file matches")
            there = _place(folder)
            for one in found:
                self._put(one, there / one.relative_to(folder))
            return there / Path(*path.parts[marks:])
        if not path.exists():
            raise ValueError(f"{path}: no such file")
        return self._put(path, _place(path))

    def _put(self, source: Path, place: Path) -> Path:
        whole = source.resolve()
        if any(kept == place and other != whole for other, kept in self._places.items()):
            raise ValueError(f"{source}: another file of that name is sent too; give one of them another name")
        self._places[whole] = place
        return place

    def pack(self, folder: Path) -> None:
        """Copies it all into a folder. ValueError where it is more than Ray takes."""
        package = Path(altgrad.__file__).parent
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.nb[ic]"))
        for source, place in self._places.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            else:
                shutil.copyfile(source, target)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            names = ", ".join(map(str, self._places.values()))
            raise ValueError(
                f"{names}: {size / 1e6:.0f} MB are too much to send, {MOST_BYTES / 1e6:.0f} MB are allowed; put data "
                "where all nodes see them, and name them by their absolute path there"
            )


def _place(path: Path) -> Path:
    """Where a file or a folder lies in what is sent."""
    whole = path.resolve()
    root = next((root for root in (ROOT, Path.cwd().resolve()) if whole.is_relative_to(root)), None)
    return Path(NAMED, whole.name) if root is None else whole.relative_to(root)


class Job:
    """A job for the cluster whose dashboard is at `address`; ConnectionError where none answers there."""

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.ERROR)  # it tells every file that it leaves out
        self.id = ""
        """the job's on the cluster, once it is sent"""
        try:
            self._client = JobSubmissionClient(address)
        except RuntimeError as error:
            raise ConnectionError(str(error)) from None

    def send(self, entrypoint: str, parcel: Parcel) -> None:
        """Starts it. ValueError where the parcel is too large, ConnectionError where the cluster takes none."""
        deadline = time.monotonic() + START_SECONDS
        with tempfile.TemporaryDirectory(prefix="altgrad-job-") as folder:
            parcel.pack(Path(folder))
            while not self.id:
                try:
                    self.id = str(self._client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder}))
                except RuntimeError as error:
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise ConnectionError(str(error)) from None
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
