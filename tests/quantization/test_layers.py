import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from altgrad.quantization import (
    LayerRule,
    PrecisionPolicy,
    QuantizedLayer,
    QuantizedLinear,
    compute_scale,
    dequantize_model,
    format_scale,
    named_policy,
    quantize,
    quantize_model,
    quantized_parameters,
)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(32, 16)
        self.wpe = nn.Embedding(8, 16)
        self.ln = nn.LayerNorm(16)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(16, 24), "c_proj": nn.Linear(24, 16)})
        self.lm_head = nn.Linear(16, 32, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[-1]))
        x = x + self.mlp["c_proj"](torch.relu(self.mlp["c_fc"](self.ln(x))))
        return self.lm_head(x)


@pytest.mark.parametrize("weight", ["E5M2", "E0M7", "E7M0", "BF16"])
@pytest.mark.parametrize(("activation", "gradient"), [("BF16", "BF16"), ("E4M3", "E5M2"), (None, None)])
def test_all_three_products_use_the_quantized_numbers(weight, activation, gradient):
    linear = nn.Linear(12, 7)
    layer = QuantizedLinear(linear, weight=weight, activation=activation, gradient=gradient)
    x, g = torch.randn(3, 5, 12, requires_grad=True), torch.randn(3, 5, 7)
    y = layer(x)
    y.backward(g)

    def rounded(t, fmt):
        return t if fmt is None else quantize(t, fmt, format_scale(t, fmt))

    w, a, d = (rounded(t.detach(), f) for t, f in [(linear.weight, weight), (x, activation), (g, gradient)])
    product = a @ w.T + linear.bias.detach()
    assert torch.equal(y, product if activation is None else product.bfloat16().float())
    assert not torch.equal(w, linear.weight)
    torch.testing.assert_close(x.grad, d @ w)
    torch.testing.assert_close(linear.weight.grad, torch.einsum("bto,bti->oi", d, a))
    torch.testing.assert_close(linear.bias.grad, d.sum((0, 1)))


@pytest.mark.parametrize("weight", ["E5M2", "E0M7", "E7M0", "BF16"])
@pytest.mark.parametrize(("activation", "gradient"), [("BF16", "BF16"), ("E4M3", "E5M2"), (None, None)])
def test_operands_carried_in_bfloat16_give_the_same_layer(weight, activation, gradient, monkeypatch):
    """As on a GPU: the same numbers but for the place of the scale, the output left in BF16."""
    linear, results, weights = nn.Linear(12, 7), [], []
    x, g = torch.randn(3, 5, 12, requires_grad=True), torch.randn(3, 5, 7).bfloat16().float()
    for devices in ({"cpu"}, set()):
        for module in ("products", "layer_products"):
            monkeypatch.setattr(f"altgrad.quantization.{module}.BF16_DEVICES", devices)
        layer = QuantizedLinear(linear, weight=weight, activation=activation, gradient=gradient)
        x.grad = None
        linear.zero_grad()
        y = layer(x)
        assert y.dtype == (torch.bfloat16 if devices and activation else torch.float32)
        y.backward(g.to(y.dtype))
        results.append([t.float().clone() for t in (y, x.grad, linear.weight.grad, linear.bias.grad)])
        weights.append(layer.quantized_weight())
    assert torch.equal(*weights)
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=2.0**-7, atol=1e-5)


def test_weights_on_the_optimizers_grid_are_not_touched():
    linear = nn.Linear(64, 64)
    scale = compute_scale(linear.weight, "E4M3", power_of_two=True, headroom=2.0)
    with torch.no_grad():
        linear.weight.copy_(quantize(linear.weight.detach(), "E4M3", scale))
    assert not torch.equal(quantize(linear.weight, "E4M3", compute_scale(linear.weight, "E4M3")), linear.weight)
    layer = QuantizedLinear(linear, weight="E4M3")
    assert torch.equal(layer.quantized_weight(), linear.weight) and torch.equal(layer.grid.scale, scale)


def test_the_models_parameters_are_the_same_objects_under_the_same_names():
    model = Tiny()
    before = dict(model.named_parameters(remove_duplicate=False))
    table = quantize_model(model, format="E4M3")
    after = dict(model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert model.lm_head.weight is model.wte.weight and isinstance(model.wte, QuantizedLayer)
    assert {row.name: row.converted for row in table} == {
        "wte": True,
        "wpe": False,
        "ln": False,
        "mlp.c_fc": True,
        "mlp.c_proj": True,
        "lm_head": True,
    }
    assert list(quantized_parameters(model)) == ["mlp.c_fc", "mlp.c_proj", "lm_head"]
    assert quantized_parameters(model)["lm_head"][0] is before["wte.weight"]


def test_embedding_and_head_use_one_quantized_weight():
    model = Tiny()
    quantize_model(model, format="E3M4")
    tokens = torch.arange(32)
    rows = model.wte(tokens)
    assert torch.equal(rows, model.lm_head.quantized_weight())
    rows.sum().backward()
    assert torch.equal(model.wte.weight.grad, torch.ones(32, 16))


def test_dequantize_restores_the_model():
    model = Tiny()
    kinds = [type(module) for module in model.modules()]
    tokens = torch.randint(0, 32, (2, 8))
    expected = model(tokens)
    model.eval()
    quantize_model(model, format="E5M2")
    assert not torch.equal(model(tokens), expected) and not any(module.training for module in model.modules())
    dequantize_model(model)
    assert [type(module) for module in model.modules()] == kinds and torch.equal(model(tokens), expected)
    assert model.lm_head.weight is model.wte.weight and not model.lm_head.training


def test_a_deep_copy_is_independent_and_still_tied():
    model = Tiny()
    quantize_model(model, format="E5M2")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin.wte.weight is twin.lm_head.weight and model.lm_head.weight.abs().sum() > 0
    dequantize_model(twin)
    assert twin.lm_head.weight is twin.wte.weight and twin.wte.weight.abs().sum() == 0


def test_policies_reach_the_layers_and_the_table_says_so():
    model = Tiny()
    table = quantize_model(model, policy=named_policy("head_bf16", "E4M3"))
    assert model.lm_head.weight_format.name == "BF16" and model.mlp["c_fc"].weight_format.name == "E4M3"
    text = str(table)
    assert (
        "keeps BF16" in text
        and "no product with its parameters" in text
        and len({len(line) > 0 for line in text.splitlines()}) == 1
    )
    assert "E4M3 weight · BF16 activation · BF16 gradient" in repr(model)


def test_layers_no_rule_matches_stay():
    model = Tiny()
    table = quantize_model(model, policy=PrecisionPolicy(rules=(LayerRule(pattern="c_fc", weight="E2M1"),)))
    assert isinstance(model.lm_head, nn.Linear) and isinstance(model.wte, nn.Embedding)
    assert {row.name: row.reason for row in table}["lm_head"] == "no rule matches its name"
    assert all(not row.converted for row in quantize_model(Tiny(), format="FP32"))


def test_e0m7_and_e1m6_are_one_format_under_tensor_scaling():
    tokens, results = torch.randint(0, 32, (4, 8)), []
    start = Tiny()
    for name in ("E0M7", "E1M6"):
        model = copy.deepcopy(start)
        quantize_model(model, format=name, policy="uniform_full")
        output = model(tokens)
        output.square().mean().backward()
        results.append([output, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_cannot_be_converted_is_refused():
    model = Tiny()
    quantize_model(model, format="E4M3")
    for refused, arguments, message in [
        (model, {"format": "E4M3"}, "already"),
        (nn.Linear(2, 2), {"format": "E4M3"}, "in place"),
        (Tiny(), {}, "needs format"),
        (Tiny(), {"policy": "uniform"}, "needs format"),
        (Tiny(), {"format": "E4M3", "policy": PrecisionPolicy()}, "no meaning"),
        (Tiny(), {"format": "E4M3t"}, "nearest"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_model(refused, **arguments)


def test_nan_in_the_weight_reaches_the_output():
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    assert QuantizedLinear(linear, weight="E7M0")(torch.ones(1, 4))[0, 0].isnan()


def test_gradients_are_those_of_a_plain_linear_on_the_dequantized_values():
    """Where every operand is on its grid already, the layer is smooth in its sums: gradcheck of the plain product."""
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(8, 6).double(), weight="E4M3", activation=None, gradient=None)
    plain = nn.Linear(8, 6).double()
    with torch.no_grad():
        plain.weight.copy_(layer.quantized_weight())
        plain.bias.copy_(layer.bias)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(plain, x.clone().requires_grad_())
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    g = torch.randn(5, 6, dtype=torch.float64)
    for module, given in zip((layer, plain), inputs, strict=True):
        module(given).backward(g)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-5, atol=1e-6)


def test_layers_whose_swap_would_change_more_than_numbers_are_skipped_with_the_reason():
    pruned, hooked = nn.Linear(4, 4), nn.Linear(4, 4)
    torch.nn.utils.prune.random_unstructured(pruned, "weight", amount=0.5)
    hooked.register_forward_hook(lambda *_: None)
    encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    rules = tuple(LayerRule(pattern=pattern, weight="E7M0") for pattern in ("pruned", "hooked", "linear"))
    model = nn.ModuleDict({"pruned": pruned, "hooked": hooked, "encoder": encoder})
    with pytest.warns(UserWarning, match=r"encoder\.linear1 .*fast path"):
        table = quantize_model(model, policy=PrecisionPolicy(rules=rules))
    reasons = {row.name: row.reason for row in table if row.kind == "Linear"}
    assert [row.name for row in table if row.converted] == ["hooked"]
    assert "pruning" in reasons["pruned"] and "fast path" in reasons["encoder.linear1"]


@pytest.mark.parametrize("name", ["E4M3", "E0M7", "E5M2", "BF16"])
def test_an_infinity_stays_visible(name):
    layer = QuantizedLinear(nn.Linear(8, 4), weight="E4M3", activation=name, gradient=name)
    x = torch.randn(2, 8)
    x[0, 3] = float("inf")
    y = layer(x)
    assert not torch.isfinite(y[0]).any() and torch.isfinite(y[1]).all()


def test_autocast_does_not_change_the_product():
    layer = QuantizedLinear(nn.Linear(64, 32), weight="E4M3", activation=None, gradient=None)
    x = torch.randn(4, 64)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain)


def test_a_printed_model_tells_its_recipe():
    model = nn.Sequential(nn.Linear(64, 4), nn.Conv1d(64, 4, 1))
    quantize_model(model, "E4M3", policy="nvfp4")
    assert (
        repr(model).count("E2M1 block 16 E4M3 weight · E2M1 block 16 E4M3 activation · E2M1 block 16 E4M3 stochastic")
        == 2
    )
