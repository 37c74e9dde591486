"""Recipes as axes: scales, roundings and block sizes can be swept; what means nothing is left out and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from altgrad.analysis.report import write_report
from altgrad.cli import main
from altgrad.quantization import named_policy, own_format
from altgrad.sweep.space.resolve import resolve
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training import Trainer
from altgrad.training.config import TrainConfig
from tests.sweep.trained import SPEC, train

SCALES = """
formats: E4M3
optimizers: adamw
policies: [uniform_full, hybrid]
axes:
  recipe.weight.scale.kind: [current, delayed, per_channel, block]
  recipe.gradient.rounding: [nearest, stochastic]
constraints:
  - {name: hybrid_as_it_is, when: {policy: hybrid, recipe.weight.scale.kind: [per_channel, block, current]}}
"""
BLOCKS = """
formats: E4M3
optimizers: adamw
recipe: {weight: {scale: {kind: block}}}
axes: {recipe.weight.scale.block: [16, 32, 64, 128]}
"""


def of(tmp_path: Path, text: str, **more: Any) -> SweepSpec:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return resolve(SPEC, more, tmp_path / "mine.yaml")


def cells(spec: SweepSpec) -> list[TrainConfig]:
    return [trial for trial in spec.expand() if not trial.is_reference and trial.seed == spec.first_seed]


def test_scales_and_roundings_are_axes(tmp_path: Path) -> None:
    spec = of(tmp_path, SCALES)
    names = [trial.recipe_name for trial in cells(spec)]
    assert names == [
        "uniform_full",
        "uniform_full, gradient stochastic",
        "uniform_full, weight delayed",
        "uniform_full, weight delayed, gradient stochastic",
        "uniform_full, weight per-channel",
        "uniform_full, weight per-channel, gradient stochastic",
        "uniform_full, weight block 32",
        "uniform_full, weight block 32, gradient stochastic",
        "hybrid",
        "hybrid, gradient stochastic",
    ]
    assert len([trial for trial in spec.expand() if trial.is_reference]) == spec.seeds, "recipes need no own reference"
    weights = {trial.recipe_name: trial.precision.rules[0].weight for trial in cells(spec)}
    assert weights["uniform_full, weight block 32"].scale.kind == "block"
    assert len({trial.trial_id("") for trial in spec.expand()}) == 11 * spec.seeds


def test_block_sizes_are_an_axis(tmp_path: Path) -> None:
    names = [trial.recipe_name for trial in cells(of(tmp_path, BLOCKS))]
    assert names == [f"uniform, weight block {size}" for size in (16, 32, 64, 128)]


def test_whether_embeddings_are_quantized_is_an_axis(tmp_path: Path) -> None:
    text = "{formats: E4M3, optimizers: manifold, steps: 2, axes: {recipe.embeddings: [false, true]}}"
    trials = cells(of(tmp_path, text))
    assert [trial.recipe_name for trial in trials] == ["uniform", "uniform, embeddings"]
    shares = []
    for trial in trials:
        trainer = Trainer(trial)
        trainer.run()
        shares.append(trainer.rows[-1]["quantized_share"])
        assert ("transformer.wpe" in trainer.formats) == trial.recipe.embeddings
    assert 0.9 < shares[0] < shares[1] < 1


@pytest.mark.parametrize("name", ["MXFP8", "MXFP6", "MXFP4", "NVFP4"])
def test_block_formats_are_formats(name: str) -> None:
    spec = SweepSpec.model_validate(
        SPEC.model_dump() | {"formats": [name, "E5M2"], "optimizers": ["adamw", "manifold"]}
    )
    found = {(trial.format, trial.arm, trial.policy) for trial in cells(spec)}
    own = own_format(name.lower())
    assert found == {(own, "adamw", name.lower()), ("E5M2", "adamw", "uniform"), ("E5M2", "manifold", "uniform")}
    (rule,) = (item for item in spec.exclusions() if item.rule == "one_scale_per_tensor")
    assert rule.trials == spec.seeds
    assert named_policy(name.lower(), own).rules[0].weight.format == own


def test_a_recipe_at_its_default_changes_no_id() -> None:
    config = TrainConfig()
    assert "recipe" not in config.identity("")
    assert TrainConfig(recipe={"weight": {}}).trial_id("") == config.trial_id("")
    assert TrainConfig(recipe={"weight": {"rounding": "stochastic"}}).trial_id("") != config.trial_id("")


def test_what_is_the_same_training_runs_once_and_is_counted() -> None:
    axes = {"recipe.weight.scale.kind": ["current", "per_channel"]}
    values = SPEC.model_dump() | {"formats": ["BF16", "E5M2"], "optimizers": ["adamw", "adamw_sr", "manifold_fp32"]}
    spec = SweepSpec.model_validate(values | {"axes": axes, "seeds": 1})
    ran = [(trial.format, trial.arm, trial.recipe_name) for trial in spec.expand()]
    assert ran == [
        ("BF16", "adamw", "uniform"),
        ("BF16", "adamw_sr", "uniform"),
        ("BF16", "manifold_fp32", "uniform"),
        ("E5M2", "adamw", "uniform"),
        ("E5M2", "adamw", "uniform, weight per-channel"),
        ("E5M2", "adamw_sr", "uniform"),
        ("E5M2", "manifold_fp32", "uniform"),
    ]
    counts = {item.rule: item.trials for item in spec.exclusions()}
    assert counts == {"recipe_changes_nothing": 4, "one_scale_per_tensor": 1}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "axes: {recipe.weight.scale.knd: [block]}",
            ["'recipe.weight.scale.knd' is no axis", "recipe.weight.scale.kind"],
        ),
        ("axes: {recipe.weight.scale.kind: [blok]}", ["recipe.weight.scale.kind", "'blok'"]),
        ("axes: {recipe.weight.format: [E9M9]}", ["recipe.weight.format", "E9M9"]),
        ("recipe: {weight: {scale: {block: 16}}}", ["recipe.weight.scale", "means nothing to a 'current' scale"]),
        ("recipe: {wight: {}}", ["recipe.wight"]),
        (
            "recipe: {rules: [{pattern: 'atn\\.c_attn', weight: E4M3}]}",
            ["recipe.rules: rule 'atn", "matches no layer", "nearest: transformer.h.", "attn.c_attn"],
        ),
        ("formats: MXFP9", ["'MXFP9' is no usable format", "MXFP8"]),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(
    text: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    head = "" if "formats" in text else "formats: E4M3\n"
    (tmp_path / "mine.yaml").write_text(f"{head}optimizers: adamw\n{text}\n", encoding="utf-8")
    assert main(["run", "mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error


def test_recipes_are_told_apart_in_the_report(tmp_path: Path) -> None:
    spec = of(tmp_path, SCALES, seeds=1)
    out = train(tmp_path / "sweep", spec)
    write_report(out)
    table = pd.read_csv(out / "report" / "results.csv")
    own = table[table["policy"] != "uniform"]
    assert own["val_loss"].nunique() == len(own) == 10, "ten trainings"
    assert set(own["recipe.weight.scale.kind"].dropna()) == {"delayed", "per_channel", "block"}
    assert set(own["recipe.gradient.rounding"].dropna()) == {"stochastic"}
    text = (out / "report" / "report.md").read_text(encoding="utf-8")
    assert all(name in text for name in own["policy"])
    assert table["quantized_share"].between(0.5, 1).all() and "of the parameters are quantized under hybrid" in text
