"""`altgrad cluster …`: handed on to the package that `cluster/` ships, which stands outside the floors."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_cluster_command(command: Any) -> None:
    """Registers it; `command(name, handler, help)` adds one to the parser."""
    added = command("cluster", _cluster, "doctor, status, cost and gc of a GPU cluster on RunPod")
    added.add_argument("words", nargs=argparse.REMAINDER, metavar="doctor | status | cost | gc",
                       help="and the cluster's YAML file")


def _cluster(request: argparse.Namespace) -> int:
    try:
        from altgrad_cluster.commands import main
    except ModuleNotFoundError as error:
        print(f"altgrad: {error.name} can't be imported: install the project from a checkout (pip install -e .)",
              file=sys.stderr)
        return 2
    return main(request.words)
