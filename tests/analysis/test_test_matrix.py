"""TEST_MATRIX.md is what the registries say, and says the numbers that the world agrees on."""

from __future__ import annotations

from pathlib import Path

from altgrad.analysis.test_matrix import COVERED_BY, combinations, layer_types, render
from altgrad.quantization import FORMATS
from altgrad.training.arm_configs import ARMS

ROOT = Path(__file__).parents[2]


def test_the_file_is_current() -> None:
    assert (ROOT / "TEST_MATRIX.md").read_text() == render(), "run `altgrad test-matrix`"


def test_published_numbers_stand_in_it() -> None:
    text = render()
    for line in (
        "| E5M2 | ieee | 8 | 15 | 57344 | 2^-14 | 2^-16 | 256 | yes | yes |",
        "| E4M3 | fn | 8 | 7 | 448 | 2^-6 | 2^-9 | 256 | no | yes |",
        "| E0M7 | finite | 8 | – | 0.9921875 | – | 2^-7 | 256 | no | no |",
        "| E7M0 | finite | 8 | 63 | 1.844674407e+19 | 2^-62 | – | 256 | no | no |",
    ):
        assert line in text


def test_critical_layers_have_half_the_threshold() -> None:
    text = render()
    assert "| wte | Embedding | yes | 0.15 |" in text, "its weight is the head's"
    for name in ("lm_head", "attn.c_proj", "mlp.c_proj"):
        assert f"| {name} | Linear | yes | 0.15 |" in text
    assert "| mlp.c_fc | Linear | yes | 0.30 |" in text


def test_every_combination_is_listed_and_has_a_test() -> None:
    assert (ROOT / COVERED_BY).is_file()
    converted = [layer for layer in layer_types() if layer.excluded is None]
    needed = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head"}
    assert {layer.short for layer in converted} >= needed
    assert len(combinations()) == len(FORMATS) * len(ARMS) * len(converted)
    assert render().count("✓") == len(combinations()) + 1
