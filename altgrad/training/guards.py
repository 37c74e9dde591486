"""Guards: rules that read a step's row and end a run that is beyond saving, with the evidence.

A guard never touches the training; it compares one signal with one limit. A verdict is a value: which signal, in
which layer, at which step, the value seen, the limit, and the step at which the rule began to hold. That is what a
report needs to answer "why did it stop?".

The default rules, and why they are these. Measured on byte-level GPTs of 2 layers and width 64 over 160 steps: 48
healthy runs (E2M5, E3M4, E4M3, E5M2 under six arms, two seeds, all within 0.1 nats of BF16) and planted faults;
`tests/bench/signals.py` prints the table.

| rule | healthy runs | faults |
| --- | --- | --- |
| loss, gradient norm or weights not finite | never | ends the run at once: none recovered |
| loss 1 nat above its start | fell by 2 nats and more | a run that blew up |
| spectral norm 8 x the reference's | at most 2.5 x | 25 to 380 x where the learning rate is 100 x too high |
| flip yield below .2 | .97 and more | .05 when rounding to nearest on E7M0 |
| a layer with gradients to which nothing is applied | never | frozen layers |
| spread .35 of the reference's | .82 and more | .3 and falling to .02 in a layer driven to rank one |
| overflow above 1 % in some role | 0 | .96 under a scale 64 x too small |

Rules on the reference hold only where the run was given one. The original's monitors and the two-sided rank ratio are
here by name (`NAMED_RULES`), not by default: the stall ratio fires on most healthy runs, a drop in rank is what
healthy training does, and the rank ratio leaves [0.5, 2] in healthy runs of geometry-aware arms, whose ranks stay
twice the reference's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import nn

from altgrad.quantization import multiplied_parameters
from altgrad.quantization.roles import ROLES
from altgrad.training.catalogue import AGGREGATES, SIGNALS, check_signal, read_signal
from altgrad.training.outcome import OutcomeKind

KINDS = {
    "flip_yield": "stalled",
    "stall_ratio": "stalled",
    "flips": "stalled",
    "updates": "stalled",
    "frozen": "stalled",
    "zero_updates": "stalled",
    "stable_rank": "rank_collapse",
    "rank_drop": "rank_collapse",
    "critical_rank_drop": "rank_collapse",
    "rank_ratio": "rank_collapse",
    "spread": "rank_collapse",
    "spread_ratio": "rank_collapse",
    "nonfinite_weights": "nonfinite",
    "skipped_tensors": "nonfinite",
}
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

    kind: Literal["nonfinite", "diverged", "stalled", "rank_collapse", "warning"] = Field(
        description="how the run ends; a warning is recorded and ends nothing"
    )
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
            raise ValueError(f"test={self.test!r} with limit={self.limit!r}: a limit belongs to above and below")
        if self.limit is not None:
            never = self.limit >= signal.most if self.test == "above" else self.limit <= signal.least
            if never:
                raise ValueError(
                    f"limit={self.limit:g}: {self.signal} is never {self.test} it; it lies within "
                    f"{signal.least:g} and {signal.most:g} ({signal.unit})"
                )
        return self

    def for_checks(self, checks: int) -> GuardRule:
        """The rule, holding only after so many consecutive log intervals."""
        return self._changed(checks=checks)

    def after(self, step: int) -> GuardRule:
        """The rule with a grace of so many steps."""
        return self._changed(after_step=step)

    def ending_as(self, kind: str) -> GuardRule:
        """The rule with another outcome; "warning" ends nothing."""
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


def check_layers(rules: Iterable[GuardRule], model: nn.Module) -> None:
    """ValueError for a rule on a layer that the model does not have: it could never fire."""
    modules = ((name, module) for name, module in model.named_modules() if name)
    names = {name for name, module in modules if next(module.parameters(recurse=False), None) is not None}
    names |= multiplied_parameters(model).keys()
    for rule in rules:
        part = rule.signal.partition("/")[2]
        if part and part not in AGGREGATES and part not in names:
            allowed = (*AGGREGATES, *sorted(names))
            close = get_close_matches(part, allowed, n=1, cutoff=0.4)
            near = f"; nearest: {close[0]}" if close else ""
            raise ValueError(
                f"guards: signal={rule.signal!r}: the model has no layer {part!r}; allowed behind '/': "
                f"{', '.join(allowed[:12])}{' …' if len(allowed) > 12 else ''}{near}"
            )


def parse_rule(text: str) -> dict[str, Any]:
    """The fields of a rule written as "flip_yield/min < 0.2 for 3 after 50 as stalled" or "grad_norm is nonfinite"."""
    if text in NAMED_RULES:
        return NAMED_RULES[text].model_dump()
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no rule; write 'flip_yield/min < 0.2 for 3 after 50', 'grad_norm is nonfinite' "
            f"or one of {', '.join(NAMED_RULES)}"
        )
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
    "literal_rank": when("rank_drop/max").above(0.30),
    "literal_critical_rank": when("critical_rank_drop/max").above(0.15),
    "rank_below_reference": when("rank_ratio/min").below(0.5).for_checks(3),
    "rank_above_reference": when("rank_ratio/max").above(2.0).for_checks(3),
    "gradient_spike": when("grad_norm_z").above(2.5).ending_as("warning"),
    "low_flip_yield": when("flip_yield").below(0.5).for_checks(3).after(20).ending_as("warning"),
    "large_updates": when("update_ratio/max").above(1e-2).for_checks(3).after(50).ending_as("warning"),
    "small_updates": when("update_ratio/min").below(1e-4).for_checks(3).after(50).ending_as("warning"),
    **{f"{role}_underflow": when(f"{role}_underflow/max").above(0.1).ending_as("warning") for role in ROLES},
    **{f"{role}_amax_jump": when(f"{role}_amax_jump/max").above(2.0).ending_as("warning") for role in ROLES},
}
"""Rules by name: the original's monitors, kept for reproduction, the two-sided rank ratio, and warnings."""

DEFAULT_GUARDS: tuple[GuardRule, ...] = (
    when("train_loss").is_nonfinite(),
    when("grad_norm").is_nonfinite(),
    when("nonfinite_weights").above(0),
    when("loss_excess").above(1.0).for_checks(3),
    when("spectral_ratio/max").above(8.0).for_checks(2),
    when("flip_yield").below(0.2).for_checks(3).after(20),
    when("frozen").above(0).for_checks(2),
    when("spread_ratio/min").below(0.35).for_checks(2),
    *(when(f"{role}_overflow/max").above(0.01).for_checks(3) for role in ROLES),
    NAMED_RULES["gradient_spike"],
    NAMED_RULES["low_flip_yield"],
)


@dataclass(frozen=True)
class Verdict:
    """Why a run was ended: `value` of `signal` in `layer` at `step` against `limit`."""

    kind: OutcomeKind | Literal["warning"]
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


Counts = tuple[tuple[int | None, int], ...]


class GuardPanel:
    """Checks the rules on row after row and remembers how long each has held.

    `state_dict` is JSON; with it restored, a resumed run reaches the same verdict at the same step.
    """

    def __init__(self, rules: Iterable[GuardRule]) -> None:
        self.rules = tuple(rules)
        self._since: list[int | None] = [None] * len(self.rules)
        self._held = [0] * len(self.rules)
        self.warnings: list[Verdict] = []

    def check(self, rows: Sequence[Mapping[str, Any]]) -> Verdict | None:
        """The first rule that has held long enough, over the rows of one log interval (oldest first).

        `warnings` then holds the findings of the rules that only warn.
        """
        found = [self._check_rule(index, rule, rows) for index, rule in enumerate(self.rules)]
        self.warnings = [verdict for verdict in found if verdict is not None and verdict.kind == "warning"]
        return next((verdict for verdict in found if verdict is not None and verdict.kind != "warning"), None)

    @property
    def counts(self) -> Counts:
        """Of each rule the step since which it holds, None where it does not, and for how many checks."""
        return tuple(zip(self._since, self._held, strict=True))

    @counts.setter
    def counts(self, counts: Counts) -> None:
        self._since, self._held = [since for since, _ in counts], [held for _, held in counts]

    def forget(self) -> None:
        """Starts every rule's count again."""
        self.counts = ((None, 0),) * len(self.rules)

    def _check_rule(self, index: int, rule: GuardRule, rows: Sequence[Mapping[str, Any]]) -> Verdict | None:
        values = {row["step"]: read_signal(row, rule.signal) for row in rows}
        seen = [row for row in rows if values[row["step"]] is not None and row["step"] > rule.after_step]
        if not seen:
            return None
        breaking = [row for row in seen if rule.holds(values[row["step"]])]  # type: ignore[arg-type]
        # A non-finite value anywhere in the interval counts, and so does anything to warn of; other rules judge the
        # interval by its last row.
        anywhere = rule.test == "nonfinite" or rule.kind == "warning"
        row = breaking[0] if anywhere and breaking else seen[-1]
        if not breaking or (not anywhere and row not in breaking):
            self._since[index], self._held[index] = None, 0
            return None
        since = self._since[index]
        first = int(breaking[0]["step"]) if since is None else since
        self._since[index] = first
        self._held[index] += 1
        if self._held[index] < rule.checks:
            return None
        return Verdict(
            kind="warning" if rule.kind == "warning" else OutcomeKind(rule.kind),
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


def guarded_view(row: Mapping[str, Any], rules: Iterable[GuardRule]) -> dict[str, Any]:
    """The part of a row that these rules read, and whether they start to count again behind it."""
    bases = {rule.signal.partition("/")[0] for rule in rules}
    layers = {name: {k: v for k, v in values.items() if k in bases} for name, values in row.get("layers", {}).items()}
    others = ("step", "nonfinite_layer", "shifts")
    kept = {name: value for name, value in row.items() if name in bases or name in others}
    return kept | {"layers": {name: values for name, values in layers.items() if values}}


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """The verdict as the fields of an outcome."""
    return asdict(verdict) | {"message": verdict.message()}
