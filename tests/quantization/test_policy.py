import pytest
from pydantic import ValidationError

from altgrad.quantization import POLICIES, LayerRule, PrecisionPolicy, Recipe, named_policy

LAYERS = [
    "transformer.h.0.attn.c_attn",
    "transformer.h.0.attn.c_proj",
    "transformer.h.0.mlp.c_fc",
    "transformer.h.0.mlp.c_proj",
    "lm_head",
    "classifier",
]


def weights(policy: PrecisionPolicy) -> list[str | None]:
    rules = [policy.resolve(name) for name in LAYERS]
    return [rule.weight and str(rule.weight) if rule else "untouched" for rule in rules]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", ["E4M3"] * 6),
        ("uniform_act", ["E4M3"] * 6),
        ("uniform_full", ["E4M3"] * 6),
        ("attention_bf16", [None, None, "E4M3", "E4M3", "E4M3", "E4M3"]),
        ("head_bf16", ["E4M3"] * 4 + [None, None]),
        ("classic", ["E5M2", None, "E3M4", None, None, None]),
    ],
)
def test_named_policies(name, expected):
    assert weights(named_policy(name, "E4M3")) == expected
    assert named_policy(name, "FP32") == PrecisionPolicy()


@pytest.mark.parametrize(
    ("name", "fmt", "activation", "gradient"),
    [
        ("uniform", "E3M4", "BF16", "BF16"),
        ("uniform_act", "E3M4", "E3M4", "BF16"),
        ("uniform_full", "E3M4", "E3M4", "E3M4"),
        ("uniform_full", "E4M3", "E4M3", "E5M2"),
        ("uniform_full", "E4M3/fnuz", "E4M3/fnuz", "E5M2/fnuz"),
    ],
)
def test_roles_of_the_uniform_policies(name, fmt, activation, gradient):
    rule = named_policy(name, fmt).resolve("anything")
    assert (str(rule.activation), str(rule.gradient)) == (activation, gradient)


def test_the_first_match_wins():
    policy = PrecisionPolicy(
        rules=(LayerRule(pattern="c_proj", weight="E5M2"), LayerRule(pattern="mlp", weight="E3M4"))
    )
    assert policy.resolve("h.0.mlp.c_proj").weight.format == "E5M2"
    assert policy.resolve("h.0.mlp.c_fc").weight.format == "E3M4"
    assert policy.resolve("lm_head") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "(", "weight": "E4M3"}, "regular expression"),
        ({"pattern": "", "weight": "E4M3z"}, "nearest: E4M3"),
        ({"pattern": "", "wieght": "E4M3"}, "wieght"),
        ({"pattern": "", "gradient": "FP31"}, "FP16"),
    ],
)
def test_bad_rules_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        LayerRule(**fields)


def test_unknown_policies_name_the_nearest():
    with pytest.raises(ValueError, match="nearest: uniform"):
        named_policy("unifrom", "E4M3")
    with pytest.raises(ValueError, match="E4M3"):
        named_policy("uniform", "E4M3q")
    assert set(POLICIES) == {
        "uniform",
        "uniform_act",
        "uniform_full",
        "attention_bf16",
        "mlp_bf16",
        "head_bf16",
        "classic",
        "hybrid",
        "mxfp8",
        "mxfp6",
        "mxfp4",
        "nvfp4",
    }


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("hybrid", ("E4M3 delayed", "E4M3 delayed", "E5M2 delayed")),
        ("mxfp8", ("E4M3 block 32",) * 3),
        ("mxfp6", ("E2M3 block 32",) * 3),
        ("mxfp4", ("E2M1 block 32", "E2M1 block 32", "E2M1 block 32 stochastic")),
        ("nvfp4", ("E2M1 block 16 E4M3", "E2M1 block 16 E4M3", "E2M1 block 16 E4M3 stochastic")),
    ],
)
def test_recipes_of_the_field_by_name(name: str, roles: tuple[str, str, str]) -> None:
    (rule,) = named_policy(name, "E5M2").rules
    named = [(role.format, str(role.scale), role.rounding) for role in (rule.weight, rule.activation, rule.gradient)]
    assert tuple(f"{name} {scale}{' stochastic' * (how == 'stochastic')}" for name, scale, how in named) == roles


def test_a_recipe_changes_what_it_names_in_the_layers_that_are_quantized() -> None:
    recipe = Recipe.model_validate(
        {"weight": {"scale": {"kind": "block", "block": 64}}, "gradient": {"format": "E5M2"}}
    )
    policy = recipe.applied(named_policy("attention_bf16", "E4M3"))
    kept, own = policy.resolve("h.0.attn.c_attn"), policy.resolve("h.0.mlp.c_fc")
    assert kept == named_policy("attention_bf16", "E4M3").resolve("h.0.attn.c_attn")
    assert (str(own.weight), str(own.activation), str(own.gradient)) == ("E4M3 block", "BF16", "E5M2")
    assert str(own.weight.scale) == "block 64"
    assert str(recipe) == "weight block 64, gradient E5M2" and not recipe.is_plain
    assert Recipe().applied(policy) is policy
    mine = Recipe.model_validate({"rules": [{"pattern": "head$", "weight": "E5M2"}, {"pattern": ""}]})
    assert [rule.pattern for rule in mine.applied(policy).rules] == ["head$", ""]
