"""Which combinations of a sweep's axes are left out, by which rule.

A rule has a name and a reason, and what it leaves out is counted: a combination never disappears silently.
These are left out because they would be the same training as another trial, or no training of what they name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from altgrad.quantization import named_policy, same_weights
from altgrad.training.config import ARMS, BASELINE, UNQUANTIZED

MAIN = "uniform"


class Combination(NamedTuple):
    """One point of the product of the axes, before its arm's parameters and seeds."""

    format: str
    policy: str
    arm: str
    lead: str
    """the first 8-bit format asked for, or the first format: it stands for policies that name their own"""


class Rule(NamedTuple):
    """Why a combination is left out."""

    name: str
    reason: str
    applies: Callable[[Combination], bool]
    stands_for: str | None = None
    """the policy under which the same training runs"""


class Exclusion(NamedTuple):
    """How many trials a rule left out."""

    rule: str
    reason: str
    trials: int

    def plus(self, trials: int) -> Exclusion:
        return self._replace(trials=self.trials + trials)


RULES: tuple[Rule, ...] = (
    Rule(
        "fp32_is_the_reference",
        "FP32 is not quantized: it runs as the AdamW reference only",
        lambda point: point.format == UNQUANTIZED and (point.arm, point.policy) != ("adamw", "uniform"),
    ),
    Rule(
        "policy_names_its_own_formats",
        "it does not depend on the format: it runs once, under the first 8-bit one",
        lambda point: _names_its_own_formats(point.policy) and point.format != point.lead,
    ),
    Rule(
        "bf16_everywhere_is_uniform",
        "where the format is BF16, this policy and uniform are the same training",
        lambda point: point.format == BASELINE and point.policy != MAIN and not _names_its_own_formats(point.policy),
        stands_for=MAIN,
    ),
    Rule(
        "float32_operands_are_uniform",
        "no layer rounds anything: policies with the weight formats of uniform are the same training",
        lambda point: (
            not getattr(ARMS[point.arm], "quantized", True)
            and point.policy != MAIN
            and point.format != UNQUANTIZED
            and same_weights(point.policy, MAIN, point.format)
        ),
        stands_for=MAIN,
    ),
)
RAW_LR = "raw_unit_has_its_own_lr"
RAW_LR_REASON = "its learning rate is in rungs, not in weight units: the lrs axis does not apply, its default does"


def in_place_of(point: Combination, policies: Sequence[str]) -> Combination:
    """The combination; under the first of the sweep's policies whose rule names another that the sweep lacks, that."""
    named = {policy: _stands_for(point._replace(policy=policy)) for policy in policies}
    first = next((policy for policy, other in named.items() if other is not None and other not in policies), None)
    return point._replace(policy=str(named[first])) if first == point.policy else point


def _stands_for(point: Combination) -> str | None:
    rule = excluded_by(point)
    return None if rule is None else rule.stands_for


def excluded_by(point: Combination) -> Rule | None:
    """The first rule that leaves the combination out, or None."""
    return next((rule for rule in RULES if rule.applies(point)), None)


def _names_its_own_formats(policy: str) -> bool:
    return named_policy(policy, "E5M2") == named_policy(policy, "E7M0")
