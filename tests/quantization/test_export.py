"""What an export holds, and that a model made from it computes the same."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from altgrad.quantization import (
    LayerRule,
    PrecisionPolicy,
    Role,
    ScaleRule,
    export_model,
    load_exported,
    quantize_model,
)


class Net(nn.Module):
    """A tied and a free embedding, a convolution, a fused attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, 48), nn.Embedding(16, 48)
        self.window = nn.Conv1d(48, 48, 3, padding=1)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.head = nn.Linear(48, 16, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.window((self.tokens(tokens) + self.places(tokens)).transpose(1, 2)).transpose(1, 2)
        y: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return y


TOKENS = torch.arange(16).view(2, 8)


def converted(format: str, kind: str, *, embeddings: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net()
    role = Role(format=format, scale=ScaleRule(kind=kind))
    rule = LayerRule(pattern="", weight=role, activation=role)
    quantize_model(model, policy=PrecisionPolicy(rules=(rule,), embeddings=embeddings))
    if kind == "delayed":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            model(TOKENS).square().mean().backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("store", ["values", "codes"])
@pytest.mark.parametrize("kind", ["current", "delayed", "per_channel", "block"])
@pytest.mark.parametrize("format", ["E4M3", "E3M4", "E2M1", "E5M2/fnuz", "INT8", "BF16"])
def test_a_model_made_from_an_export_computes_the_same(format, kind, store, tmp_path):
    model = converted(format, kind)
    export_model(model, tmp_path / "model.safetensors", store=store)
    torch.manual_seed(1)
    loaded = Net()
    load_exported(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded.eval()(TOKENS), model(TOKENS))
    assert loaded.head.weight is loaded.tokens.weight


STOCHASTIC = Role(format="E2M1", scale=ScaleRule(kind="block", block_scale_format="E4M3"), rounding="stochastic")
NVFP4_LIKE = Role(format="E4M3", scale=ScaleRule(kind="block", block_scale_format="E4M3"))


@pytest.mark.parametrize("store", ["values", "codes"])
@pytest.mark.parametrize("role", [STOCHASTIC, NVFP4_LIKE], ids=["stochastic", "nvfp4-like"])
def test_exported_weights_are_not_rounded_again_until_they_are_written(role, store):
    for seed in range(5):
        torch.manual_seed(seed)
        model = Net()
        rule = LayerRule(pattern="", weight=role, activation=role)
        quantize_model(model, policy=PrecisionPolicy(rules=(rule,), embeddings=True), seed=7)
        exported = export_model(model, store=store)
        assert set(exported.tensors) - {key + "_scale" for key in exported.tensors} == set(Net().state_dict())
        loaded = Net()
        load_exported(loaded, exported)
        assert torch.equal(loaded.eval()(TOKENS), model.eval()(TOKENS))
    weight = loaded.head.weight
    assert loaded.head.stored() is not None
    with torch.no_grad():
        weight.mul_(1.1)
    assert loaded.head.stored() is None and not torch.equal(loaded.head.quantized_weight(), weight)


def test_tied_layers_are_stored_under_each_name(tmp_path):
    def twins() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Conv1d(4, 4, 3, padding=1), "b": nn.Conv1d(4, 4, 3, padding=1)})
        model["b"].weight = model["a"].weight
        return model

    model, loaded = twins(), twins()
    quantize_model(model, format="E4M3")
    load_exported(loaded, export_model(model, tmp_path / "x.safetensors", store="codes"))
    x = torch.randn(2, 4, 5)
    loaded["b"].load_state_dict({"bias": model["b"].bias}, strict=False)
    assert all(torch.equal(model[name](x), loaded[name](x)) for name in "ab")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_model(model, tmp_path / "none" / "x.safetensors")
    with pytest.raises(ValueError, match=r"unknown store 'code'.*nearest: codes"):
        export_model(model, store="code")
    prune.l1_unstructured(model["b"], "weight", 0.5)
    with pytest.raises(ValueError, match="made from other tensors"):
        export_model(model)


def test_values_are_what_a_plain_model_loads():
    model = converted("E4M3", "current", embeddings=False)
    exported = export_model(model)
    plain = Net()
    assert set(exported.tensors) == set(plain.state_dict())
    plain.load_state_dict(exported.tensors)
    assert torch.equal(plain.head.weight, model.head.quantized_weight())
    assert set(exported.recipe) == {"window", "attention.in_proj", "attention.out_proj", "head"}


STORED = {"E4M3": torch.float8_e4m3fn, "E5M2/fnuz": torch.float8_e5m2fnuz, "E3M4": torch.uint8}


@pytest.mark.parametrize("format", STORED)
def test_codes_have_the_type_of_torch_where_the_format_is_one(format):
    tensors = export_model(converted(format, "block"), store="codes").tensors
    assert tensors["attention.in_proj_weight"].dtype is STORED[format] and tensors["window.weight"].shape == (48, 48, 3)
    # 32 elements of a row share a scale; of 144 in a row of the convolution the last block has 16.
    assert tensors["attention.in_proj_weight_scale"].shape == (144, 2) and tensors["window.weight_scale"].shape == (
        48,
        5,
    )
    assert export_model(converted(format, "current"), store="codes").tensors["head.weight_scale"].shape == ()


def test_what_is_no_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not converted"):
        export_model(Net())
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no recipe"):
        load_exported(Net(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="matches no layer"):
        load_exported(nn.Sequential(nn.Linear(4, 4)), export_model(converted("E4M3", "current")))
