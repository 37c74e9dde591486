"""Planted failures are told by their direction, kind of layer and first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from altgrad.analysis.layer_signals import layer_kind
from altgrad.analysis.records import load
from altgrad.analysis.study import build_study
from altgrad.analysis.why import signs_table
from altgrad.quantization import Role
from altgrad.quantization.roles import RoleQuantizer
from altgrad.quantization.scaling import ScaleRule
from altgrad.sweep.record.layer_table import read_layers
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.record.signs import Moment, as_text, first_moments, from_text
from altgrad.training import Trainer
from altgrad.training.reference import ReferenceCurve
from tests.training import faults
from tests.training.faults import AT, config


@pytest.fixture(scope="module")
def reference() -> ReferenceCurve:
    trainer = Trainer(config(format="BF16", guards=()))
    trainer.run()
    return ReferenceCurve.of_rows(trainer.rows)


def underflow(trainer: Trainer, step: int, layer: str = faults.MIDDLE, role: str = "gradient") -> None:
    """From the first step on the role's scale is so large that nearly everything rounds to zero."""
    module = trainer.model.get_submodule(layer)
    own = module.quantizers()[role].role  # type: ignore[operator]
    coarse = Role(format=own.format, scale=ScaleRule(headroom=2.0**30), rounding=own.rounding)
    setattr(module, f"{role}_quantizer", RoleQuantizer(coarse))


FULL = {"policy": "uniform_full"}
CASES = (
    ("NaN in a weight", faults.nan_weight, {}, "forward", "MLP up", AT),
    ("NaN in a gradient", faults.nan_gradient, {}, "backward", "MLP up", AT),
    ("NaN in the loss", faults.nan_loss, {}, "forward", "the loss", AT),
    ("infinite activation", faults.inf_activation, {}, "forward", "MLP up", AT),
    ("frozen layer", faults.frozen_layer, {}, "optimizer", "MLP up", 30),
    ("collapse of the head", faults.collapse, {}, "optimizer", "head", 30),
    ("collapse of a branch", faults.collapse_branch, {}, "optimizer", "MLP down", 30),
    ("learning rate x 100", None, {"lr": 0.2}, "optimizer", None, 10),
    ("bad activation scale", faults.bad_scale, FULL, "forward", "MLP up", 30),
    ("bad gradient scale", partial(faults.bad_scale, role="gradient"), FULL, "backward", "MLP up", 30),
    ("gradients that underflow", underflow, FULL, "backward", "MLP up", 10),
    ("activations that underflow", partial(underflow, role="activation"), FULL, "forward", "MLP up", 10),
    ("E7M0 to nearest", None, {"arm": "adamw_nearest", "format": "E7M0"}, "optimizer", None, 10),
)


@pytest.mark.parametrize(
    ("plant", "changes", "direction", "kind", "step"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_planted_failure_is_told_by_its_first_sign(
    plant: Callable[[Trainer, int], None] | None,
    changes: dict[str, Any],
    direction: str,
    kind: str | None,
    step: int,
    reference: ReferenceCurve,
    tmp_path: Path,
) -> None:
    trial = config(**changes)
    name = trial.trial_id("planted")
    trainer = Trainer(trial, folder=tmp_path / "trials" / name, reference=reference)
    if plant is not None:
        plant(trainer, AT)
    trainer.run()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials({name: trial}, "planted")
        Recorder(ledger, tmp_path / "trials").ingest([name])
    table = signs_table(build_study(load(tmp_path).trials))
    (line,) = table.lines
    said = dict(zip(table.columns, line, strict=True))
    assert (said["direction"], said["step"]) == (direction, str(step)), said
    assert kind in (None, said["layer type"]), said


@pytest.mark.parametrize("format", ["BF16", "E4M3", "E5M2"])
@pytest.mark.parametrize("policy", ["uniform", "uniform_full"])
def test_a_healthy_run_shows_no_sign(format: str, policy: str, reference: ReferenceCurve, tmp_path: Path) -> None:
    Trainer(config(format=format, policy=policy), folder=tmp_path / "trial", reference=reference).run()
    assert first_moments(read_layers(tmp_path / "trial")) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lm_head", "head"),
        ("classifier", "head"),
        ("transformer.wte", "embedding"),
        ("model.embed_tokens", "embedding"),
        ("bert.embeddings.word_embeddings", "embedding"),
        ("transformer.h.0.attn.c_attn", "attention in"),
        ("transformer.h.0.attn.c_proj", "attention out"),
        ("transformer.h.0.mlp.c_fc", "MLP up"),
        ("transformer.h.0.mlp.c_proj", "MLP down"),
        ("model.layers.3.self_attn.q_proj", "attention in"),
        ("model.layers.3.self_attn.o_proj", "attention out"),
        ("model.layers.3.mlp.gate_proj", "MLP up"),
        ("model.layers.3.mlp.down_proj", "MLP down"),
        ("bert.encoder.layer.0.attention.self.query", "attention in"),
        ("bert.encoder.layer.0.attention.output.dense", "attention out"),
        ("bert.encoder.layer.0.intermediate.dense", "MLP up"),
        ("bert.encoder.layer.0.output.dense", "MLP down"),
        ("distilbert.transformer.layer.0.attention.q_lin", "attention in"),
        ("distilbert.transformer.layer.0.ffn.lin2", "MLP down"),
        ("pooler.dense", "other"),
        ("", "the loss"),
    ],
)
def test_layers_are_known_by_their_names(name: str, kind: str) -> None:
    assert layer_kind(name) == kind


def test_what_a_ledger_says_is_held_against_the_rules_of_now() -> None:
    seen = [Moment("gradient_underflow", "lm_head", 10, 0.5), Moment("flip_yield", "lm_head", 20, 0.1)]
    assert from_text(as_text([*seen, Moment("no_rule", "", 5, 1.0)])) == seen[1:]
