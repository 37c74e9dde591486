"""Guards: rules that read a step's row and end a run that is beyond saving, with the evidence.

A guard never touches the training; it compares one signal with one limit. A verdict is a value: which signal, in
which layer, at which step, the value seen, the limit, and the step at which the rule began to hold. That is what a
report needs to answer "why did it stop?".

The default rules and why they are these (measured on byte-level GPTs of 4 layers and width 64 over 160 steps, one
seed mostly: directions, not laws): a non-finite loss never recovers, so it ends the run at once; a loss that stays
1 nat above where it began has diverged (healthy runs fell by 2 nats or more); the flip yield, realised over expected
code changes, ordered the failures of rounding to nearest by 12 % of the run, where the older stall ratio fired on
most healthy runs too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from altgrad.training.catalogue import SIGNALS, check_signal, read_signal
from altgrad.training.outcome import OutcomeKind

KINDS = {"flip_yield": "stalled", "stall_ratio": "stalled", "flips": "stalled", "updates": "stalled",
         "stable_rank": "rank_collapse", "nonfinite_weights": "nonfinite", "skipped_tensors": "nonfinite"}  # fmt: skip
"""How a run ends on a signal unless the rule says otherwise; on every other signal it has diverged."""

_TEXT = re.compile(
    r"\s*(?P<signal>[^\s<>]+)\s*(?:(?P<sign>[<>])\s*(?P<limit>\S+)|is\s+(?P<broken>nonfinite))"
    r"(?:\s+for\s+(?P<checks>\d+))?(?:\s+after\s+(?P<after>\d+))?(?:\s+as\s+(?P<kind>\w+))?\s*"
)


class GuardRule(BaseModel):
    """`signal` is non-finite, above or below `limit`, for `checks` checks in a row, after `after_step`.

    In short: `when("flip_yield/min").below(0.2).for_checks(3).after(50)`, or the same as text, which configurations
    and the command line take: "flip_yield/min < 0.2 for 3 after 50".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["nonfinite", "diverged", "stalled", "rank_collapse"]
    signal: str = Field(description="a signal, of layers also signal/min, /max, /mean or /layer: " + ", ".join(SIGNALS))
    test: Literal["nonfinite", "above", "below"]
    limit: FiniteFloat | None = Field(None, description="in the signal's unit; null for test='nonfinite'")
    checks: int = Field(1, ge=1, description="consecutive log intervals for which the rule must hold")
    after_step: int = Field(0, ge=0, description="grace, steps")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return parse_rule(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _can_hold(self) -> GuardRule:
        signal = check_signal(self.signal)
        if (self.limit is None) != (self.test == "nonfinite"):
            raise ValueError(
                f"test={self.test!r} with limit={self.limit!r}: a limit belongs to above and below"
            )
        if self.limit is not None:
            never = self.limit >= signal.most if self.test == "above" else self.limit <= signal.least
            if never:
                raise ValueError(f"limit={self.limit:g}: {self.signal} is never {self.test} it; it lies within "
                                 f"{signal.least:g} and {signal.most:g} ({signal.unit})")  # fmt: skip
        return self

    def for_checks(self, checks: int) -> GuardRule:
        """The rule, holding only after so many consecutive log intervals."""
        return self._changed(checks=checks)

    def after(self, step: int) -> GuardRule:
        """The rule with a grace of so many steps."""
        return self._changed(after_step=step)

    def ending_as(self, kind: str) -> GuardRule:
        """The rule with another outcome: nonfinite, diverged, stalled or rank_collapse."""
        return self._changed(kind=kind)

    def _changed(self, **fields: Any) -> GuardRule:
        return GuardRule(**(self.model_dump() | fields))

    def holds(self, value: float) -> bool:
        """Whether the value breaks this rule; a NaN is neither above nor below anything."""
        if self.test == "nonfinite":
            return not math.isfinite(value)
        assert self.limit is not None
        return value > self.limit if self.test == "above" else value < self.limit


class when:
    """`when("flip_yield/min").below(0.2)`: a rule on a signal."""

    def __init__(self, signal: str) -> None:
        check_signal(signal)
        self._fields = {"signal": signal, "kind": KINDS.get(signal.partition("/")[0], "diverged")}

    def below(self, limit: float) -> GuardRule:
        """Holds while the signal is less than the limit."""
        return GuardRule(**(self._fields | {"test": "below", "limit": limit}))

    def above(self, limit: float) -> GuardRule:
        """Holds while the signal is greater than the limit."""
        return GuardRule(**(self._fields | {"test": "above", "limit": limit}))

    def is_nonfinite(self) -> GuardRule:
        """Holds where the signal is NaN or infinite."""
        return GuardRule(**(self._fields | {"test": "nonfinite", "kind": "nonfinite"}))


def parse_rule(text: str) -> dict[str, Any]:
    """The fields of a rule written as "flip_yield/min < 0.2 for 3 after 50 as stalled" or "grad_norm is nonfinite"."""
    if text in NAMED_RULES:
        return NAMED_RULES[text].model_dump()
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no rule; write 'flip_yield/min < 0.2 for 3 after 50', 'grad_norm is nonfinite' "
                         f"or one of {', '.join(NAMED_RULES)}")  # fmt: skip
    given = found.groupdict()
    check_signal(given["signal"])
    kind = "nonfinite" if given["broken"] else KINDS.get(given["signal"].partition("/")[0], "diverged")
    fields: dict[str, Any] = {"signal": given["signal"], "kind": given["kind"] or kind, "test": "nonfinite"}
    if not given["broken"]:
        fields |= {"test": "below" if given["sign"] == "<" else "above", "limit": given["limit"]}
    fields |= {"checks": given["checks"]} if given["checks"] else {}
    return fields | ({"after_step": given["after"]} if given["after"] else {})


NAMED_RULES: dict[str, GuardRule] = {
    "literal_stall": when("stall_ratio").above(0.5),
}
"""The original's monitors by name. The stall ratio above 0.5 fires on most healthy runs: kept for reproduction."""

DEFAULT_GUARDS: tuple[GuardRule, ...] = (
    GuardRule(kind="nonfinite", signal="train_loss", test="nonfinite"),
    GuardRule(kind="nonfinite", signal="grad_norm", test="nonfinite"),
    GuardRule(kind="nonfinite", signal="nonfinite_weights", test="above", limit=0),
    GuardRule(kind="diverged", signal="loss_excess", test="above", limit=1.0, checks=3),
    GuardRule(kind="stalled", signal="flip_yield", test="below", limit=0.2, checks=3, after_step=20),
)


@dataclass(frozen=True)
class Verdict:
    """Why a run was ended: `value` of `signal` in `layer` at `step` against `limit`."""

    kind: OutcomeKind
    signal: str
    layer: str | None
    step: int
    value: float
    limit: float | None
    first_seen: int

    def message(self) -> str:
        is_local = self.kind is OutcomeKind.NONFINITE
        where = "" if self.layer is None else f" in {self.layer}" if is_local else f" (worst in {self.layer})"
        limit = "" if self.limit is None else f", limit {self.limit:g}"
        since = "" if self.first_seen == self.step else f", since step {self.first_seen}"
        return f"{self.signal}{where} was {self.value:g} at step {self.step}{limit}{since}"


class GuardPanel:
    """Checks the rules on row after row and remembers how long each has held.

    `state_dict` is JSON; with it restored, a resumed run reaches the same verdict at the same step.
    """

    def __init__(self, rules: Iterable[GuardRule]) -> None:
        self.rules = tuple(rules)
        self._since: list[int | None] = [None] * len(self.rules)
        self._held = [0] * len(self.rules)

    def check(self, rows: Sequence[Mapping[str, Any]]) -> Verdict | None:
        """The first rule that has held long enough, over the rows of one log interval (oldest first)."""
        for index, rule in enumerate(self.rules):
            verdict = self._check_rule(index, rule, rows)
            if verdict is not None:
                return verdict
        return None

    def _check_rule(self, index: int, rule: GuardRule, rows: Sequence[Mapping[str, Any]]) -> Verdict | None:
        values = {row["step"]: read_signal(row, rule.signal) for row in rows}
        seen = [row for row in rows if values[row["step"]] is not None and row["step"] > rule.after_step]
        if not seen:
            return None
        breaking = [row for row in seen if rule.holds(values[row["step"]])]  # type: ignore[arg-type]
        # A non-finite value anywhere in the interval counts; other rules judge the interval by its last row.
        row = breaking[0] if rule.test == "nonfinite" and breaking else seen[-1]
        if not breaking or (rule.test != "nonfinite" and row not in breaking):
            self._since[index], self._held[index] = None, 0
            return None
        since = self._since[index]
        first = int(breaking[0]["step"]) if since is None else since
        self._since[index] = first
        self._held[index] += 1
        if self._held[index] < rule.checks:
            return None
        return Verdict(
            kind=OutcomeKind(rule.kind),
            signal=rule.signal,
            layer=worst_layer(rule, row, rows[-1]),
            step=int(row["step"]),
            value=float(values[row["step"]]),  # type: ignore[arg-type]
            limit=rule.limit,
            first_seen=first,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "rules": [rule.model_dump(mode="json") for rule in self.rules],
            "since": list(self._since),
            "held": list(self._held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the counts of the rules that are still the same; new or changed rules start afresh."""
        saved = {
            str(rule): (since, held)
            for rule, since, held in zip(state["rules"], state["since"], state["held"], strict=True)
        }
        for index, rule in enumerate(self.rules):
            self._since[index], self._held[index] = saved.get(str(rule.model_dump(mode="json")), (None, 0))


def worst_layer(rule: GuardRule, row: Mapping[str, Any], last: Mapping[str, Any]) -> str | None:
    """Where it happened: the layer most extreme in the rule's direction, or the one whose numbers broke at `row`."""
    if rule.kind == "nonfinite":
        broken: str | None = row.get("nonfinite_layer", last.get("nonfinite_layer"))
        return broken
    base, _, part = rule.signal.partition("/")
    layers: dict[str, float] = {
        name: values[base]
        for name, values in last.get("layers", {}).items()
        if values.get(base) is not None and not math.isnan(values[base])
    }
    if part in layers:
        return part
    if not layers:
        return None
    pick = min if rule.test == "below" else max
    return pick(layers, key=lambda name: layers[name])


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """The verdict as the fields of an outcome."""
    return asdict(verdict) | {"message": verdict.message()}
