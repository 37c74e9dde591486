"""SIGTERM, and a terminal that goes away, unwind a command in order, as an interrupt does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """One of ENDING has come: as an interrupt it unwinds everything in order."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While it lasts, the signals interrupt the main thread and leave as Terminated; ignored ones (nohup) stay so."""
    came = 0

    def stop(number: int, frame: object) -> NoReturn:
        nonlocal came
        came = number
        raise Terminated(number)

    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        # Inside Ray's calls any exception of a signal handler comes out as a bare KeyboardInterrupt.
        if came:
            raise Terminated(came) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
