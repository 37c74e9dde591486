"""How errors reach a person.

On the laptop an error ends the `ray` command with one line and no traceback. On the head it goes to the autoscaler,
whose second version would say only that a launch failed: its error is taught to say why, in `ray status -v` and the
monitor's log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from altgrad_cluster.errors import ApiError, ClusterError


class Readable:
    """Turns a ClusterError into what its reader can use: on the laptop an end in one line, on the head an exception.

    `launching`: the exception class by which a provider reports a failed launch (category, text, source).
    """

    def __init__(self, *, on_head: bool, launching: type[Exception] | None = None) -> None:
        self._on_head = on_head
        self._launching = launching

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, ClusterError):
            return
        if not self._on_head:
            raise SystemExit(f"altgrad: {one_line(error)}") from None
        if self._launching is not None:
            raise self._launching("NoPod", one_line(error), None) from None


@contextlib.contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Ends the process with the error's line."""
    try:
        yield
    except ClusterError as error:
        raise SystemExit(f"altgrad: {one_line(error)}") from None


def one_line(error: ClusterError) -> str:
    if isinstance(error, ApiError) and error.is_refused_key:
        return "RUNPOD_API_KEY: RunPod refuses this key (401): a valid API key of the account is expected"
    return " ".join(str(error).split())


def show_in_status() -> None:
    """Lets Ray's launch error name its cause, and keeps what Ray 2.60 drops on the way to its status.

    Does nothing on a Ray that has no such parts.
    """
    try:
        from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
        from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError

        update = InstanceManager._update_instance
    except (ImportError, AttributeError):
        return

    def text(error: BaseException) -> str:
        said = " ".join(map(str, error.args))
        return f"{said}{error.__cause__}" if error.__cause__ is not None else said

    LaunchNodeError.__str__ = text

    if getattr(update, "keeps_details", False):
        return

    def update_with_details(instance: Any, change: Any) -> Any:
        changed = update(instance, change)
        if changed.status_history and not changed.status_history[-1].details:
            changed.status_history[-1].details = change.details
        return changed

    update_with_details.keeps_details = True  # type: ignore[attr-defined]
    InstanceManager._update_instance = staticmethod(update_with_details)
