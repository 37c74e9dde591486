"""Averaged models (EMA, SWA): copies whose weights lie on no grid are rounded by their role, the original stays."""

from __future__ import annotations

import pytest
import torch
from host_models import ARMS, batch, equal, loss_of, net, rounded_again, train, weights
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from altgrad.quantization import compute_scale, quantize


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
@pytest.mark.parametrize("arm", ["adamw", "manifold_sr", "grid"])
def test_an_average_is_evaluated_as_what_it_is(arm, average):
    plain, model = net(), net()
    expected = train(plain, ARMS[arm](plain.parameters()))
    optimizer = ARMS[arm](model.parameters())
    averaged = AveragedModel(model, multi_avg_fn=average)
    losses = []
    for step in range(6):
        losses += train(model, optimizer, [step])
        averaged.update_parameters(model)
        loss_of(averaged.eval(), batch(0))
    assert losses == expected and equal(weights(plain), weights(model))
    assert rounded_again(model) == (rounded_again(plain) if arm == "adamw" else 0)
    # The average has a scale of its own: that of its amax, as its role says.
    weight = averaged.module.head.weight.detach()
    assert torch.equal(averaged.module.head.quantized_weight(), quantize(weight, "E4M3", compute_scale(weight, "E4M3")))
    update_bn([batch(0)], averaged)


def test_an_average_taken_back_is_honoured():
    model = net()
    optimizer = ARMS["manifold_sr"](model.parameters())
    averaged = AveragedModel(model)
    for step in range(4):
        train(model, optimizer, [step])
        averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())
    wanted = model.head.weight.detach().clone()
    loss_of(model, batch(5)).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    spacing = float(model.head.grid.scale) * 32
    assert (model.head.weight - wanted).abs().max() <= spacing and rounded_again(model) == 0
