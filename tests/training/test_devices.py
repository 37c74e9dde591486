"""A training step keeps to the model's device and waits for nothing: shown without a GPU, on torch's `meta` device.

A tensor there has a device and no data, so an operation that mixes devices raises, and so does one that asks for a
value: on a GPU the second would be a host sync.
"""

from __future__ import annotations

import pytest

from altgrad.training import ARMS, TrainConfig, Trainer


class NoKernel:
    """Steps nothing: the reference asks for values, the Triton kernels need a GPU."""

    @staticmethod
    def step_tensors(jobs, plan, call, counts) -> None:
        assert {job.weight.device.type for job in jobs} == {counts.device.type} == {"meta"}


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    monkeypatch.setattr("altgrad.training.optimizer.kernel_for", lambda job: NoKernel)


CASES = [
    ("adamw", "E4M3", "uniform"),
    ("adamw", "FP32", "uniform"),
    ("adamw_sr", "E4M3", "uniform_full"),
    ("manifold", "E5M2", "uniform_act"),
    ("manifold_fp32", "E3M4", "uniform"),
    ("grid", "E0M7", "head_bf16"),
    ("lion", "E7M0", "classic"),
    ("madam", "E6M1", "uniform"),
    ("muon", "BF16", "attention_bf16"),
]


# How operands are carried does not depend on the arm: half of the cases each way.
@pytest.mark.parametrize(
    ("arm", "format_name", "policy", "carrier"),
    [(*case, ("float32", "bfloat16")[place % 2]) for place, case in enumerate(CASES)],
)
def test_steps_and_checks_stay_on_the_device(arm, format_name, policy, carrier, monkeypatch):
    if carrier == "bfloat16":
        for module in ("products", "layer_products"):
            monkeypatch.setattr(f"altgrad.quantization.{module}.BF16_DEVICES", {"meta"})
    config = TrainConfig(
        format=format_name,
        policy=policy,
        optimizer=ARMS[arm],
        steps=40,
        log_interval=2,
        interventions=[{"kind": "partition_clip"}],
        observe={"shadow_every": 1, "detail_every": 1},
        data={"batch": 2},
    )
    trainer = Trainer(config, device="meta")
    assert trainer.observers is not None
    for step in range(1, 5):
        numbers = trainer._train_step(step, check=step % 2 == 0)
        assert numbers.device.type == "meta"
        if step % 2 == 0:
            assert trainer.observers.collect().device.type == "meta"


def test_mixing_devices_is_what_raises():
    trainer = Trainer(TrainConfig(steps=2, data={"batch": 2}), device="meta")
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, y: y + y.new_ones(1, device="cpu"))
    with pytest.raises(RuntimeError, match="device"):
        trainer._train_step(1, check=False)
