"""Autocast and GradScaler around a converted model; parameters and defaults of other dtypes."""

from __future__ import annotations

import pytest
import torch
from host_models import ARMS, batch, equal, loss_of, net, rounded_again, train, weights

STEPS = 5


@pytest.mark.parametrize("arm", ["adamw", "manifold_sr", "grid"])
def test_autocast_and_a_scaler_change_no_step(arm):
    plain, scaled = net(), net()
    expected = train(plain, ARMS[arm](plain.parameters()), range(STEPS))
    optimizer = ARMS[arm](scaled.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(scaled, batch(step))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(scaled, batch(9))
    loss.backward()
    optimizer.step()
    assert rounded_again(scaled) == 0 or arm == "adamw"


def test_a_step_with_infinite_gradients_is_left_out():
    model = net()
    optimizer = ARMS["manifold_sr"](model.parameters())
    train(model, optimizer, range(2))
    before, step = weights(model), int(optimizer.state[model.head.weight]["step"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch(2)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert equal(before, weights(model)) and int(optimizer.state[model.head.weight]["step"]) == step


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.float16])
def test_nothing_depends_on_the_default_dtype(default):
    def run() -> tuple[list[float], list[torch.Tensor]]:
        losses, found = [], []
        for arm in ("manifold", "grid_carry", "muon"):
            model = net(stateful=arm == "manifold").float()
            losses += train(model, ARMS[arm](model.parameters()), range(3))
            found += weights(model)
        return losses, found

    expected = run()
    models = {arm: net(stateful=arm == "manifold") for arm in ("manifold", "grid_carry", "muon")}
    data = [batch(step) for step in range(3)]
    torch.set_default_dtype(default)
    try:
        losses, found = [], []
        for arm, model in models.items():
            optimizer = ARMS[arm](model.parameters())
            for x in data:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            found += weights(model)
            assert all(
                value.dtype in (torch.float32, torch.float64, torch.int64)
                for state in optimizer.state.values()
                for value in state.values()
            )
            assert optimizer.state[model.head.weight]["exp_avg"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert (losses, len(found)) == (expected[0], len(expected[1])) and equal(found, expected[1])


@pytest.mark.parametrize("arm", ["adamw", "manifold_sr", "grid_carry"])
def test_half_width_parameters_keep_float32_state(arm):
    model = net(None).bfloat16()
    params = [{"params": list(model.parameters()), "format": "E4M3"}]
    optimizer = ARMS[arm](params)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, batch(step).bfloat16()).backward()
        optimizer.step()
    state = optimizer.state[model.head.weight]
    assert state["exp_avg"].dtype == torch.float32 and model.head.weight.dtype == torch.bfloat16
