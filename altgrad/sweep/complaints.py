"""How a request is refused: in one line, with what is allowed and the nearest match."""

from __future__ import annotations

import reprlib
import traceback
from difflib import get_close_matches
from typing import Any


class SpecError(ValueError):
    """A request that can't be met as it stands; the message is one line for the person who made it."""


def check_choice(name: str, allowed: Any, what: str) -> str:
    """The name if it is allowed, else a ValueError that says what is, and which is nearest."""
    if name in allowed:
        return name
    raise ValueError(f"{name!r} is no {what}; allowed: {', '.join(allowed)}{nearest(name, allowed)}")


def nearest(name: str, allowed: Any) -> str:
    """'; nearest: …' for the closest allowed name, or nothing where none is close."""
    close = get_close_matches(name, list(allowed), n=1, cutoff=0.4)
    return f"; nearest: {close[0]}" if close else ""


def headline(error: BaseException) -> str:
    """The error's class and first line; of a configuration, the first field that is wrong and why."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        text = str(first["msg"])
        if first["type"] != "value_error":  # those name the value themselves
            text = f"{reprlib.repr(first['input'])} is not allowed: {text[:1].lower()}{text[1:]}"
        where = ".".join(own_path(list(map(str, first["loc"])))) or error.title
        return f"{where}: {text.removeprefix('Value error, ')}"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def own_path(path: list[str]) -> list[str]:
    """The path of a field as people write it: those of a sweep's template stand at its own level."""
    return path[1:] if path[:1] == ["base"] else path


def place_of(error: BaseException, file: str) -> str:
    """The error's headline, after the file and the line of it where it was raised or called for."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}{f':{lines[-1]}' if lines else ''}: {headline(error)}"
