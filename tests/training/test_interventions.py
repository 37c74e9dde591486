"""An intervention changes the trajectory when it fires, and only then; a shift leaves a mended run behind."""

import pytest
import torch
from faults import MIDDLE, at_step, inf_activation, nan_weight, weight_of
from pydantic import ValidationError

from altgrad.training import ARMS, TrainConfig, Trainer
from altgrad.training.record import read_rows


def config(arm: str = "adamw", *interventions: dict, **changes) -> TrainConfig:
    base = {
        "model": {"layers": 2, "heads": 2, "width": 32, "block": 32},
        "data": {"batch": 4, "eval_batches": 1},
        "steps": 40,
        "log_interval": 5,
        "eval_interval": 10,
        "checkpoint_interval": 10,
        "format": "E4M3",
        "optimizer": ARMS[arm].model_dump(),
        "interventions": interventions,
    }
    return TrainConfig(**(base | changes))


def losses(trainer: Trainer) -> list[float]:
    trainer.run()
    return [row["train_loss"] for row in trainer.rows]


def spike(trainer: Trainer, step: int, factor: float = 1e4) -> None:
    def enlarge() -> None:
        hook = weight_of(trainer, MIDDLE).register_hook(lambda gradient: gradient * factor)
        at_step(trainer, step + 1, hook.remove)

    at_step(trainer, step, enlarge)


CLIP = {"kind": "partition_clip", "factor": 1e6}
TIGHT = {"kind": "partition_clip", "factor": 4}
SHIFT = {"kind": "format_shift"}


@pytest.mark.parametrize("arm", ["adamw", "adamw_sr", "grid", "manifold"])
def test_an_intervention_that_does_not_fire_changes_nothing(arm):
    plain = losses(Trainer(config(arm)))
    declared = Trainer(config(arm, CLIP, SHIFT))
    assert losses(declared) == plain
    assert all(row["clipped_tensors"] == 0 and row["clip_factor"] == 1 for row in declared.rows)
    assert not any("shifts" in row for row in declared.rows)


@pytest.mark.parametrize("arm", ["adamw", "grid"])
def test_a_clip_changes_the_run_from_the_step_at_which_it_fires(arm):
    runs = {}
    for name, declared in (("plain", ()), ("clipped", (TIGHT,))):
        trainer = Trainer(config(arm, *declared))
        spike(trainer, 20)
        runs[name] = losses(trainer), trainer.rows
    fired = [row["step"] for row in runs["clipped"][1] if row["clipped_tensors"]]
    first = fired[0]
    assert 20 in fired and runs["clipped"][1][19]["clip_factor"] < 1e-2
    pairs = list(zip(runs["plain"][0], runs["clipped"][0], strict=True))
    assert all(a == b for a, b in pairs[:first]) and pairs[first][0] != pairs[first][1]
    assert runs["clipped"][1][19]["grad_norm"] == runs["plain"][1][19]["grad_norm"] or first < 20


@pytest.mark.parametrize("arm", ["adamw_nearest", "adamw", "grid", "manifold_sr"])
def test_a_stalled_layer_gets_a_mantissa_bit_and_the_outcome_names_both_formats(arm):
    rule = {"kind": "format_shift", "rules": ["flip_yield/min < 1e9 for 2 after 10"]}
    trainer = Trainer(config(arm, rule, guards=()))
    plain = losses(Trainer(config(arm, guards=())))
    mended = losses(trainer)
    shifted = [row for row in trainer.rows if "shifts" in row]
    assert shifted[0]["step"] == 20
    assert mended[:20] == plain[:20] and mended[20:] != plain[20:]
    layer, label = shifted[0]["shifts"][0].split(": ")
    assert label == "E4M3->E3M4" and f"{layer}: {label}" in trainer.outcome.formats
    formats = {name: fmt.name for name, (_, fmt) in trainer.formats.items()}
    assert formats[layer] != "E4M3" and sum(name != "E4M3" for name in formats.values()) <= len(shifted)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_an_infinite_activation_shifts_its_layer_instead_of_ending_the_run():
    trainer = Trainer(config("adamw", SHIFT))
    inf_activation(trainer, 12)
    assert trainer.run().kind == "done"
    assert trainer.outcome.formats == f"{MIDDLE}: E4M3->E5M2"


def test_the_ladder_ends_in_float32_and_then_the_guards_decide():
    trainer = Trainer(config("adamw", SHIFT, steps=80))
    nan_weight(trainer, 12)
    outcome = trainer.run()
    assert (outcome.kind, outcome.layer) == ("nonfinite", MIDDLE)
    assert outcome.formats.endswith("->FP32") and "lm_head" not in outcome.formats


@pytest.mark.parametrize("arm", ["adamw", "grid", "manifold_sr"])
def test_a_run_resumed_behind_a_shift_equals_the_uninterrupted_one_bitwise(arm, tmp_path):
    rule = {"kind": "format_shift", "rules": ["flip_yield/min < 1e9 for 2 after 10"]}
    own = config(arm, TIGHT, rule, guards=())
    straight = Trainer(own, folder=tmp_path / "straight")
    straight.run()
    cut = Trainer(own, folder=tmp_path / "cut").intervals()
    for _ in range(7):  # recorded to step 35, checkpoint at 30, shifts at 20 and 30
        next(cut)
    cut.close()
    resumed = Trainer(own, folder=tmp_path / "cut")
    resumed.run()
    assert resumed.resumed_from == 30
    rows = [
        [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_rows(t.folder.metrics_path)[0]]
        for t in (straight, resumed)
    ]
    assert str(rows[0]) == str(rows[1])
    assert straight.outcome.formats == resumed.outcome.formats


def test_interventions_are_part_of_the_identity_and_their_absence_is_not():
    ids = {config("adamw", *declared).trial_id("d") for declared in ((), (CLIP,), (TIGHT,), (SHIFT,))}
    assert len(ids) == 4
    assert "interventions" not in config().identity("d")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (({"kind": "partition_clip", "factor": 1.0},), "factor"),
        ((CLIP, TIGHT), "more than once"),
        (({"kind": "shift"},), "format_shift"),
        (({"kind": "format_shift", "rules": ["spread < 0.1"]},), "shifts nothing"),
        (({"kind": "format_shift", "rules": ()},), "rules"),
    ],
)
def test_a_bad_declaration_is_refused(declared, message):
    with pytest.raises(ValidationError, match=message):
        config("adamw", *declared)


def test_a_guard_on_what_is_not_measured_is_refused():
    with pytest.raises(ValidationError, match="shadow_every"):
        config(guards=("gradient_cosine < 0.5",))
