"""Which layer gets which formats: an ordered list of regular expressions over layer names.

The first rule whose pattern is found in a layer's name (`re.search`) decides; a layer that no rule matches is
left as it is. Master weights are float32 here, so a layer that "keeps BF16" computes with weights rounded to
BF16.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import cache

from pydantic import BaseModel, ConfigDict, Field, field_validator

from altgrad.quantization.block_scaling import BlockScale
from altgrad.quantization.formats import get_format
from altgrad.quantization.roles import Role, as_role
from altgrad.quantization.scaling import ScaleRule
from altgrad.registry import Registry

HEAD_NAMES = ("lm_head", "classifier", "score", "head")
"""Last parts of the names that an output layer goes by."""

HEAD_PATTERN = rf"(^|\.)({'|'.join(HEAD_NAMES)})$"
ATTENTION_PATTERN = r"(^|\.)(attn|attention|self_attn|self_attention)\."
MLP_PATTERN = r"(^|\.)(mlp|ffn|feed_forward)\."


class LayerRule(BaseModel):
    """Roles for the layers whose name matches; a format's name alone means current amax and nearest rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field(description="regular expression searched in the layer's name")
    weight: Role | None = Field(default=None, description="role of the weight; none keeps BF16")
    activation: Role | None = Field(
        default=Role(format="BF16"), description="role of the input; none leaves input and output in float32"
    )
    gradient: Role | None = Field(
        default=Role(format="BF16"), description="role of the output's gradient; none leaves it in float32"
    )
    leave: bool = Field(False, description="whether the layer is left as it is, unquantized")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    @field_validator("weight", "activation", "gradient", mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return as_role(value) if isinstance(value, str) else value

    def matches(self, layer_name: str) -> bool:
        """Whether the pattern is found in the name."""
        return re.search(self.pattern, layer_name) is not None


class PrecisionPolicy(BaseModel):
    """Rules in order of precedence; no rules convert nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[LayerRule, ...] = ()
    embeddings: bool = Field(False, description="whether rules hold for embeddings too; a tied one goes with its layer")

    def resolve(self, layer_name: str) -> LayerRule | None:
        """The first rule that matches, or None."""
        return next((rule for rule in self.rules if rule.matches(layer_name)), None)


def _everywhere(fmt: str, activation: str = "BF16", gradient: str = "BF16") -> LayerRule:
    roles = {"weight": fmt, "activation": activation, "gradient": gradient}
    return LayerRule.model_validate({"pattern": "", **roles})


def _uniform(fmt: str) -> tuple[LayerRule, ...]:
    return (_everywhere(fmt),)


def _uniform_act(fmt: str) -> tuple[LayerRule, ...]:
    return (_everywhere(fmt, activation=fmt),)


def _uniform_full(fmt: str) -> tuple[LayerRule, ...]:
    own = get_format(fmt)
    is_e4m3 = (own.exponent_bits, own.mantissa_bits) == (4, 3)
    return (_everywhere(fmt, activation=fmt, gradient=own.in_split(5, 2).name if is_e4m3 else fmt),)


def _attention_bf16(fmt: str) -> tuple[LayerRule, ...]:
    return (LayerRule(pattern=ATTENTION_PATTERN), _everywhere(fmt))


def _mlp_bf16(fmt: str) -> tuple[LayerRule, ...]:
    return (LayerRule(pattern=MLP_PATTERN), _everywhere(fmt))


def _head_bf16(fmt: str) -> tuple[LayerRule, ...]:
    return (LayerRule(pattern=HEAD_PATTERN), _everywhere(fmt))


def _classic(fmt: str) -> tuple[LayerRule, ...]:
    """Formats by layer type, whatever format is asked: the head and c_proj BF16, qkv E5M2, the MLP E3M4."""
    return (
        LayerRule(pattern=HEAD_PATTERN),
        LayerRule(pattern=r"(^|\.)c_proj$"),
        LayerRule(pattern=ATTENTION_PATTERN, weight=as_role("E5M2")),
        LayerRule(pattern=MLP_PATTERN, weight=as_role("E3M4")),
        LayerRule(pattern=""),
    )


def _of_roles(weight: Role, activation: Role, gradient: Role) -> tuple[LayerRule, ...]:
    return (LayerRule(pattern="", weight=weight, activation=activation, gradient=gradient),)


def _hybrid(_: str) -> tuple[LayerRule, ...]:
    """E4M3 forward, E5M2 backward, delayed scales (Micikevicius et al. 2022, arXiv 2209.05433)."""
    delayed = ScaleRule(kind="delayed")
    forward, backward = (Role(format=name, scale=delayed) for name in ("E4M3", "E5M2"))
    return _of_roles(forward, forward, backward)


def _blocks(fmt: str, scale_format: BlockScale, *, stochastic: bool) -> Callable[[str], tuple[LayerRule, ...]]:
    """One block format in all three roles; gradients rounded stochastically where to nearest they are too biased."""
    own = Role(format=fmt, scale=ScaleRule(kind="block", block_scale_format=scale_format))
    gradient = own.model_copy(update={"rounding": "stochastic"}) if stochastic else own
    return lambda _: _of_roles(own, own, gradient)


POLICIES: Registry[Callable[[str], tuple[LayerRule, ...]]] = Registry(
    {
        "uniform": _uniform,
        "uniform_act": _uniform_act,
        "uniform_full": _uniform_full,
        "attention_bf16": _attention_bf16,
        "mlp_bf16": _mlp_bf16,
        "head_bf16": _head_bf16,
        "classic": _classic,
        "hybrid": _hybrid,
        "mxfp8": _blocks("E4M3", "E8M0", stochastic=False),
        "mxfp6": _blocks("E2M3", "E8M0", stochastic=False),
        "mxfp4": _blocks("E2M1", "E8M0", stochastic=True),
        "nvfp4": _blocks("E2M1", "E4M3", stochastic=True),
    }
)
"""Named policies: name to rules for a format. Of 32 elements that share a power of two (OCP Microscaling Formats 1.0)
those of `mxfp8`, `mxfp6` and `mxfp4`; of 16 that share an E4M3 scale those of `nvfp4`; 4-bit gradients are rounded
stochastically, since to nearest they are biased (Tseng et al. 2025, arXiv 2502.20586; NVIDIA 2025, 2509.25149)."""


@cache
def named_policy(name: str, fmt: str) -> PrecisionPolicy:
    """The named policy for a format; FP32 converts nothing. ValueError for an unknown policy or format."""
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=2, cutoff=0.3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"unknown policy {name!r}; allowed: {', '.join(POLICIES)}{hint}")
    if fmt.upper() == "FP32":
        return PrecisionPolicy()
    return PrecisionPolicy(rules=POLICIES[name](get_format(fmt).name))


def names_its_own_formats(name: str) -> bool:
    """Whether the named policy is the same whatever the format."""
    return named_policy(name, "E5M2") == named_policy(name, "E7M0")


def own_format(name: str) -> str | None:
    """The one format of weights that the named policy gives whatever is asked, as `mxfp8` does; None for any other."""
    own = {rule.weight.format for rule in named_policy(name, "E5M2").rules if rule.weight is not None}
    return own.pop() if names_its_own_formats(name) and len(own) == 1 else None


def same_spacings(first: PrecisionPolicy, second: PrecisionPolicy) -> bool:
    """Whether two policies give every layer the same weight format, whatever the scales, and what other roles take."""
    one, other = (
        (policy.embeddings, [(rule.pattern, rule.weight and rule.weight.format) for rule in policy.rules])
        for policy in (first, second)
    )
    return one == other
