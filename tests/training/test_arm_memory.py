"""What has to be kept of a weight, against what the optimizers really keep."""

from __future__ import annotations

import pytest
import torch

from altgrad.quantization import quantize_model
from altgrad.training import ARMS, TrainConfig, build_optimizer
from altgrad.training.arm_configs import bytes_per_weight


@pytest.mark.parametrize("arm", ARMS)
def test_state_is_counted_as_the_optimizer_keeps_it(arm: str) -> None:
    model = quantize_model_of_one_layer()
    optimizer = build_optimizer(TrainConfig(format="E4M3", optimizer=ARMS[arm]), model)
    model(torch.ones(2, 16, dtype=torch.float32)).sum().backward()
    optimizer.step()
    weight = model[0].weight
    kept = [
        value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.shape == weight.shape
    ]
    assert len(kept) == ARMS[arm].state_tensors
    assert {value.dtype for value in kept} <= {torch.float32}


def quantize_model_of_one_layer() -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False, dtype=torch.float32))
    quantize_model(model, format="E4M3")
    return model


@pytest.mark.parametrize(
    ("arm", "bits", "expected"),
    [
        ("adamw", 8, (4, 8)),
        ("adamw_sr", 8, (1, 8)),
        ("adamw_nearest", 16, (2, 8)),
        ("manifold", 8, (4, 8)),
        ("grid", 8, (1, 8)),
        ("grid_literal", 8, (1, 4)),
        ("lion", 8, (1, 4)),
    ],
)
def test_bytes_of_a_weight_and_its_state(arm: str, bits: int, expected: tuple[float, float]) -> None:
    assert bytes_per_weight(ARMS[arm], bits) == expected
