"""SIGTERM unwinds a command in order, as an interrupt does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: as an interrupt it unwinds everything in order."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While it lasts, SIGTERM interrupts the main thread and leaves as Terminated."""
    came = False

    def stop(number: int, frame: object) -> NoReturn:
        nonlocal came
        came = True
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        # Inside Ray's calls any exception of a signal handler comes out as a bare KeyboardInterrupt.
        if came:
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
