"""Roles at work in a layer: formats, scale rules, roundings; state that resumes; evaluations without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from altgrad.quantization import LayerRule, PrecisionPolicy, QuantizedLinear, Role, get_format, quantize, quantize_model
from altgrad.quantization.scaling import ScaleRule

DELAYED = ScaleRule(kind="delayed", history=4)
ROLES = {
    "delayed": Role(format="E4M3", scale=DELAYED),
    "per_channel": Role(format="E4M3", scale=ScaleRule(kind="per_channel")),
    "block": Role(format="E4M3", scale=ScaleRule(kind="block")),
    "power_of_two": Role(format="E5M2", scale=ScaleRule(power_of_two=True)),
    "stochastic": Role(format="E3M4", rounding="stochastic"),
    "toward_zero": Role(format="E3M4", rounding="toward_zero"),
}


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 64, generator=generator), torch.randn(6, 32, generator=generator)


def make(**roles) -> QuantizedLinear:
    torch.manual_seed(0)
    return QuantizedLinear(nn.Linear(64, 32, bias=False), **({"weight": "E4M3"} | roles))


def step(layer: nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, g = data(seed)
    x.requires_grad_()
    y = layer(x)
    y.backward(g)
    layer.end_step()
    return y.detach(), x.grad


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("role", ["weight", "activation", "gradient"])
def test_a_layer_equals_a_plain_product_of_its_operands(role, kind):
    roles = {"weight": Role(format="E4M3"), "activation": None, "gradient": None} | {role: ROLES[kind]}
    layer = make(**roles)
    x, g = data()
    operands = {
        name: quantizer.operand({"weight": layer.weight, "activation": x, "gradient": g}[name], advance=False)
        for name, quantizer in layer.quantizers().items()
    }
    w, a, d = (
        operands[name].values if name in operands else plain
        for name, plain in (("weight", layer.weight), ("activation", x), ("gradient", g))
    )
    y, grad_x = step(layer, 0)
    expected = (a @ w.T).detach()
    assert torch.equal(y, expected if layer.activation_quantizer is None else expected.bfloat16().float())
    torch.testing.assert_close(grad_x, d @ w)
    torch.testing.assert_close(layer.weight.grad, d.T @ a)


def test_a_per_channel_weight_is_rounded_channel_by_channel():
    layer = make(weight=ROLES["per_channel"])
    rows = [quantize(row, "E4M3", row.abs().max() / 448) for row in layer.weight.detach()]
    torch.testing.assert_close(layer.quantized_weight(), torch.stack(rows), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["delayed", "stochastic"])
def test_state_resumes_exactly_and_evaluation_leaves_no_trace(kind):
    roles = dict.fromkeys(("weight", "activation", "gradient"), ROLES[kind])
    straight, cut = make(**roles), make(**roles)
    for seed in range(3):
        step(straight, seed), step(cut, seed)
        cut.eval()
        with torch.no_grad():
            cut(data(99)[0])
        cut.train()
    resumed = make(**roles)
    assert all(isinstance(value, torch.Tensor) for value in cut.state_dict().values())
    resumed.load_state_dict(cut.state_dict())
    for seed in range(3, 6):
        for a, b in zip(step(straight, seed), step(resumed, seed), strict=True):
            assert torch.equal(a, b)
    fresh = make(**roles)
    fresh.load_state_dict(dict(make(**roles).state_dict()) | {"weight": cut.weight.detach()})
    assert not torch.equal(step(fresh, 6)[0], step(straight, 6)[0])


def test_a_layer_without_state_has_a_plain_state_dict():
    assert list(make().state_dict()) == ["weight"]


def test_a_delayed_scale_looks_at_earlier_steps():
    layer = make(weight="E4M3", activation=ROLES["delayed"])
    step(layer, 0)
    first = data(0)[0].abs().max() / get_format("E4M3").max
    operand = layer.activation_quantizer.operand(data(1)[0], advance=False)
    torch.testing.assert_close(operand.scale, first)


def test_stochastic_roles_draw_anew_each_step_and_by_the_seed():
    layer, same, other = (make(activation=ROLES["stochastic"], key=key) for key in (1, 1, 2))
    first, again = step(layer, 0)[0], step(layer, 0)[0]
    assert not torch.equal(first, again)
    assert torch.equal(first, step(same, 0)[0])
    assert not torch.equal(first, step(other, 0)[0])


def test_native_products_equal_emulated_ones_forward_and_backward():
    results = []
    for product in ("native", "emulated"):
        layer = make(activation="E4M3", gradient="E5M2", product=product)
        y, grad_x = step(layer, 0) if product == "emulated" else step_of_sixteen(layer)
        if product == "emulated":
            layer.weight.grad = None
            y, grad_x = step_of_sixteen(layer)
        results.append((y, grad_x, layer.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def step_of_sixteen(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 64, generator=generator).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(16, 32, generator=generator))
    return y.detach(), x.grad


def test_native_where_there_is_no_unit_is_refused():
    with pytest.raises(ValueError, match="no hardware multiplies"):
        make(weight="E3M4", activation="E3M4", product="native")(data()[0])
    with pytest.raises(ValueError, match="nearest: native"):
        make(product="nativ")


def test_the_numerics_are_shown_and_the_policy_carries_roles():
    rule = LayerRule(pattern="", weight="E4M3", activation=ROLES["delayed"], gradient=ROLES["stochastic"])
    model = nn.Sequential(nn.Linear(64, 32))
    table = quantize_model(model, policy=PrecisionPolicy(rules=(rule,)))
    assert (table[0].weight, table[0].activation, table[0].gradient) == ("E4M3", "E4M3 delayed", "E3M4 stochastic")
    assert "E4M3 weight · E4M3 delayed, history 4 activation · E3M4 stochastic gradient" in repr(model)
    assert PrecisionPolicy.model_validate_json(PrecisionPolicy(rules=(rule,)).model_dump_json()).rules == (rule,)
