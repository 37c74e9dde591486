"""The user's machine: `ray` and `altgrad` commands with a home, a temp folder and keys of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from fake_runpod import FakeRunPod, until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.prefix) / "bin"


class Laptop:
    """Commands end by themselves after `timeout` seconds, so that no test can hang."""

    def __init__(self, folder: Path, account: FakeRunPod, *, key: str | None = None) -> None:
        self.folder = folder
        self.home = folder / "home"
        (folder / "tmp").mkdir(parents=True)
        self.home.mkdir()
        self.environment = {
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'cluster'}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "LANG": "C.UTF-8",
            "RUNPOD_API_KEY": key or account.key,
            "RUNPOD_API_BASE": account.url,
        }
        self.seconds: dict[str, float] = {}

    def file(self, name: str = "runpod.yaml", **provider: object) -> Path:
        """The cluster's YAML; with changes of the provider's section, a copy."""
        original = ROOT / "cluster" / name
        if not provider:
            return original
        config = yaml.safe_load(original.read_text())
        for key, value in provider.items():
            section = config["provider"] if key not in config else config
            section[key] = value
        changed = self.folder / f"{config['cluster_name']}-{len(list(self.folder.glob('*.yaml')))}.yaml"
        changed.write_text(yaml.safe_dump(config, sort_keys=False))
        return changed

    def run(
        self, *words: str | Path, timeout: float = 180, check: bool = True, typed: str = "", **environment: str
    ) -> str:
        """Output and errors together; `typed` is what is typed into it."""
        started = time.monotonic()
        done = subprocess.run(
            ["timeout", "-k", "5", str(timeout), *map(str, words)],
            cwd=ROOT,
            text=True,
            env={**self.environment, **environment},
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.seconds[" ".join(map(str, words[:2]))] = time.monotonic() - started
        said = f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout[-6000:]}"
        assert not check or done.returncode == 0, said
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout)

    def on_head(self, file: Path, command: str, timeout: float = 120, check: bool = True) -> str:
        return self.run("ray", "exec", file, command, timeout=timeout, check=check)

    @contextlib.contextmanager
    def tunnel(self, file: Path) -> Iterator[str]:
        """`ray dashboard`: the address at which the head's dashboard answers here."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen(
            ["ray", "dashboard", str(file), "--port", str(port)],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until(lambda: _is_open(port), 60, "the tunnel is open")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def ledger(out: Path) -> dict[str, object]:
    """What a finished sweep's ledger holds: endings, and the steps of each trial in files and rows."""
    import json
    import sqlite3

    with contextlib.closing(sqlite3.connect(f"file:{out / 'ledger.sqlite'}?mode=ro", uri=True)) as found:
        endings = [kind for (kind,) in found.execute("SELECT kind FROM outcomes")]
        rows = dict(found.execute("SELECT trial_id, count(*) FROM rows GROUP BY trial_id"))
    steps = {
        path.parent.name: [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in out.glob("trials/*/metrics.jsonl")
    }
    return {"endings": endings, "rows": rows, "steps": steps}
