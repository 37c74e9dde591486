"""Precision recipes: a named policy, or rules of one's own, with what is changed of their roles.

A policy says which layers get which formats (`policy`). A recipe takes it as it is, puts rules in its place, or changes
one thing of a role in all layers that the policy quantizes: the format of gradients, how weights find their scales, the
rounding of activations. So each part of a recipe can be an axis of a sweep, under a path such as
`recipe.weight.scale.kind`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from altgrad.quantization.formats import get_format
from altgrad.quantization.kernels import Rounding
from altgrad.quantization.policy import LayerRule, PrecisionPolicy
from altgrad.quantization.roles import ROLES, Role
from altgrad.quantization.scaling import ScaleRule


class RoleChange(BaseModel):
    """What a recipe changes of one role; null leaves what the policy says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str | None = Field(None, description="a format's name")
    scale: ScaleRule | None = Field(None, description="how the scale is found")
    rounding: Rounding | None = None

    @field_validator("format")
    @classmethod
    def _exists(cls, name: str | None) -> str | None:
        return None if name is None else get_format(name).name

    @property
    def is_none(self) -> bool:
        return self == RoleChange()

    def of(self, role: Role) -> Role:
        """The role, changed."""
        changes = {
            name: value for name in ("format", "scale", "rounding") if (value := getattr(self, name)) is not None
        }
        return role.model_copy(update=changes)

    def __str__(self) -> str:
        words = [] if self.format is None else [self.format]
        words += [] if self.scale is None else [str(self.scale)]
        words += [] if self.rounding is None else [self.rounding.replace("_", "-")]
        return " ".join(words)


class Recipe(BaseModel):
    """Changes of a policy's roles, in the layers whose weight it quantizes; `rules` stand in the policy's place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[LayerRule, ...] = Field(
        (), description="layer rules in place of the policy's, the first match decides"
    )
    weight: RoleChange = RoleChange()
    activation: RoleChange = RoleChange()
    gradient: RoleChange = RoleChange()
    embeddings: bool = Field(False, description="whether embeddings are quantized too; a tied one goes with its layer")

    @property
    def is_plain(self) -> bool:
        """Whether it leaves the policy as it is."""
        return self == Recipe()

    def applied(self, policy: PrecisionPolicy) -> PrecisionPolicy:
        """The policy, or this recipe's rules, with the changes."""
        if self.is_plain:
            return policy
        rules = tuple(self._changed(rule) for rule in self.rules or policy.rules)
        return PrecisionPolicy(rules=rules, embeddings=self.embeddings or policy.embeddings)

    def _changed(self, rule: LayerRule) -> LayerRule:
        if rule.weight is None:
            return rule
        changes: dict[str, Role] = {}
        for name in ROLES:
            role, change = getattr(rule, name), getattr(self, name)
            if role is not None and not change.is_none:
                changes[name] = change.of(role)
        return rule.model_copy(update=changes)

    def __str__(self) -> str:
        words = [f"{len(self.rules)} own rules"] if self.rules else []
        words += [f"{name} {change}" for name in ROLES if not (change := getattr(self, name)).is_none]
        words += ["embeddings"] if self.embeddings else []
        return ", ".join(words)
