"""Each planted fault is caught by the right guard, in the right layer, in time; and healthy runs are left alone."""

import pytest
from faults import (
    AT,
    BRANCH,
    HEAD,
    MIDDLE,
    bad_scale,
    collapse,
    collapse_branch,
    config,
    frozen_layer,
    inf_activation,
    nan_gradient,
    nan_loss,
    nan_weight,
)

from altgrad.training import Trainer
from altgrad.training.reference import ReferenceCurve


@pytest.fixture(scope="module")
def reference() -> ReferenceCurve:
    trainer = Trainer(config(format="BF16", guards=()))
    trainer.run()
    return ReferenceCurve.of_rows(trainer.rows)


def verdict_of(trainer: Trainer):
    outcome = trainer.run()
    return str(outcome.kind), outcome.signal, outcome.layer, outcome.step


@pytest.mark.parametrize("arm", ["adamw", "adamw_sr", "grid"])
@pytest.mark.parametrize("layer", [MIDDLE, BRANCH])
@pytest.mark.parametrize(
    ("plant", "signal"), [(nan_weight, "train_loss"), (inf_activation, "train_loss"), (nan_gradient, "grad_norm")]
)
def test_what_is_not_finite_is_caught_at_its_step_and_names_its_layer(arm, layer, plant, signal):
    trainer = Trainer(config(arm))
    plant(trainer, AT, layer)
    assert verdict_of(trainer) == ("nonfinite", signal, layer, AT)
    assert trainer.rows[-1]["step"] == 30


def test_a_nan_in_the_loss_alone_names_no_layer():
    trainer = Trainer(config())
    nan_loss(trainer, AT)
    assert verdict_of(trainer) == ("nonfinite", "train_loss", None, AT)


def test_a_nan_in_a_tied_head_names_the_layer_that_meets_it_first():
    trainer = Trainer(config())
    nan_weight(trainer, AT, HEAD)
    kind, signal, layer, step = verdict_of(trainer)
    assert (kind, signal, step) == ("nonfinite", "train_loss", AT) and layer in (HEAD, "transformer.wte")


@pytest.mark.parametrize("arm", ["adamw", "adamw_sr", "manifold", "grid", "lion"])
def test_a_layer_to_which_nothing_is_applied_is_caught_within_three_checks(arm):
    trainer = Trainer(config(arm))
    frozen_layer(trainer, AT - 3)
    assert verdict_of(trainer) == ("stalled", "frozen", MIDDLE, 40)


@pytest.mark.parametrize(("plant", "layer"), [(collapse, HEAD), (collapse_branch, BRANCH)])
@pytest.mark.parametrize("arm", ["adamw", "grid", "manifold_sr"])
def test_a_collapse_to_rank_one_is_caught_within_five_checks(plant, layer, arm, reference):
    trainer = Trainer(config(arm), reference=reference)
    plant(trainer, AT)
    kind, signal, where, step = verdict_of(trainer)
    assert (kind, signal, where) == ("rank_collapse", "spread_ratio/min", layer) and AT < step <= AT + 50


@pytest.mark.parametrize("arm", ["adamw", "grid", "manifold_sr"])
def test_a_learning_rate_a_hundred_times_too_high_is_caught_within_three_checks(arm, reference):
    trainer = Trainer(config(arm, lr=0.2), reference=reference)
    kind, signal, layer, step = verdict_of(trainer)
    assert (kind, signal) == ("diverged", "spectral_ratio/max") and step <= 30 and layer is not None


def test_a_format_too_coarse_for_rounding_to_nearest_is_caught_in_the_first_half(reference):
    kind, signal, layer, step = verdict_of(Trainer(config("adamw_nearest", "E7M0"), reference=reference))
    assert (kind, signal) == ("stalled", "flip_yield") and step <= 50 and layer is not None


@pytest.mark.parametrize("role", ["activation", "gradient", "weight"])
def test_overflow_from_a_bad_scale_is_caught_within_three_checks(role):
    trainer = Trainer(config(policy="uniform_full"))
    bad_scale(trainer, AT, role=role)
    assert verdict_of(trainer) == ("diverged", f"{role}_overflow/max", MIDDLE, 50)


@pytest.mark.parametrize("arm", ["adamw", "adamw_sr", "manifold", "grid", "eco"])
@pytest.mark.parametrize("format_name", ["E3M4", "E5M2"])
def test_healthy_runs_are_left_alone(arm, format_name, reference):
    trainer = Trainer(config(arm, format_name, policy="uniform_act"), reference=reference)
    assert trainer.run().kind == "done"
    assert trainer.rows[-1]["loss_gap"] < 0.1


def test_without_a_reference_its_rules_are_off_and_the_record_says_so(tmp_path):
    import json

    trainer = Trainer(config(steps=10, eval_interval=10, checkpoint_interval=10), folder=tmp_path / "t")
    assert trainer.run().kind == "done"
    assert not [name for row in trainer.rows for name in row if name.endswith("_ratio") and name.startswith("sp")]
    assert json.loads((tmp_path / "t" / "config.json").read_text())["reference"] is None
