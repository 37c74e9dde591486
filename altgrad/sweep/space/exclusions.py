"""Which combinations of a sweep's axes are left out, by which rule.

A rule has a name and a reason, and what it leaves out is counted: a combination never disappears silently.
These are left out because they would be the same training as another trial, or no training of what they name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from altgrad.quantization import (
    POLICIES,
    LayerRule,
    PrecisionPolicy,
    Recipe,
    Role,
    RoleChange,
    ScaleRule,
    get_format,
    named_policy,
    names_its_own_formats,
    own_format,
    same_spacings,
)
from altgrad.quantization.roles import ROLES
from altgrad.training.arm_configs import ARMS, scale_obstacle
from altgrad.training.config import BASELINE, UNQUANTIZED


def _weights(policy: str) -> list[Role]:
    return [rule.weight for rule in named_policy(policy, BASELINE).rules if rule.weight is not None]


MAIN, PLAIN = "uniform", Recipe()


BLOCK_FORMATS = {
    name.upper(): name
    for name in POLICIES
    if own_format(name) is not None and "block" in {role.scale.kind for role in _weights(name)}
}
"""Formats that are a policy, elements with their blocks' scales: MXFP8 and the like."""


class Combination(NamedTuple):
    """One point of the product of the axes, before its arm's parameters and seeds."""

    format: str
    policy: str
    arm: str
    lead: str
    """the first 8-bit format asked for, or the first format: it stands for policies that name their own"""
    recipe: Recipe = PLAIN

    @property
    def precision(self) -> PrecisionPolicy:
        """What each layer computes in."""
        return precision_of(self.format, self.policy, self.recipe)


@cache
def precision_of(format: str, policy: str, recipe: Recipe) -> PrecisionPolicy:
    """The policy for the format, changed by the recipe, without scales that no tensor has: those of 16 bits."""
    applied = recipe.applied(named_policy(policy, format))
    return applied.model_copy(update={"rules": tuple(map(_without_idle_scales, applied.rules))})


def _without_idle_scales(rule: LayerRule) -> LayerRule:
    roles = {name: getattr(rule, name) for name in ROLES}
    wide = {name for name, role in roles.items() if role is not None and get_format(role.format).total_bits > 8}
    return rule.model_copy(update={name: roles[name].model_copy(update={"scale": ScaleRule()}) for name in wide})


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


def canonical(point: Combination) -> Combination:
    """The combination without those parts of its recipe that leave the training as it is."""
    parts = [(role, field) for role in ROLES for field in RoleChange.model_fields]
    for role, field in parts:
        change = getattr(point.recipe, role)
        if getattr(change, field) is not None:
            less = point.recipe.model_copy(update={role: change.model_copy(update={field: None})})
            if _is_same(point, point._replace(recipe=less)):
                point = point._replace(recipe=less)
    return point


def _is_same(one: Combination, other: Combination) -> bool:
    is_quantized = ARMS[one.arm].rounds_operands
    return one.precision == other.precision if is_quantized else same_spacings(one.precision, other.precision)


RULES: tuple[Rule, ...] = (
    Rule(
        "fp32_is_the_reference",
        "FP32 is not quantized: it runs as the AdamW reference only",
        lambda point: point.format == UNQUANTIZED and (point.policy, point.arm, point.recipe) != (MAIN, "adamw", PLAIN),
    ),
    Rule(
        "policy_names_its_own_formats",
        "it does not depend on the format: it runs once, under its own or the first 8-bit one",
        lambda point: names_its_own_formats(point.policy) and point.format != (own_format(point.policy) or point.lead),
    ),
    Rule(
        "bf16_everywhere_is_uniform",
        "where the format is BF16, this policy and uniform are the same training",
        lambda point: (
            point.format == BASELINE
            and (point.policy != MAIN and point.recipe == PLAIN)
            and not names_its_own_formats(point.policy)
        ),
        stands_for=MAIN,
    ),
    Rule(
        "recipe_changes_nothing",
        "a recipe that says less is the same training",
        lambda point: canonical(point) != point,
    ),
    Rule(
        "float32_operands_are_uniform",
        "no layer rounds anything: policies with the weight formats of uniform are the same training",
        lambda point: (
            not ARMS[point.arm].rounds_operands
            and point.policy != MAIN
            and point.format != UNQUANTIZED
            and same_spacings(point.precision, precision_of(point.format, MAIN, PLAIN))
        ),
        stands_for=MAIN,
    ),
    Rule(
        "one_scale_per_tensor",
        "the arm steps in the spacing of a tensor with one scale, which on the grid the optimizer owns",
        lambda point: scale_obstacle(ARMS[point.arm], point.precision) is not None,
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
