"""Run on each node before Ray starts there: does what Ray and trials will need work?

`ray up` itself looks healthy when the head can't import the provider, or reads the account with a wrong key; only
nothing ever scales. A worker with a broken GPU or too old a driver would take trials and lose them. So this fails
first, in one line per trouble: `python -m altgrad_cluster.node_check KIND RAY_VERSION`, KIND being head or worker on
RunPod, machine for one of one's own, and software for what has to be installed only. With `requirements` it prints what
pip has to install.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import stat
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from altgrad_cluster import keys, node
from altgrad_cluster.api import BASE, Api
from altgrad_cluster.errors import ClusterError
from altgrad_cluster.naming import GPU_COUNT_VARIABLE
from altgrad_cluster.reasons import one_line
from altgrad_cluster.registry import home
from altgrad_cluster.watch import BOOTSTRAP, HOPELESS

KINDS = ("head", "worker", "machine", "software")
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def troubles(kind: str, ray_version: str) -> Iterator[str]:
    """One line for each thing that would keep this node from working."""
    lacking = list(_software(ray_version))
    yield from lacking
    if kind == "software" or lacking:
        return
    modules = ("altgrad_cluster.provider", "altgrad") if kind == "head" else ("altgrad",)
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever an import raises, it is what keeps Ray from working
            yield f"{module}: can't be imported here ({type(error).__name__}: {error})"
    yield from _secrets(kind)
    if kind == "head":
        yield from _account()
    if kind == "worker":
        for line in _gpus():
            with contextlib.suppress(OSError):
                (home() / HOPELESS).write_text(line, encoding="utf-8")
            yield line


def _software(ray_version: str) -> Iterator[str]:
    """Packages that are missing, or of a version that the project doesn't work with."""
    try:
        found = metadata.version("ray")
    except metadata.PackageNotFoundError:
        yield f"ray: missing in {sys.executable}; {ray_version} is expected"
        return
    if found != ray_version:
        yield f"ray: {found} here and {ray_version} where `ray up` ran: equal versions are expected"
    from packaging.requirements import Requirement  # Ray needs it too

    for text in _dependencies():
        wanted = Requirement(text)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield f"{wanted.name}: missing in {sys.executable}; {wanted.specifier} is expected"
            continue
        if wanted.name != "ray" and not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name}: {version} in {sys.executable}; {wanted.specifier} is expected"


def _dependencies() -> list[str]:
    return [str(text) for text in tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]]


def requirements(ray_version: str) -> list[str]:
    """The project's dependencies, with the version of Ray that the cluster runs."""
    return [text.split(">=")[0] + f"=={ray_version}" if text.startswith("ray[") else text for text in _dependencies()]


def _account() -> Iterator[str]:
    """Whether the mounted key opens the account: the head's autoscaler has no other."""
    try:
        base = json.loads(BOOTSTRAP.expanduser().read_text(encoding="utf-8"))["provider"]["api_base"]
    except (OSError, ValueError, KeyError):
        base = BASE
    try:
        Api(keys.mounted_api_key, base).pods()
    except ClusterError as error:
        yield f"{keys.REMOTE_API_KEY}: the head can't list the account's pods with it ({one_line(error)})"


def _gpus() -> Iterator[str]:
    """Whether trials can use every GPU that this pod was rented with."""
    try:
        from altgrad.training.devices import self_test

        expected = int(node.environment().get(GPU_COUNT_VARIABLE) or 1)
        yield from (f"GPU self-test: {line}" for line in self_test(expected))
    except Exception as error:  # a driver can fail in many ways, and each keeps trials from running
        yield f"GPU self-test: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _secrets(kind: str) -> Iterator[str]:
    token, key = (Path(path).expanduser() for path in (keys.REMOTE_TOKEN, keys.REMOTE_API_KEY))
    if os.environ.get("RAY_AUTH_MODE") != "token":
        yield "RAY_AUTH_MODE: is not 'token' in this shell: workers could not join"
    for path, wanted in ((token, True), (key, kind == "head")):
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield f"{path}: others can read it; mode 0600 is expected"
        if wanted != path.exists() and not (kind == "machine" and path == key):
            yield f"{path}: {'missing' if wanted else 'not allowed on a worker'}"


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] not in (*KINDS, "requirements"):
        print(
            f"usage: python -m altgrad_cluster.node_check {'|'.join(KINDS)}|requirements RAY_VERSION", file=sys.stderr
        )
        return 2
    if argv[0] == "requirements":
        print("\n".join(requirements(argv[1])))
        return 0
    found = list(troubles(*argv))
    for line in found:
        print(f"altgrad: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
