"""Laws of training, held on the real loop: determinism, observers, resume, identity, the twin formats."""

from pathlib import Path

import pytest
import torch

from altgrad.quantization import quantize, quantized_parameters
from altgrad.training import ARMS, TrainConfig, Trainer
from altgrad.training.record import TrialFolder, read_rows

TINY = {
    "model": {"layers": 1, "heads": 2, "width": 32, "block": 32},
    "data": {"batch": 4, "eval_batches": 1},
    "log_interval": 5,
    "eval_interval": 10,
    "checkpoint_interval": 10,
}


def config(arm: str = "adamw", **changes) -> TrainConfig:
    return TrainConfig(**({**TINY, "optimizer": ARMS[arm].model_dump(), "steps": 20} | changes))


def losses(trainer: Trainer) -> list[float]:
    trainer.run()
    return [row["train_loss"] for row in trainer.rows] + [trainer.outcome.val_loss]


@pytest.mark.parametrize("arm", ARMS)
def test_equal_configurations_give_equal_losses_bitwise(arm):
    assert losses(Trainer(config(arm))) == losses(Trainer(config(arm)))


@pytest.mark.parametrize(("arm", "name"), [*((arm, "E5M2") for arm in ARMS), ("adamw", "BF16")])
def test_observers_on_equals_observers_off_bitwise(arm, name):
    """A reference (BF16) has one more: of what other formats would make of it."""
    always = {"exact_ranks_every": 1, "detail_every": 1, "shadow_every": 1}
    own = config(arm, format=name, steps=100, eval_interval=50, checkpoint_interval=50, guards=(), observe=always)
    on, off = Trainer(own), Trainer(own, observe=False)
    assert losses(on) == losses(off)
    pairs = zip(on.model.state_dict().values(), off.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "manifold_gradient"])
def test_e0m7_and_e1m6_are_one_training_run(arm):
    one, other = (losses(Trainer(config(arm, format=name, steps=40))) for name in ("E0M7", "E1M6"))
    assert one == other


def test_the_twin_law_can_fail():
    assert losses(Trainer(config(format="E0M7"))) != losses(Trainer(config(format="E2M5")))


@pytest.mark.parametrize("arm", ARMS)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(arm, tmp_path: Path):
    straight = Trainer(config(arm, steps=30), folder=tmp_path / "straight")
    straight.run()
    first = Trainer(config(arm, steps=30), folder=tmp_path / "cut").intervals()
    for _ in range(5):  # 25 steps are recorded; the checkpoint is at 20
        next(first)
    first.close()
    resumed = Trainer(config(arm, steps=30), folder=tmp_path / "cut")
    resumed.run()
    assert resumed.resumed_from == 20
    volatile = {"tokens_per_s"}
    rows = [
        [{k: v for k, v in row.items() if k not in volatile} for row in read_rows(t.folder.metrics_path)[0]]
        for t in (straight, resumed)
    ]
    assert [row["step"] for row in rows[1]] == list(range(1, 31))
    assert str(rows[0]) == str(rows[1])
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_longer_run_continues_where_the_shorter_one_ended(tmp_path: Path):
    Trainer(config(steps=20), folder=tmp_path / "t").run()
    longer = Trainer(config(steps=40), folder=tmp_path / "t")
    longer.run()
    assert longer.resumed_from == 20
    straight = Trainer(config(steps=40))
    straight.run()
    assert longer.outcome.val_loss == straight.outcome.val_loss


def test_a_finished_run_trains_nothing_when_started_again(tmp_path: Path):
    done = Trainer(config(), folder=tmp_path / "t").run()
    again = Trainer(config(), folder=tmp_path / "t")
    assert again.run().val_loss == done.val_loss and again.rows == []


@pytest.mark.parametrize("name", ["E0M7", "E3M4", "E5M2", "E7M0", "BF16"])
@pytest.mark.parametrize("arm", ["adamw_nearest", "adamw_sr", "manifold_sr", "grid", "grid_literal"])
def test_layers_leave_resident_weights_as_they_are(arm, name):
    trainer = Trainer(config(arm, format=name, guards=()))
    trainer.run()
    changed = sum(
        int((quantize(p.detach(), fmt, p.grid.scale) != p.detach()).sum())
        for p, fmt in quantized_parameters(trainer.model).values()
    )
    assert changed == 0
    assert len(quantized_parameters(trainer.model)) == 5


@pytest.mark.parametrize("format_name", ["FP32", "BF16"])
def test_the_references_learn(format_name):
    trainer = Trainer(
        TrainConfig(
            format=format_name,
            steps=80,
            log_interval=20,
            eval_interval=80,
            checkpoint_interval=80,
            data={"batch": 8, "eval_batches": 2},
        )
    )
    outcome = trainer.run()
    assert trainer.rows[0]["train_loss"] - outcome.val_loss > 2


def test_a_hopeless_learning_rate_ends_with_a_verdict_and_a_checkpoint(tmp_path: Path):
    hopeless = config(optimizer={"kind": "adamw", "lr": 1e6}, steps=100)
    trainer = Trainer(hopeless, folder=tmp_path / "t")
    outcome = trainer.run()
    assert outcome.kind in ("nonfinite", "diverged") and outcome.step < 100
    assert outcome.signal and outcome.message
    assert (TrialFolder(tmp_path / "t").checkpoint_path / "state.pt").exists()


def test_the_identity_holds_what_changes_numbers_and_nothing_else():
    base = config()
    same = [
        config(steps=500),
        config(guards=()),
        config(log_interval=10),
        config(data={"batch": 4, "eval_batches": 1, "source": "elsewhere"}),
    ]
    assert {c.trial_id("d") for c in same} == {base.trial_id("d")}
    other = [
        config(seed=1),
        config(format="E4M3"),
        config("manifold"),
        config(policy="head_bf16"),
        config(optimizer={"kind": "adamw", "lr": 1e-3}),
        config(schedule={"kind": "cosine"}),
        config(schedule={"kind": "cosine"}, steps=500),
        config(data={"batch": 8, "eval_batches": 1}),
    ]
    ids = {c.trial_id("d") for c in other} | {base.trial_id("e"), base.trial_id("d")}
    assert len(ids) == len(other) + 2
