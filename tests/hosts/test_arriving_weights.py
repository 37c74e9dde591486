"""One grid per weight, however the weight arrived; loaded and rewritten weights are honoured, with a logged event."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from host_models import ARMS, Net, batch, equal, loss_of, net, rounded_again, train
from torch import nn

from altgrad.quantization import (
    QuantizedLinear,
    compute_scale,
    dequantize_model,
    quantize_model,
    quantized_parameters,
    requantize_layer,
)
from altgrad.training import GridOptim, RoundedAdamW

RESIDENT = ("manifold_sr", "eco", "grid_carry")


def on_grid(model: Net) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter, _ in quantized_parameters(model).values()]


def trained(arm: str = "grid") -> tuple[Net, torch.optim.Optimizer]:
    model = net()
    optimizer = ARMS[arm](model.parameters())
    train(model, optimizer, range(3))
    return model, optimizer


def replaced(model: Net) -> Net:
    for layer in (module for module in model.modules() if isinstance(module, QuantizedLinear)):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


def on_meta_and_back(model: Net) -> Net:
    state = copy.deepcopy(model.state_dict())
    with torch.device("meta"):
        fresh = net()
    fresh.to_empty(device="cpu").load_state_dict(state)
    return fresh


def requantized(model: Net) -> Net:
    dequantize_model(model)
    quantize_model(model, format="E4M3")
    return model


def converted_with_flag(flag: Callable[[bool], None]) -> Callable[[Net], Net]:
    def convert(model: Net) -> Net:
        flag(True)
        try:
            return model.to(torch.bfloat16).to(torch.float32)
        finally:
            flag(False)

    return convert


def as_a_plain_model(model: Net) -> Net:
    """Through a model nobody converted, as save_pretrained and its like do."""
    plain = net(None)
    plain.load_state_dict(model.state_dict())
    quantize_model(plain, format="E4M3")
    return plain


def assigned(model: Net) -> Net:
    fresh = net()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return fresh


def vectorized(model: Net) -> Net:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.clone(), model.parameters())
    return model


ARRIVALS: dict[str, Callable[[Net], Net]] = {
    "replaced": replaced,
    "meta and to_empty": on_meta_and_back,
    "requantized": requantized,
    "swapped": converted_with_flag(torch.__future__.set_swap_module_params_on_conversion),
    "overwritten": converted_with_flag(torch.__future__.set_overwrite_module_params_on_conversion),
    "through a plain model": as_a_plain_model,
    "assigned": assigned,
    "as one vector": vectorized,
    "copied": copy.deepcopy,
    "inference": lambda model: torch.inference_mode()(copy.deepcopy)(model),
}


@pytest.mark.parametrize("way", ARRIVALS)
@pytest.mark.parametrize("arm", RESIDENT)
def test_no_weight_is_rounded_again(arm, way):
    model, optimizer = trained(arm)
    before = on_grid(model)
    arrived = ARRIVALS[way](model)
    assert equal(before, on_grid(arrived)) and rounded_again(arrived) == 0
    if way == "inference":
        return
    # Without an optimizer a plain pass leaves it so; and one built now agrees with the layers.
    arrived(batch(0))
    other = ARMS[arm](arrived.parameters())
    assert equal(before, on_grid(arrived))
    train(arrived, other, range(3, 6))
    assert rounded_again(arrived) == 0 and not equal(before, on_grid(arrived))
    del optimizer


@pytest.mark.parametrize("way", ["requantized", "as one vector"])
def test_the_same_optimizer_goes_on(way):
    straight, own = trained()
    model, optimizer = trained()
    arrived = ARRIVALS[way](model)
    assert train(arrived, optimizer, range(3, 6)) == train(straight, own, range(3, 6))
    assert rounded_again(arrived) == 0


def test_a_resized_tied_weight_keeps_one_grid():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(tokens))

    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(12)
    quantize_model(model, format="E4M3")
    optimizer = GridOptim(model.parameters(), lr=1e-2, format="E4M3")
    for _ in range(2):
        model(tokens).square().mean().backward()
        optimizer.step()
    larger = nn.Parameter(torch.cat([model.head.weight.detach(), torch.randn(3, 16)]))
    model.embedding.weight = larger
    # Untied for a moment: each looks at the weight it has.
    assert model.embedding(torch.tensor([14])).shape == (1, 16)
    model.head.weight = larger
    later = GridOptim(model.parameters(), lr=1e-2, format="E4M3")
    model(torch.arange(15)).square().mean().backward()
    later.step()
    assert torch.equal(model.embedding(torch.arange(15)), model.head.weight)
    assert rounded_again(model) == 0 and model.head.weight.shape == (15, 16)


REWRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "copy_": lambda w: w.copy_(w * 10),
    "mul_": lambda w: w.mul_(1 / 300),
    "initialized": lambda w: nn.init.normal_(w, std=3.0),
    "exchanged": lambda w: setattr(w, "data", w.detach() * 7.3),
    "through .data": lambda w: w.data.copy_(10 * w.detach()),
    "initialized through .data": lambda w: w.data.normal_(0.0, 2.0),
    "foreach": lambda w: torch._foreach_mul_([w], 25.0),
    "index": lambda w: w.__setitem__((slice(None), slice(0, 4)), 5.0),
}


@pytest.mark.parametrize("passes", [0, 1], ids=["step", "forward and step"])
@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("arm", RESIDENT)
def test_rewritten_weights_are_honoured_and_logged(arm, rewrite, passes, caplog):
    model, optimizer = trained(arm)
    with torch.no_grad():
        REWRITES[rewrite](model.head.weight)
    wanted = model.head.weight.detach().clone()
    with caplog.at_level(logging.WARNING, "altgrad"):
        if passes:
            assert (model.head.quantized_weight() - wanted).abs().max() <= wanted.abs().max() / 16
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert (model.head.weight - wanted).abs().max() <= wanted.abs().max() / 16, "values were cut"
    assert rounded_again(model) == 0
    assert [record for record in caplog.records if "was rewritten" in record.getMessage()]


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_under_a_resident_optimizer_is_honoured(assign):
    model, optimizer = trained("manifold_sr")
    large = {key: 10 * value for key, value in net(None).state_dict().items()}
    model.load_state_dict(large, assign=assign)
    if assign:
        optimizer = ARMS["manifold_sr"](model.parameters())
    loss_of(model, batch(0)).backward()
    optimizer.step()
    assert (model.head.weight - large["head.weight"]).abs().max() < 0.1 * large["head.weight"].abs().max()
    assert rounded_again(model) == 0


def test_a_master_measures_its_spacing_anew():
    """A step in units of the format's spacing must not take that of weights that are gone."""
    changes = []
    for factor in (1.0, 64.0):
        model = net()
        optimizer = ARMS["manifold"](model.parameters())
        train(model, optimizer, range(20))
        with torch.no_grad():
            model.head.weight.mul_(factor)
        before = model.head.weight.detach().clone()
        optimizer.zero_grad()
        model.head.weight.grad = torch.ones_like(before)
        optimizer.step()
        changes.append((model.head.weight - before).abs().mean().item())
    assert changes[1] == pytest.approx(changes[0], rel=0.2)


def test_torchs_optimizer_takes_over_from_a_grid():
    """Without an owner the layer goes back to its role's scale as soon as the weights leave the grid."""
    model, _ = trained()
    del _
    theirs = torch.optim.AdamW(model.parameters(), lr=0.3)
    losses = train(model, theirs, range(3, 12))
    scale = model.head.weight_operand().scale
    assert torch.equal(scale, compute_scale(model.head.weight, "E4M3")) and losses[-1] == losses[-1]


def test_an_optimizer_of_a_layer_that_changed_its_format_says_both():
    model, optimizer = trained()
    requantize_layer(model, "head", "E5M2")
    loss_of(model, batch(0)).backward()
    with pytest.raises(ValueError, match="format='E4M3' for a weight that already takes E5M2"):
        optimizer.step()


def test_a_converted_models_norms_and_biases_stay_float32():
    model = net()
    optimizer = GridOptim(model.parameters(), lr=1e-2, format="E4M3")
    on_grid, plain = optimizer.param_groups
    assert {id(p) for p in on_grid["params"]} == {id(p) for p, _ in quantized_parameters(model).values()}
    assert on_grid["format"] == "E4M3" and plain["format"] is None and len(plain["params"]) == 8
    mixed = net(None)
    quantize_model(mixed.blocks, format="E3M4")
    requantize_layer(mixed.blocks, "0.1", "E5M2")
    optimizer = RoundedAdamW(mixed.parameters(), lr=1e-3)
    assert {group["format"]: len(group["params"]) for group in optimizer.param_groups} == {
        "E5M2": 1,
        "E3M4": 3,
        None: 9,
    }
    unconverted = GridOptim(net(None).parameters(), format="E4M3")
    assert [group["format"] for group in unconverted.param_groups] == ["E4M3"]


def test_counts_belong_to_the_step_they_describe():
    model = net()
    head, rest = [model.head.weight], [p for p in model.parameters() if p is not model.head.weight]
    optimizer = RoundedAdamW(rest, lr=1e-2, format="E4M3", rounding="stochastic")
    optimizer.count_every = 3
    train(model, optimizer, range(4))
    optimizer.add_param_group({"params": head})
    for parameter in rest[:4]:
        parameter.requires_grad_(False)
    for step in range(4, 11):
        before = {p: p.detach().clone() for p in model.parameters()}
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        if step == 9:
            rest[2].requires_grad_(True)
        optimizer.step()
        if step % 3 == 0:
            counts = optimizer.counts
            assert counts and all(p.requires_grad for p in counts)
            for parameter, found in counts.items():
                assert int(found.flips) == int((parameter != before[parameter]).sum())
