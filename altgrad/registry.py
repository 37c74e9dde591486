"""Names that a configuration may hold, and what AltGrad means by them.

A program may add to a registry, and train with what it added. The workers of a sweep have their own copy of AltGrad:
they would not know the name, or mean something else by it, and a trial's id holds the name alone. So a registry
remembers what it held when AltGrad made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Meaning = TypeVar("Meaning")


class Registry(dict[str, Meaning]):
    """A dict by name that knows which of its entries are AltGrad's own."""

    def __init__(self, own: Mapping[str, Meaning]) -> None:
        super().__init__(own)
        self.own = dict(own)

    def check_own(self, key: str, names: Iterable[str]) -> None:
        """ValueError, naming the key of a configuration, where a name in it means something else in other processes."""
        for name in names:
            if name not in self.own or self.get(name) is not self.own[name]:
                what = "replaced by this program" if name in self.own else "known to this program alone"
                raise ValueError(
                    f"{key}: {name!r} is {what}: a sweep's workers do not have it, and the ids of its trials would not "
                    f"tell what it was; AltGrad's own are {', '.join(self.own)}"
                )
