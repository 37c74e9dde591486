"""`altgrad cluster …`: handed on to the package that `cluster/` ships, which stands outside the floors."""

from __future__ import annotations

import argparse
import sys


def cluster(request: argparse.Namespace) -> int:
    try:
        from altgrad_cluster.commands import main
    except ModuleNotFoundError as error:
        print(
            f"altgrad: {error.name} can't be imported: install the project from a checkout (pip install -e .)",
            file=sys.stderr,
        )
        return 2
    return main(request.words)
