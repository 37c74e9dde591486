"""How a trial ended. One word says which of three different answers it needs.

Results (`done`, `pruned`, `nonfinite`, `diverged`, `stalled`, `rank_collapse`) are evidence: they are kept and never
run again. Interruptions (`oom`, `node_lost`, `preempted`, `timeout`, `budget`, `cancelled`) say nothing about the
format: the trial goes on from its checkpoint. A `bug` is ours or the user's, and needs a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class OutcomeKind(StrEnum):
    """The kind of an ending; see the module."""

    DONE = "done"
    PRUNED = "pruned"
    NONFINITE = "nonfinite"
    DIVERGED = "diverged"
    STALLED = "stalled"
    RANK_COLLAPSE = "rank_collapse"
    OOM = "oom"
    NODE_LOST = "node_lost"
    PREEMPTED = "preempted"
    TIMEOUT = "timeout"
    BUG = "bug"
    BUDGET = "budget"
    CANCELLED = "cancelled"


GUARD_KINDS = frozenset({OutcomeKind.NONFINITE, OutcomeKind.DIVERGED, OutcomeKind.STALLED, OutcomeKind.RANK_COLLAPSE})
TRACEBACK = "traceback.txt"
"""In a trial's folder: the error that ended it, whole."""
FAILED = "failed"
"""There too: the mark of the worker that failed first, until the trial is handed out again."""
HUNG = "hung"
"""How the files begin in which watchdogs leave a stack."""
AFTER_SHIFT = " after a shift"
"""What stands behind the kind of an ending that is not one of the trial's first format."""
RESULT_KINDS = GUARD_KINDS | {OutcomeKind.DONE, OutcomeKind.PRUNED}


@dataclass(frozen=True)
class Outcome:
    """How and where a trial ended.

    `step` is the last step trained; `signal`, `layer`, `value`, `limit` and `first_seen` are a guard's evidence and
    None elsewhere. `formats` names the layers that an emergency moved to another format, as in "lm_head: E4M3->E5M2",
    and is None where there are none. `train_loss`, `val_loss` are in nats per token, `bits_per_byte` in bits,
    `seconds` is the wall time of all attempts. `device` is the model of the GPU or CPU that trained it, `driver` the
    version of the GPU's, `hostname` the machine; several of them, joined by "; ", where it went on elsewhere.
    """

    kind: OutcomeKind
    step: int
    signal: str | None = None
    layer: str | None = None
    value: float | None = None
    limit: float | None = None
    first_seen: int | None = None
    message: str = ""
    formats: str | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None
    seconds: float = 0.0
    device: str | None = None
    driver: str | None = None
    hostname: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"kind": str(self.kind)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outcome:
        return cls(**(data | {"kind": OutcomeKind(data["kind"])}))
