"""Which GPU in which data centre is asked for next.

RunPod places one GPU type per request and does not search, so the order of preference is walked here: every GPU of the
list in every data centre of the list. One that had no room is left alone for a while; what speaks for the whole
account (no balance, rate limit, a broken API) holds back everything. The reasons are kept, for they are all that a
person sees when nothing starts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from altgrad_cluster.errors import ApiError

COOLDOWN_S = 120.0
BACKOFF_S = (10.0, 300.0)
"""First and longest pause after a failure that no other candidate would cure; it doubles in between."""
WORDS = {
    400: "no capacity, or a bad request",
    401: "key refused",
    402: "insufficient balance",
    403: "not allowed for this account",
    422: "the request breaks RunPod's contract",
    429: "rate limit",
}


@dataclass(frozen=True)
class Candidate:
    """A GPU type in a data centre; None lets RunPod choose the data centre."""

    gpu: str
    data_center: str | None

    def __str__(self) -> str:
        return f"{self.gpu} in {self.data_center or 'any data centre'}"


def candidates(gpus: Sequence[str], data_centers: Sequence[str]) -> list[Candidate]:
    """In order of preference: the first GPU everywhere, then the second."""
    return [Candidate(gpu, place) for gpu in gpus for place in (data_centers or (None,))]


class Availability:
    """What was refused lately, shared by all threads of a provider."""

    def __init__(self, cooldown: float = COOLDOWN_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._cooldown = cooldown
        self._clock = clock
        self._lock = threading.Lock()
        self._until: dict[Candidate, tuple[float, str]] = {}
        self._paused: tuple[float, str] = (0.0, "")
        self._failures = 0

    def paused(self) -> str | None:
        """Why nothing at all is asked for now, or None."""
        with self._lock:
            until, reason = self._paused
            left = until - self._clock()
            return f"{reason}; next try in {left:.0f} s" if left > 0 else None

    def blocked(self, candidate: Candidate) -> str | None:
        """Why this candidate is left alone now, or None."""
        with self._lock:
            until, reason = self._until.get(candidate, (0.0, ""))
            left = until - self._clock()
            return f"{candidate}: {reason} (again in {left:.0f} s)" if left > 0 else None

    def refused(self, candidate: Candidate, error: ApiError) -> bool:
        """Takes note of a failed creation; whether another candidate is worth asking."""
        if error.status in (400, 403, 404):
            self.avoid(candidate, _short(error))
            return True
        self.pause(_short(error), error.retry_after)
        return False

    def avoid(self, candidate: Candidate, reason: str) -> None:
        """Leaves it alone for the cooldown."""
        with self._lock:
            self._until[candidate] = (self._clock() + self._cooldown, reason)

    def pause(self, reason: str, seconds: float | None = None) -> None:
        """Holds everything back, for `seconds` or for longer each time."""
        with self._lock:
            first, longest = BACKOFF_S
            wait = seconds if seconds is not None else min(longest, first * 2**self._failures)
            self._failures += 1
            self._paused = (self._clock() + wait, reason)

    def succeeded(self, candidate: Candidate) -> None:
        with self._lock:
            self._until.pop(candidate, None)
            self._failures = 0


def _short(error: ApiError) -> str:
    word = WORDS.get(error.status or 0, "")
    return f"{error.status or 'no answer'}{word and f' ({word})'}: {error.detail}"
