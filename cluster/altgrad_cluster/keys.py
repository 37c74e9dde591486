"""The three secrets of a cluster, each in a file of mode 0600, and where it may go.

* RunPod's API key: on the laptop and on the head. From RUNPOD_API_KEY, or `~/.altgrad/runpod_api_key`.
* The SSH key, one per cluster, made here: on the laptop and on the head (which sets up the workers with it).
* Ray's token: on every node and in the user's shell, at Ray's own place (RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token).
"""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
from pathlib import Path

from altgrad_cluster.errors import ClusterError
from altgrad_cluster.registry import cluster_folder, home

API_KEY_VARIABLE = "RUNPOD_API_KEY"
API_KEY_FILE = "runpod_api_key"
REMOTE_API_KEY = f"~/.altgrad/{API_KEY_FILE}"
REMOTE_TOKEN = "~/.ray/auth_token"


def api_key() -> str:
    """The key to the account. ClusterError where there is none, or where others could read it."""
    stated = os.environ.get(API_KEY_VARIABLE, "").strip()
    return stated or _read_private(home() / API_KEY_FILE)


def api_key_file(cluster: str) -> Path:
    """A file of mode 0600 that holds the key, to be mounted on the head."""
    stated = os.environ.get(API_KEY_VARIABLE, "").strip()
    if not stated:
        _read_private(home() / API_KEY_FILE)
        return home() / API_KEY_FILE
    return write_private(cluster_folder(cluster) / API_KEY_FILE, stated)


def ssh_key(cluster: str) -> tuple[Path, str]:
    """The private key's file and the public key of a cluster; made on the first call."""
    path = cluster_folder(cluster) / "id_ed25519"
    if not path.exists():
        try:
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"altgrad-{cluster}", "-f", str(path)],
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise ClusterError(f"{path}: ssh-keygen could not make a key ({error}); is openssh installed?") from None
    return path, path.with_name(path.name + ".pub").read_text().strip()


def auth_token_file() -> Path:
    """The file with Ray's token; made on the first call."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not path.exists() or not path.read_text().strip():
        write_private(path, secrets.token_hex(32))
    path.chmod(0o600)
    return path


def write_private(path: Path, text: str) -> Path:
    """Writes the text where only the user can read it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    return path


def _read_private(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except FileNotFoundError:
        text, mode = "", 0
    if not text:
        raise ClusterError(f"{API_KEY_VARIABLE}: missing: export it, or put the key into {path} (mode 0600)")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ClusterError(
            f"{path}: mode {stat.S_IMODE(mode):04o} is not allowed: others can read it; chmod 600 {path}"
        )
    return text
