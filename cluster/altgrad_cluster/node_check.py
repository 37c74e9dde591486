"""Run on each node before Ray starts there: does what Ray will need work?

`ray up` itself looks healthy when the head can't import the provider; only nothing ever scales. So this fails first, in
one line per trouble: `python -m altgrad_cluster.node_check KIND RAY_VERSION`, KIND being head or worker on RunPod,
machine for one of one's own.
"""

from __future__ import annotations

import importlib
import os
import stat
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from altgrad_cluster import keys

KINDS = ("head", "worker", "machine")


def troubles(kind: str, ray_version: str) -> Iterator[str]:
    """One line for each thing that would keep this node from working."""
    try:
        found = metadata.version("ray")
    except metadata.PackageNotFoundError:
        yield f"ray: missing in {sys.executable}; {ray_version} is expected"
        return
    if found != ray_version:
        yield f"ray: {found} here and {ray_version} where `ray up` ran: equal versions are expected"
    modules = ("altgrad_cluster.provider", "altgrad") if kind == "head" else ("altgrad",)
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever an import raises, it is what keeps Ray from working
            yield f"{module}: can't be imported here ({type(error).__name__}: {error})"
    yield from _secrets(kind)


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
    if len(argv) != 2 or argv[0] not in KINDS:
        print("usage: python -m altgrad_cluster.node_check head|worker|machine RAY_VERSION", file=sys.stderr)
        return 2
    found = list(troubles(*argv))
    for line in found:
        print(f"altgrad: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
