"""Whole sweeps by name, and what a sweep's size means for each task.

A preset or a sweep file is written for one task. Asked for the other, everything that belongs to the task (model,
tokenizer, batch, steps, schedule and intervals) is that task's, in the same size; formats, arms and seeds stay.
Classification starts from documents by the hundred, in which 20 epochs of a small encoder are a few hundred steps;
its rate decays and its blocks' say is small because cross-validation over such documents wants both
(docs/bench/classify.md). The study's sizes are for the whole of EurLex, on a GPU.
"""

from __future__ import annotations

from typing import Any

from altgrad.sweep.space.axes import Constraint
from altgrad.sweep.space.declaration import ALL_FORMATS
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import UNQUANTIZED, ModelConfig, ObserveConfig, ScheduleConfig, TrainConfig

WIDER = ("E4M11", "E7M8")
"""16 bits with the exponent bits of E4M3 and E7M0, as FP16 has those of E5M2."""
RECIPES = ("uniform_full", "attention_bf16", "mlp_bf16", "head_bf16")
"""Gradients and activations in 8 bits too; one kind of layer after the other left in BF16."""

PRESETS: dict[str, SweepSpec] = {
    "quick": SweepSpec(),
    "standard": SweepSpec(
        name="format_ablation_standard",
        formats=(UNQUANTIZED, *ALL_FORMATS, *WIDER),
        optimizers=("adamw", "adamw_nearest", "adamw_sr", "manifold", "manifold_sr", "grid"),
        policies=("uniform", *RECIPES),
        constraints=(
            Constraint(
                name="recipes_with_adamw",
                when={"policy": RECIPES, "optimizer": ("adamw_nearest", "adamw_sr", "manifold", "manifold_sr", "grid")},
                reason="what a kind of layer costs is asked of AdamW over master weights",
            ),
            Constraint(
                name="recipes_in_8_bits",
                when={"policy": RECIPES, "format": ("FP16", *WIDER)},
                reason="layers are relieved of 8-bit formats",
            ),
            Constraint(
                name="wider_formats_with_adamw",
                when={"format": ("FP16", *WIDER), "optimizer": ("adamw_sr", "manifold", "manifold_sr", "grid")},
                reason="16 bits with as many exponent bits tell range from precision: AdamW's two arms do",
            ),
        ),
        lrs=(2e-3, 4e-3),
        seeds=3,
        base=TrainConfig(steps=300, eval_interval=50, observe=ObserveConfig(shadow_every=5)),
    ),
    "study": SweepSpec(
        name="format_ablation_study",
        formats=(UNQUANTIZED, *ALL_FORMATS),
        optimizers=("all",),
        lrs=(1e-3, 2e-3, 4e-3, 8e-3),
        seeds=6,
        base=TrainConfig(steps=2000, log_interval=20, eval_interval=100, checkpoint_interval=200),
    ),
}
"""Whole sweeps by name: three minutes on a laptop, an afternoon on a workstation, a cluster."""

CLASSIFY: dict[str, dict[str, Any]] = {
    "quick": {
        "model": ModelConfig(layers=1, heads=2, width=64, block=512, residual_scale=0.1),
        "data": {"batch": 8, "tokenizer": "words-8000"},
        "schedule": ScheduleConfig(kind="cosine"),
        "steps": 280,
        "log_interval": 20,
        "eval_interval": 140,
        "checkpoint_interval": 140,
    },
    "standard": {
        "model": ModelConfig(layers=1, heads=2, width=64, block=512, residual_scale=0.1),
        "data": {"batch": 8, "tokenizer": "words-8000"},
        "schedule": ScheduleConfig(kind="cosine"),
        "steps": 560,
        "log_interval": 20,
        "eval_interval": 140,
        "checkpoint_interval": 140,
    },
    "study": {
        "model": ModelConfig(layers=4, heads=4, width=256, block=512),
        "data": {"batch": 32, "tokenizer": "bpe-16384"},
        "steps": 6000,
        "log_interval": 50,
        "eval_interval": 500,
        "checkpoint_interval": 500,
    },
}
LM_FIELDS = ("model", "schedule", "steps", "log_interval", "eval_interval", "checkpoint_interval")


def for_task(spec: SweepSpec, task: str) -> SweepSpec:
    """The sweep for that task; itself where it is one already. Any other name is left to the validation."""
    base = spec.base
    if task == base.task or task not in ("lm", "classify"):
        return spec
    size = next((name for name, preset in PRESETS.items() if preset == spec), "quick")
    if task == "lm":
        preset = PRESETS[size].base
        shape = {name: getattr(preset, name) for name in LM_FIELDS}
        data = {name: getattr(preset.data, name) for name in ("batch", "tokenizer")}
    else:
        shape = dict(CLASSIFY[size])
        data = shape.pop("data")
    # Not validated yet: the flags that follow may be what makes it valid (pydoc has no labels).
    changed = {**shape, "task": task, "data": base.data.model_copy(update=data)}
    return spec.model_copy(update={"base": base.model_copy(update=changed)})
