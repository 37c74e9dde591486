"""Hooks, pruning and parametrizations on layers before, during and after their conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from host_models import ARMS, batch, equal, loss_of, net, train
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from altgrad.quantization import QuantizedLinear, dequantize_model, quantize_model


def wrapped(linear: nn.Linear) -> nn.Sequential:
    return nn.Sequential(linear)


def test_hooks_survive_conversion_both_ways_and_their_handles_work():
    calls: list[str] = []
    model = wrapped(nn.Linear(16, 16))
    early = [
        model[0].register_forward_hook(lambda *_: calls.append("forward")),
        model[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        model[0].register_full_backward_hook(lambda *_: calls.append("backward")),
        model[0].register_full_backward_pre_hook(lambda *_: calls.append("before backward")),
        model[0].register_forward_hook(lambda m, a, k, y: calls.append("keywords"), with_kwargs=True),
        model[0].register_state_dict_post_hook(lambda *_: calls.append("saved")),
        model[0].register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
    ]

    def heard() -> list[str]:
        calls.clear()
        model(batch(0)).sum().backward()
        model.load_state_dict(model.state_dict())
        return sorted(calls)

    plain = heard()
    assert len(plain) == 7
    table = quantize_model(model, format="E4M3")
    assert table[0].converted and heard() == plain
    late = model[0].register_forward_hook(lambda *_: calls.append("late"))
    early[0].remove()
    dequantize_model(model)
    assert type(model[0]) is nn.Linear
    assert heard() == sorted({*plain, "late"} - {"forward"})
    late.remove()
    quantize_model(model, format="E3M4")
    assert heard() == sorted({*plain} - {"forward"})
    assert sorted(copy.deepcopy(model)[0]._forward_hooks) == sorted(model[0]._forward_hooks)


def parametrized(linear: nn.Linear) -> nn.Linear:
    return parametrizations.weight_norm(linear)


MADE: dict[str, tuple[Callable[[nn.Linear], nn.Module], str]] = {
    "pruned": (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), r"pruning\); call .*prune.remove"),
    "weight norm": (weight_norm, r"weight norm\); call .*remove_weight_norm"),
    "spectral norm": (spectral_norm, r"spectral norm\); call .*remove_spectral_norm"),
    "parametrized": (parametrized, "parametrized .*; call remove_parametrizations"),
    "forward replaced": (
        lambda linear: setattr(linear, "forward", linear.forward) or linear,
        "forward method was replaced",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MADE)
def test_weights_that_are_made_elsewhere_are_refused_with_the_true_reason(case):
    make, reason = MADE[case]
    model = wrapped(make(nn.Linear(16, 16)))
    table = quantize_model(model, format="E4M3")
    assert not table[0].converted
    with pytest.raises(ValueError, match=reason):
        QuantizedLinear(make(nn.Linear(16, 16)), weight="E4M3")
    import re

    assert re.search(reason, table[0].reason)


def test_pruning_a_converted_layer_works_and_converts_back():
    model = net()
    optimizer = ARMS["manifold_sr"](model.parameters())
    train(model, optimizer, range(3))
    prune.l1_unstructured(model.head, "weight", 0.5)
    train(model, optimizer, range(3, 6))
    zeros = model.head.quantized_weight() == 0
    assert zeros.float().mean() >= 0.5 and bool(zeros[model.head.weight_mask == 0].all())
    expected = model.head.weight.detach().clone()
    dequantize_model(model)
    assert type(model.head) is nn.Linear and torch.equal(model.head.weight, expected)
    model(batch(0)).sum().backward()
    prune.remove(model.head, "weight")
    assert isinstance(model.head.weight, nn.Parameter)
    assert quantize_model(model, format="E4M3")[0] is not None and isinstance(model.head, QuantizedLinear)


def test_a_layer_parametrized_since_trains_and_is_not_converted_back():
    model = net()
    nn.utils.parametrize.register_parametrization(model.head, "weight", Doubled())
    loss_of(model, batch(0)).backward()
    assert model.head.parametrizations.weight.original.grad is not None
    with pytest.raises(ValueError, match="parametrized since"):
        dequantize_model(model)
    nn.utils.parametrize.remove_parametrizations(model.head, "weight")
    dequantize_model(model)
    assert type(model.head) is nn.Linear


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_what_happens_to_a_converted_layer_happens_to_the_original():
    model = net()
    model.head.weight = nn.Parameter(torch.ones(4, 16))
    model.to(torch.float64).to(torch.float32)
    model.head.register_buffer("note", torch.ones(1))
    dequantize_model(model)
    assert torch.equal(model.head.weight, torch.ones(4, 16)) and "note" in dict(model.head.named_buffers())
    assert equal(list(model.parameters()), [model.state_dict()[k] for k, _ in model.named_parameters()])
