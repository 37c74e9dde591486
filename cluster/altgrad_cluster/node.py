"""Who this node is: pod id, private address, the key that RunPod itself gives each pod for itself.

RunPod puts these into the environment of the container's first process; a shell that came by SSH doesn't have it.
`python -m altgrad_cluster.node ip` prints the address under which the other pods reach this one; `… route ADDRESS` does
so for a machine of one's own, by the way its packets to that address would take.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from altgrad_cluster.errors import ClusterError

FIRST_PROCESS = Path("/proc/1/environ")
PATIENCE_S = 60.0


def environment(path: Path = FIRST_PROCESS) -> dict[str, str]:
    """The environment that the container was started with."""
    try:
        pairs = path.read_bytes().split(b"\0")
    except OSError as error:
        raise ClusterError(f"{path}: can't be read ({error.strerror})") from None
    return dict(pair.decode(errors="replace").split("=", 1) for pair in pairs if b"=" in pair)


def pod_id() -> str:
    found = environment().get("RUNPOD_POD_ID")
    if not found:
        raise ClusterError("RUNPOD_POD_ID: missing: this is no pod of RunPod")
    return found


def private_ip(patience: float = PATIENCE_S) -> str:
    """This pod's address in the account's private network; waits until the name resolves."""
    name, deadline = f"{pod_id()}.runpod.internal", time.monotonic() + patience
    while True:
        try:
            return socket.gethostbyname(name)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"{name}: no address ({error}); is global networking on?") from None
            time.sleep(1)


def route_ip(towards: str = "192.0.2.1") -> str:
    """This machine's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


def main(argv: list[str]) -> int:
    known = {"ip": private_ip, "id": pod_id, "route": route_ip}
    if not argv or argv[0] not in known or len(argv) > (2 if argv[0] == "route" else 1):
        print("usage: python -m altgrad_cluster.node ip | id | route [ADDRESS]", file=sys.stderr)
        return 2
    try:
        print(known[argv[0]](*argv[1:]))
    except (ClusterError, OSError) as error:
        print(f"altgrad: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
