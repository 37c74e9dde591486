"""Nothing dies of how, or whether, it can be printed.

A stream whose encoding lacks a character gets the character's plain spelling (− as -, × as x), or its code where it has
none. Where stdout is closed, full or a pipe that nobody reads any more, a command that only answers ends with one line;
a sweep says so once and goes on without, since its ledger and report are what it is for. What stderr can't take is
dropped.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

PLAIN = {
    "−": "-",
    "–": "-",
    "—": "-",
    "×": "x",
    "·": ".",
    "•": "*",
    "±": "+-",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "…": "...",
    "→": "->",
    "∞": "inf",
    "√": "sqrt",
    "²": "2",
    "✓": "yes",
    "µ": "u",
    "’": "'",
    "“": '"',
    "”": '"',
}
SPELLED = "altgrad.spelled"
"""The name of the error handler, for encodings."""


class LostError(Exception):
    """Stdout takes nothing any more; `cause` is what the operating system says."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"stdout can't be written ({cause.strerror or cause})")
        self.cause = cause


class Stream:
    """Stands in for a text stream; once that takes nothing, what is written is dropped.

    At first LostError is raised, unless the writer `goes_on`: then stderr says so.
    """

    def __init__(self, stream: TextIO | None, *, is_open: bool = True, is_silent: bool = False) -> None:
        self.goes_on = False
        self._is_open, self._is_silent = is_open and stream is not None, is_silent
        self._is_lost = False
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 (as long as this)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._is_lost:
            try:
                if not self._is_open:
                    raise OSError(errno.EBADF, "it is closed")
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if not self._is_lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, cause: OSError) -> None:
        self._is_lost = True
        with contextlib.suppress(OSError, ValueError):  # not every stream has a number
            # What is left in the buffer must go somewhere, or the interpreter complains of it at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._is_silent:
            return
        if not self.goes_on:
            raise LostError(cause)
        print(f"altgrad: {LostError(cause)}; the sweep goes on without", file=sys.stderr, flush=True)


@contextlib.contextmanager
def guarded() -> Iterator[Stream]:
    """While it lasts, stdout and stderr are such streams; yields stdout's."""
    codecs.register_error(SPELLED, _spelled)
    before = sys.stdout, sys.stderr
    closed = _open_what_is_closed()
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=SPELLED)
    out = Stream(before[0], is_open=1 not in closed)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, Stream(before[1], is_open=2 not in closed, is_silent=True))
    try:
        try:
            yield out
        finally:
            out.flush()
    finally:
        sys.stdout, sys.stderr = before


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(one) or ascii(one)[1:-1] for one in lacking), error.end


def _open_what_is_closed() -> set[int]:
    """The standard streams' numbers that are closed. They would go to the next files that are opened, the ledger maybe,
    and what a library prints would be written there."""
    closed = set()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    return closed
