"""The secrets of a cluster, each in a file of mode 0600, and where it may go.

* RunPod's API key: on the laptop and on the head. From RUNPOD_API_KEY, or `~/.altgrad/runpod_api_key`. The head reads
  the mounted file only: RUNPOD_API_KEY there is the pod's own key, which RunPod puts into every shell.
* The SSH key, one per cluster, made here: on the laptop and on the head (which sets up the workers with it).
* Ray's token: on every node and in the user's shell, at Ray's own place (RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token).
* What sweeps need (WANDB_API_KEY, HF_TOKEN): lines NAME=value of `~/.altgrad/secrets.env`, mounted on the head and
  exported there by env.sh. Workers, where trials can read them, get those that `provider.worker_secrets` names.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from altgrad_cluster.errors import ClusterError, nearest
from altgrad_cluster.naming import fingerprint
from altgrad_cluster.registry import cluster_folder, home

API_KEY_VARIABLE = "RUNPOD_API_KEY"
API_KEY_FILE = "runpod_api_key"
REMOTE_API_KEY = f"~/.altgrad/{API_KEY_FILE}"
REMOTE_TOKEN = "~/.ray/auth_token"
SECRETS_FILE, WORKER_SECRETS_FILE = "secrets.env", "worker_secrets.env"
REMOTE_SECRETS, REMOTE_WORKER_SECRETS = f"~/.altgrad/{SECRETS_FILE}", f"~/.altgrad/{WORKER_SECRETS_FILE}"
SECRET = re.compile(r"(?!RUNPOD_|RAY_|ALTGRAD_|PATH=|PYTHON)([A-Z][A-Z0-9_]*)=([\w.:/+=@-]+)", re.ASCII)
"""A line of the file: env.sh lets a shell read it, so nothing in it may be the shell's own language."""


def api_key() -> str:
    """The key to the account. ClusterError where there is none, or where others could read it."""
    stated = os.environ.get(API_KEY_VARIABLE, "").strip()
    return stated or _stored_api_key()


def mounted_api_key() -> str:
    """The key that `ray up` mounted on this head, whatever the environment says."""
    path = Path(REMOTE_API_KEY).expanduser()
    return _read_private(path, f"{path}: missing: `ray up` mounts the account's API key there")


def api_key_file(cluster: str) -> Path:
    """A file of mode 0600 that holds the key, to be mounted on the head."""
    stated = os.environ.get(API_KEY_VARIABLE, "").strip()
    if not stated:
        _stored_api_key()
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
    return path, path.with_name(path.name + ".pub").read_text(encoding="utf-8").strip()


def own_fingerprint(cluster: str) -> str | None:
    """What stands in the names of the pods that this machine started for that cluster; None where it never did."""
    try:
        return fingerprint((cluster_folder(cluster) / "id_ed25519.pub").read_text(encoding="utf-8"))
    except OSError:
        return None


def auth_token_file() -> Path:
    """The file with Ray's token; made on the first call."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        write_private(path, secrets.token_hex(32))
    path.chmod(0o600)
    return path


def write_private(path: Path, text: str) -> Path:
    """Writes the text where only the user can read it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    return path


def secret_mounts(cluster: str, for_workers: Sequence[str]) -> dict[str, str]:
    """What of `secrets.env` the head mounts: all of it, and a second file with what goes on to its workers."""
    path = home() / SECRETS_FILE
    found = _secrets(path) if path.exists() else {}
    for name in for_workers:
        if name not in found:
            raise ClusterError(
                f"provider.worker_secrets: {name!r}: not in {path}; there are {', '.join(found) or 'none'}"
                f"{nearest(name, found)}"
            )
    mounts = {REMOTE_SECRETS: str(path)} if found else {}
    if for_workers:
        text = "".join(f"{name}={found[name]}\n" for name in for_workers)
        mounts[REMOTE_WORKER_SECRETS] = str(write_private(cluster_folder(cluster) / WORKER_SECRETS_FILE, text))
    return mounts


def _stored_api_key() -> str:
    path = home() / API_KEY_FILE
    return _read_private(path, f"{API_KEY_VARIABLE}: missing: export it, or put the key into {path} (mode 0600)")


def _secrets(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(_read_private(path, f"{path}: is empty").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        named = SECRET.fullmatch(line.strip())
        if named is None:
            # Without the line itself: what is wrong with it may be a secret.
            raise ClusterError(
                f"{path}: line {number} is not allowed: NAME=value is expected, without quotes and spaces, and NAME "
                "none of RUNPOD_*, RAY_*, ALTGRAD_*, PATH, PYTHON*"
            )
        found[named[1]] = named[2]
    return found


def _read_private(path: Path, missing: str) -> str:
    """The file's text. ClusterError where others can read it, and with the text `missing` where there is none."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        text, mode = "", 0
    except OSError as error:
        raise ClusterError(f"{path}: can't be read ({error.strerror})") from None
    if not text:
        raise ClusterError(missing)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ClusterError(
            f"{path}: mode {stat.S_IMODE(mode):04o} is not allowed: others can read it; chmod 600 {path}"
        )
    return text
