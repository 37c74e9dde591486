"""What can go wrong between Ray and RunPod, each as one readable line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClusterError(Exception):
    """Something a person has to mend; the text is one line: place, value, what is allowed."""


class ApiError(ClusterError):
    """An answer of RunPod other than success, or none at all (`status` is None).

    `retry_after`: seconds to wait, where the answer says so.
    """

    def __init__(self, call: str, status: int | None, detail: str, retry_after: float | None = None) -> None:
        super().__init__(f"RunPod {call}: {status if status is not None else 'no answer'}: {detail}")
        self.status = status
        self.detail = detail
        self.retry_after = retry_after

    @property
    def is_transient(self) -> bool:
        """Whether the same call may succeed later, and whether RunPod may have acted on it nevertheless."""
        return self.status is None or self.status >= 500

    @property
    def is_refused_key(self) -> bool:
        return self.status == 401


def nearest(word: str, known: Iterable[str]) -> str:
    """`; nearest: …` where something known is close to the word, else nothing."""
    close = difflib.get_close_matches(word.lower(), {name.lower(): name for name in known}, n=1, cutoff=0.4)
    names = {name.lower(): name for name in known}
    return f"; nearest: {names[close[0]]}" if close else ""
