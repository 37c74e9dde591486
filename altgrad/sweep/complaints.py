"""How a request is refused: in one line, with what is allowed and the nearest match."""

from __future__ import annotations

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
