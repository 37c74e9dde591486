"""What a sweep prints about Ray's dashboard is all that it takes to see it, with a token and without."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from smallest import SMALLEST

pytestmark = pytest.mark.slow
TOKEN = "0123456789abcdef" * 4


@pytest.fixture(params=["token", "open"])
def said(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """What a sweep has printed by its first trial, while it runs on, with a token in its home folder or without any."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    if request.param == "token":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    else:
        environment["RAY_AUTH_MODE"] = "disabled"
    spec = SMALLEST | {"name": "seen", "seeds": 4, "steps": 4000}
    (tmp_path / "seen.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "altgrad", "run", str(tmp_path / "seen.yaml"), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.search(r"[1-9]\d* running", line):
                break
        yield "".join(lines)
        process.terminate()
        process.stdout.read()


def shell(command: str, home: Path) -> str:
    """What a line prints in a shell that the sweep was not started in."""
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(url: str, **headers: str) -> int:
    """The HTTP status of a request, a POST where it carries an authorization."""
    request = urllib.request.Request(url, headers=headers, method="POST" if "Authorization" in headers else "GET")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_dashboard_opens_by_what_was_printed(said: str, tmp_path: Path) -> None:
    (url,) = re.findall(r"Ray dashboard: (\S+)", said)
    is_guarded = (tmp_path / ".ray").exists()
    assert status(url) == 200
    assert status(f"{url}/api/cluster_status") == (401 if is_guarded else 200)
    if is_guarded:
        (line,) = re.findall(r"token that this prints: (.*)", said)
        token = shell(line, tmp_path).strip()
        assert token == TOKEN
        assert status(f"{url}/api/authenticate", Authorization=f"Bearer {token}") == 200
        assert status(f"{url}/api/cluster_status", Cookie=f"ray-authentication-token={token}") == 200
        (line,) = re.findall(r"actors in a terminal: (.*)", said)
    else:
        line = f"{Path(sys.executable).with_name('ray')} list actors --address {url}"
    assert "ALIVE" in shell(line, tmp_path)


@pytest.mark.browser
def test_the_page_asks_for_the_token_only_where_there_is_one(said: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    (url,) = re.findall(r"Ray dashboard: (\S+)", said)
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "virtual-time-budget=20000", "dump-dom"]
    command = [browser, *(f"--{flag}" for flag in flags), f"--user-data-dir={tmp_path / 'profile'}", url]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "Cluster" in page and ("Authentication Token" in page) == (tmp_path / ".ray").exists()
