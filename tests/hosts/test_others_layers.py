"""Converted layers in code that others wrote: modes, attributes, ties, subclasses, surgery, threads, half precision."""

import copy
import threading
from typing import Any

import pytest
import torch
from layer_models import SelfAttention
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from altgrad.quantization import (
    LayerRule,
    PrecisionPolicy,
    QuantizedLayer,
    dequantize_model,
    quantize_model,
    quantized_parameters,
    register_layer,
    requantize_layer,
    rounded_weights,
)
from altgrad.training import GridOptim, build_arm

FULL = PrecisionPolicy(rules=(LayerRule(pattern="", weight="E4M3", activation=None, gradient=None),))


def on_rounded_weights(model: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain model, given the values of the converted one's weights."""
    own, others = dict(model.named_parameters()), dict(plain.named_parameters())
    with torch.no_grad():
        for roles in rounded_weights(model).values():
            others[next(n for n, p in own.items() if p is roles.parameter())].copy_(roles.quantized_weight())
    return plain


class Own(nn.Module):
    """Multiplies in the weight's dtype, drops in training, and counts its calls."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.weight, self.inner, self.calls = nn.Parameter(torch.randn(6, 8)), inner, 0

    def product(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight).square()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = checkpoint(self.product, x, use_reentrant=False) if self.inner else self.product(x)
        return functional.dropout(y, 0.5, self.training)


register_layer(Own, "weight")


def test_training_and_evaluation_reach_the_layer():
    x = torch.randn(2, 5, 16)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    model = nn.ModuleDict({"encoder": encoder, "own": Own()})
    quantize_model(model, format="E4M3")
    for run in (lambda: encoder(x), lambda: model["own"](torch.ones(50, 8))):
        model.eval()
        assert torch.equal(run(), run())
        model.train()
        assert not torch.equal(run(), run())
    assert model["own"].calls == 4


@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()])
def test_an_encoder_evaluates_as_it_trains_and_nests_again_once_it_is_plain(mask):
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2)}
    )
    assert model["encoder"].use_nested_tensor
    quantize_model(model, format="E4M3")
    x = torch.randn(2, 5, 16)
    trained = model["encoder"](x, src_key_padding_mask=mask)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model["encoder"](x, src_key_padding_mask=mask), trained)
    dequantize_model(model)
    assert model["encoder"].use_nested_tensor and model["encoder"].layers[0].self_attn._qkv_same_embed_dim


def test_what_is_set_on_a_layer_or_asked_of_it_is_its_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2))
    layer = model[0]
    quantize_model(model, format="E4M3")
    assert model[0] is layer and isinstance(layer, nn.Conv2d) and isinstance(layer, QuantizedLayer)
    layer.stride = (1, 1)
    assert layer(torch.randn(1, 3, 7, 7)).shape == (1, 4, 5, 5) and layer.kernel_size == (3, 3)
    dequantize_model(model)
    assert type(layer) is nn.Conv2d and layer.stride == (1, 1) and "altgrad" not in vars(layer)
    assert not layer._load_state_dict_post_hooks


class Scaled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 10.0


class Tied(nn.Module):
    def __init__(self, kind: type[nn.Embedding] = Scaled) -> None:
        super().__init__()
        self.tokens, self.places, self.head = kind(20, 8), Scaled(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.tokens(tokens) + self.places(tokens))
        return y


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_an_embedding_with_a_forward_pass_of_its_own_keeps_it(kind, embeddings):
    model = Tied(kind)
    plain = copy.deepcopy(model)
    quantize_model(model, policy=FULL.model_copy(update={"embeddings": embeddings}))
    assert list(quantized_parameters(model)) == (["places", "head"] if embeddings else ["head"])
    tokens = torch.arange(20)
    y, expected = model(tokens), on_rounded_weights(model, plain)(tokens)
    assert torch.equal(y, expected)
    y.sum().backward(), expected.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    requantize_layer(model, "head", "FP32")
    assert torch.equal(model.tokens(tokens), (10 if kind is Scaled else 1) * model.tokens.weight)


def test_weights_on_a_grid_arrive_in_every_part_of_a_layer():
    def attention() -> nn.Module:
        return SelfAttention()

    model, x = attention(), torch.randn(5, 2, 16)
    optimizer = build_arm(model, "grid", format="E4M3", lr=1e-2)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    other = attention()
    quantize_model(other, format="E4M3")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_a_part_that_is_recomputed_says_so():
    model = nn.Sequential(Own(inner=True))
    quantize_model(model, format="E4M3")
    with pytest.raises(RuntimeError, match="checkpoint the whole layer"):
        model(torch.randn(4, 8))


def test_others_may_read_a_weight_in_the_backward_pass():
    model = nn.Sequential(Own())
    quantize_model(model, format="E4M3")
    seen = []
    model[0].register_full_backward_hook(lambda layer, *_: seen.append(layer.weight.norm()))
    x = torch.randn(4, 8, requires_grad=True)
    checkpoint(lambda x: model[0](x.to(model[0].weight.dtype)), x, use_reentrant=False).sum().backward()
    assert seen and model[0].weight.grad is not None


class Busy(nn.Conv2d):
    """Names of its own that a conversion might take."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.drop, self.weight_roles, self._owner, self._kind = nn.Dropout(0.0), "mine", "mine", "mine"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(super().forward(x))
        return y

    def restore(self) -> str:
        return "mine"


def test_a_layer_keeps_its_own_names():
    model = nn.Sequential(Busy())
    quantize_model(model, format="E4M3")
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    dequantize_model(model)
    assert {model[0].restore(), model[0].weight_roles, model[0]._owner, model[0]._kind} == {"mine"}


def test_a_replica_or_an_exchanged_part_is_multiplied_by_its_own_weight():
    model = nn.ModuleDict({"conv": nn.Conv1d(8, 8, 1), "attention": nn.MultiheadAttention(8, 2), "tied": Tied()})
    quantize_model(model, format="E4M3")
    for replica in (model["conv"]._replicate_for_data_parallel(), copy.copy(model["conv"])):
        weight = torch.zeros(8, 8, 1, requires_grad=True)
        replica.__dict__["_parameters"] = {}
        replica.weight, replica.bias = weight * 1.0, torch.zeros(8)
        y = replica(torch.ones(1, 8, 3))
        y.sum().backward()
        assert not y.any() and weight.grad is not None
    model["attention"].out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)
    nn.init.zeros_(model["attention"].out_proj.weight), nn.init.zeros_(model["attention"].out_proj.bias)
    x = torch.randn(3, 1, 8)
    assert not model["attention"](x, x, x)[0].any()
    tied = model["tied"]
    tied.head.weight = nn.Parameter(torch.zeros(20, 8))
    assert tied.tokens(torch.arange(20)).any()


class Tagged(nn.Conv2d):
    def __init_subclass__(cls, *, tag: str, **rest: Any) -> None:
        super().__init_subclass__(**rest)


class OfTag(Tagged, tag="x"):
    pass


def test_a_conversion_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), OfTag(3, 4, 3))
    with pytest.raises(ValueError, match="OfTag cannot be converted: no class derives from it"):
        quantize_model(model, format="E4M3")
    assert type(model[0]) is nn.Conv2d
    own = nn.Sequential(Own())
    quantize_model(own, format="E4M3")
    another = type(own[0])()
    assert another.eval()(torch.ones(2, 8)).shape == (2, 6) and another.state_dict().keys() == {"weight"}


def test_a_layer_that_is_plain_again_is_nobodys_grid(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    quantize_model(model, format="E5M2")
    dequantize_model(model)
    optimizer = GridOptim(model.parameters(), format="E4M3")
    assert [(g["format"], len(g["params"])) for g in optimizer.param_groups] == [("E4M3", 4)] and caplog.messages
    for format in ("E4M3", "E5M2"):
        build_arm(model, "manifold_fp32", format)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    rules = tuple(LayerRule(pattern=pattern, weight=weight) for pattern, weight in (("0", "E4M3"), ("1", "E5M2")))
    with pytest.raises(ValueError, match="must agree"):
        quantize_model(tied, policy=PrecisionPolicy(rules=rules))
    assert type(tied[0]) is nn.Linear
    quantize_model(tied, format="E3M4")


# A class whose forward pass is looked into has no place for a parametrization.
SURGERY = {
    "convolution, pruned": (lambda: nn.Conv2d(8, 4, 1), "pruned"),
    "convolution, weight normed": (lambda: nn.Conv2d(8, 4, 1), "weight normed"),
    "attention, pruned": (lambda: nn.MultiheadAttention(16, 4), "pruned"),
    "attention, weight normed": (lambda: nn.MultiheadAttention(16, 4), "weight normed"),
    "own, pruned": (Own, "pruned"),
}


@pytest.mark.parametrize("name", SURGERY)
def test_surgery_on_a_converted_layer(name):
    make, surgery = SURGERY[name]
    model = nn.ModuleDict({"layer": make()})
    quantize_model(model, format="E4M3")
    layer = model["layer"].eval()
    name = "in_proj_weight" if hasattr(layer, "in_proj_weight") else "weight"
    if surgery == "pruned":
        prune.l1_unstructured(layer, name, 0.5)
        assert float((getattr(layer, name) == 0).float().mean()) == 0.5
    else:
        parametrizations.weight_norm(layer, name)
    x = {"weight": torch.randn(5, 8, 3, 3) if isinstance(layer, nn.Conv2d) else torch.randn(5, 8)}.get(name)
    y = layer(*[torch.randn(5, 2, 16)] * 3)[0] if x is None else layer(x)
    y.sum().backward()
    if surgery == "pruned":
        assert getattr(layer, f"{name}_orig").grad is not None
        prune.remove(layer, name)
    else:
        with pytest.raises(ValueError, match="parametrized since"):
            dequantize_model(model)
        nn.utils.parametrize.remove_parametrizations(layer, name)
    dequantize_model(model)
    assert isinstance(getattr(layer, name), nn.Parameter) and not isinstance(layer, QuantizedLayer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision_multiplies_the_values_themselves(dtype):
    model = nn.Sequential(Own(), nn.LayerNorm(6)).to(dtype).eval()
    plain = copy.deepcopy(model).float()
    quantize_model(model, policy=FULL)
    x = torch.randn(16, 8).to(dtype)
    y = model(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), on_rounded_weights(model, plain)(x.float()), rtol=0.03, atol=0.03)


def test_threads_do_not_meet_in_a_layer():
    model = nn.Sequential(Own()).eval()
    quantize_model(model, format="E4M3")
    x = torch.randn(64, 8)
    expected, found = model(x), []
    threads = [threading.Thread(target=lambda: found.extend(model(x) for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200 and all(torch.equal(y, expected) for y in found)


class Registered(nn.Linear):
    pass


class Pair(nn.Module):
    """Two weights, of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, first: bool = True) -> Tensor:
        return x @ (self.weight if first else self.other).T


def test_registered_layers_run_as_they_were_registered():
    register_layer(
        Registered,
        "weight",
        forward=lambda layer, products, x: (
            3 * products.multiply("weight", x, products.weight("weight", layer.weight), lambda x, w: x @ w.T)
        ),
    )
    register_layer(Pair, "weight", "other")
    model = nn.ModuleDict({"linear": Registered(8, 8), "pair": Pair(), "tokens": nn.Embedding(8, 8)})
    model["tokens"].weight = model["pair"].weight
    frozen = nn.BatchNorm1d(8).eval()
    model["pair"].norm = frozen
    plain = copy.deepcopy(model)
    quantize_model(model, policy=FULL)
    on_rounded_weights(model, plain)
    x = torch.randn(4, 8)
    torch.testing.assert_close(model["linear"](x), 3 * x @ plain["linear"].weight.T)
    assert all(torch.equal(model["pair"](x, first=own), plain["pair"](x, first=own)) for own in (True, False))
    assert torch.equal(model["tokens"](torch.arange(8)), plain["pair"].weight)
    assert model["pair"](x=x[:0]).shape == (0, 8) and not frozen.training
    dequantize_model(model)
    assert not frozen.training
