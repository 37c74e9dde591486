"""Layers other than nn.Linear: the plain layer's numbers on rounded operands, and what conversion says of a model."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_models import SelfAttention
from torch import Tensor, nn
from torch.nn import functional

from altgrad.quantization import (
    LayerRule,
    PrecisionPolicy,
    QuantizedLayer,
    Role,
    ScaleRule,
    dequantize_model,
    quantize,
    quantize_model,
    quantized_parameters,
    register_layer,
    requantize_layer,
    rounded_weights,
)
from altgrad.quantization.scaling import compute_scale

FULL = PrecisionPolicy(rules=(LayerRule(pattern="", weight="E4M3", activation=None, gradient=None),))


class Own(nn.Module):
    """A layer of one's own: a matrix between two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Parameter(torch.randn(6, 8))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.shift, x, self.between.t().contiguous()).tanh()


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * functional.linear(x, self.weight.to(x.dtype)) + self.bias


register_layer(Own, "between")


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


HIDES = rand(2, 6) > 0.5
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 16, 3), (rand(2, 8, 9),), {}),
    "conv2d grouped": (lambda: nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=2), (rand(2, 8, 9, 9),), {}),
    "conv2d circular": (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), (rand(8, 9, 9),), {}),
    "conv2d channels last": (lambda: nn.Conv2d(8, 4, 3), (rand(2, 8, 5, 5).to(memory_format=torch.channels_last),), {}),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, bias=False), (rand(2, 4, 5, 5, 5),), {}),
    "self attention": (lambda: SelfAttention(batch_first=True), (rand(3, 7, 16),), {}),
    "without weights": (lambda: SelfAttention(bias=False), (rand(7, 16),), {"need_weights": False}),
    "cross attention": (
        lambda: nn.MultiheadAttention(16, 4),
        (rand(5, 2, 16), rand(6, 2, 16), rand(6, 2, 16)),
        {"key_padding_mask": HIDES, "attn_mask": rand(8, 5, 6)},
    ),
    "other widths": (
        lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=12, add_bias_kv=True, add_zero_attn=True),
        (rand(5, 2, 16), rand(6, 2, 8), rand(6, 2, 12)),
        {"attn_mask": rand(5, 6) > 1, "average_attn_weights": False},
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0), (rand(5, 2, 16),), {}),
    "own": (Own, (rand(4, 8),), {}),
    "own linear": (lambda: OwnLinear(8, 6), (rand(4, 8),), {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_as_the_plain_one_on_its_rounded_weights(name):
    make, inputs, options = LAYERS[name]
    torch.manual_seed(1)
    model = nn.ModuleDict({"layer": make()})
    plain = copy.deepcopy(model)
    table = quantize_model(model, policy=FULL)
    assert table.product_share == 1.0
    parameters = dict(model.named_parameters())
    for roles in rounded_weights(model).values():
        name = next(n for n, p in parameters.items() if p is roles.parameter())
        with torch.no_grad():
            plain.get_parameter(name).copy_(roles.quantized_weight())
            assert not torch.equal(plain.get_parameter(name), parameters[name])
    found = []
    for side in (model, plain):
        own = [x.clone().requires_grad_() for x in inputs]
        y = side["layer"](*own, **options)
        outputs = [part for part in (y if isinstance(y, tuple) else (y,)) if part is not None]
        outputs[0].square().sum().backward()
        found.append([*outputs, *(x.grad for x in own), *(p.grad for p in side.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    model.eval(), plain.eval()
    with torch.no_grad():
        y, expected = model["layer"](*inputs, **options), plain["layer"](*inputs, **options)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dequantize_model(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attn_mask": torch.zeros(1, 5)}, r"attn_mask of shape \(1, 5\).*\(5, 5\) or \(8, 5, 5\)"),
        ({"key_padding_mask": torch.zeros(2, 5, dtype=torch.uint8)}, r"key_padding_mask .*uint8: bool or floating"),
        ({"is_causal": True}, "Need attn_mask"),
    ],
)
def test_masks_that_torch_refuses_are_refused(options, said):
    model = SelfAttention()
    quantize_model(model, format="E4M3")
    x = rand(5, 2, 16)
    with pytest.raises(RuntimeError, match=said):
        model.attention(x, x, x, **options)


KINDS = {
    "current": ScaleRule(),
    "delayed": ScaleRule(kind="delayed"),
    "per_channel": ScaleRule(kind="per_channel"),
    "block": ScaleRule(kind="block"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_the_roles_of_its_pixels_as_rows(kind):
    """A convolution of windows of one pixel is a linear layer over pixels, in every role and kind of scale."""
    role = Role(format="E4M3", scale=KINDS[kind])
    rules = PrecisionPolicy(rules=(LayerRule(pattern="", weight=role, activation=role, gradient=role),))
    torch.manual_seed(0)
    image, rows = nn.Sequential(nn.Conv2d(32, 16, 1)), nn.Sequential(nn.Linear(32, 16))
    with torch.no_grad():
        rows[0].weight.copy_(image[0].weight.view(16, 32))
        rows[0].bias.copy_(image[0].bias)
    quantize_model(image, policy=rules)
    quantize_model(rows, policy=rules)
    x = rand(2, 32, 4, 4).requires_grad_()
    y = image(x)
    z = rows(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(y, z, rtol=2e-2, atol=1e-3)  # sums in another order may round to another BF16
    assert float((y == z).float().mean()) > 0.98
    weight = rand(2, 16, 4, 4)
    one = torch.autograd.grad((y * weight).sum(), (x, image[0].weight))
    two = torch.autograd.grad((z * weight).sum(), (x, rows[0].weight))
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one[1].view(16, 32), two[1], rtol=1e-4, atol=1e-4)


def test_the_weight_of_a_convolution_has_a_scale_for_each_output_channel():
    rule = LayerRule(pattern="", weight=Role(format="E4M3", scale=KINDS["per_channel"]))
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    quantize_model(model, policy=PrecisionPolicy(rules=(rule,)))
    (roles,) = rounded_weights(model).values()
    weight = model[0].weight.detach()
    wanted = torch.stack([quantize(channel, "E4M3", compute_scale(channel, "E4M3")) for channel in weight])
    torch.testing.assert_close(roles.rounded(model[0].weight, advance=False), wanted, rtol=1e-6, atol=0)


def test_embeddings_are_converted_where_asked_for_and_looked_up_as_they_are_rounded():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = quantize_model(copy.deepcopy(model), format="E4M3")
    assert [row.converted for row in table] == [False, True] and table.share == 32 / 116
    rules = PrecisionPolicy(rules=(LayerRule(pattern="", weight="E4M3"),), embeddings=True)
    table = quantize_model(model, policy=rules)
    assert table.share == 112 / 116 and [*quantized_parameters(model)] == ["0", "1"]
    weight = model[0].weight.detach()
    y = model[0](torch.tensor([3, 3, 7]))
    assert torch.equal(y, quantize(weight, "E4M3", compute_scale(weight, "E4M3"))[[3, 3, 7]])
    y.sum().backward()
    assert model[0].weight.grad.sum(1).tolist() == [0, 0, 0, 16, 0, 0, 0, 8, 0, 0]


STATEFUL = LayerRule(
    pattern="",
    weight=Role(format="E4M3", rounding="stochastic"),
    activation=Role(format="E4M3", scale=ScaleRule(kind="delayed", history=3)),
    gradient=Role(format="E5M2", rounding="stochastic"),
)


@pytest.mark.parametrize("road", ["state", "deepcopy", "pickle"])
def test_a_layer_of_several_weights_goes_on_exactly(road):
    def net() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(7, 7, 1), SelfAttention())
        quantize_model(model, policy=PrecisionPolicy(rules=(STATEFUL,)))
        return model

    def trained(model: nn.Module, steps: range) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in steps:
            optimizer.zero_grad()
            model(rand(3, 7, 16) + step).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    whole = trained(net(), range(6))
    first = net()
    trained(first, range(3))
    if road == "state":
        state = first.state_dict()
        assert "1.attention.altgrad.in_proj_weight.activation_quantizer.amax_history" in state
        first = net()
        first.load_state_dict(state)
    elif road == "deepcopy":
        first = copy.deepcopy(first)
    else:
        file = io.BytesIO()
        torch.save(first, file)
        file.seek(0)
        first = torch.load(file, weights_only=False)
    assert all(map(torch.equal, trained(first, range(3, 6)), whole))


def test_one_of_several_weights_may_be_left_and_may_leave_later():
    model = SelfAttention()
    rules = PrecisionPolicy(rules=(LayerRule(pattern="out_proj", weight="E5M2"),))
    with pytest.warns(
        UserWarning, match=r"25.* left: attention.in_proj \(MultiheadAttention: no rule matches its name"
    ):
        table = quantize_model(model, policy=rules)
    assert [(row.name, row.converted) for row in table] == [("attention.in_proj", False), ("attention.out_proj", True)]
    assert "E5M2 weight" in repr(model) and "QuantizedMultiheadAttention" in repr(model)
    requantize_layer(model, "attention.out_proj", "E4M3")
    assert {name: fmt.name for name, (_, fmt) in quantized_parameters(model).items()} == {"attention.out_proj": "E4M3"}
    requantize_layer(model, "attention.out_proj", "FP32")
    assert isinstance(model.attention, nn.MultiheadAttention) and not quantized_parameters(model)
    both = SelfAttention()
    quantize_model(both, format="E4M3")
    requantize_layer(both, "attention.in_proj", "FP32")
    assert isinstance(both.attention, QuantizedLayer) and [*quantized_parameters(both)] == ["attention.out_proj"]
    both(rand(2, 3, 16)).sum().backward()


def test_a_rule_that_matches_nothing_names_the_nearest_layers():
    rules = PrecisionPolicy(rules=(LayerRule(pattern=r"atention\.in_proj$", weight="E4M3"),))
    with pytest.raises(ValueError, match=r"rule .* matches no layer of this model; nearest: attention.in_proj"):
        quantize_model(SelfAttention(), policy=rules)
    model = SelfAttention()
    with pytest.raises(ValueError, match=r"its layers are attention\.in_proj, attention\.out_proj"):
        quantize_model(model, policy="classic", format="E4M3")
    assert isinstance(model.attention, nn.MultiheadAttention) and not hasattr(model.attention.in_proj_weight, "grid")


def test_what_is_not_known_is_named_with_its_share():
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8), "head": nn.Linear(8, 4, bias=False)})
    with pytest.warns(UserWarning, match=r"^5\.3% of 608 .* left: rnn \(LSTM: no product with its parameters"):
        quantize_model(model, format="E4M3")


def test_a_layer_that_multiplies_out_of_sight_says_so():
    class Hidden(Own):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,oi->bo", x, self.between)

    model = nn.Sequential(Hidden())
    quantize_model(model, format="E4M3")
    with pytest.raises(RuntimeError, match="Hidden did not multiply by its between in a function that"):
        model(rand(4, 8))
    register_layer(
        Hidden,
        "between",
        forward=lambda layer, products, x: products.multiply(
            "between", x, products.weight("between", layer.between), lambda x, w: torch.einsum("bi,oi->bo", x, w)
        ),
    )
    model = nn.Sequential(Hidden())
    quantize_model(model, format="E4M3")
    assert model(rand(4, 8)).shape == (4, 6)
    with pytest.raises(TypeError, match="a class of modules and the names of its weights"):
        register_layer(model, "between")
