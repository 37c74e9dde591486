"""Numbers and lists as a report's sentences hold them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence


def signed(value: float) -> str:
    """A difference with its sign, three decimals and a true minus; what rounds to zero has a plus."""
    text = f"{round(value, 3) + 0.0:+.3f}" if abs(value) < 1000 else f"{value:+.2g}"
    return text.replace("-", "−")


def percent(value: float) -> str:
    """A relative difference with its sign, in percent: one decimal below 20 %, none above."""
    if math.isinf(value):
        return "∞ %" if value > 0 else "−∞ %"
    digits = 1 if abs(value) < 0.2 else 0
    text = f"{round(100 * value, digits) + 0.0:+.{digits}f}" if abs(value) < 100 else f"{100 * value:+.2g}"
    return f"{text} %".replace("-", "−")


def share(value: float) -> str:
    """A share in whole percent."""
    return f"{100 * value:.0f} %"


def plain_number(value: float) -> str:
    """A loss: three decimals, two digits where it is huge."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.2g}"


def size(value: float) -> str:
    """A width, a distance: two digits."""
    return f"{value:.2g}"


def listed(names: Iterable[str], last: str = "and") -> str:
    """'a', 'a and b', 'a, b and c'."""
    items = list(names)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" {last} " + items[-1]


def counted(number: int, noun: str) -> str:
    """'1 seed', '3 seeds'."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


MOST_NAMED = 4
"""Of many in one sentence; the tables have them all."""


def several(names: Sequence[str], last: str = "and") -> str:
    """The first of them, and how many more."""
    more = len(names) - MOST_NAMED
    return listed(names, last) if more <= 0 else f"{', '.join(names[:MOST_NAMED])} {last} {counted(more, 'other')}"


def needed(seeds: int | None) -> str:
    """How many seeds more would decide something."""
    return (
        "more than 60 seeds would be needed"
        if seeds is None
        else f"about {counted(seeds, 'more seed')} would decide it"
    )


def of_seeds(stopped: int, seeds: int) -> str:
    """'2 of 3 seeds'."""
    return f"{stopped} of {counted(seeds, 'seed')}"


def anchor_of(text: str) -> str:
    """A text as the name of a place in the page: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
