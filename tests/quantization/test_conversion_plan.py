"""What conversion leaves, and says: layers that are not known, guesses by name, rules."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from altgrad.quantization import LayerRule, PrecisionPolicy, quantize_model


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class FeatureGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sigmoid()


class MyExperts(nn.Module):
    """Experts that do not say how their weights lie, with a 3-d bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(2, 8, 6)), nn.Parameter(torch.randn(2, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.up_bias, x.expand(2, -1, -1), self.up)


class PositionwiseFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(8, 8))


LEFT: dict[str, tuple[nn.Module, str]] = {
    "transposed convolution": (nn.ConvTranspose2d(4, 3, 3), "no product with its parameters is known"),
    "own attention": (OwnAttention(16, 4), "a subclass of MultiheadAttention"),
    "matrices": (PositionwiseFeedForward(), "no product"),
    "lazy": (nn.LazyConv2d(4, 3), "no shape before the first forward pass"),
    "weight normed": (parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "call remove_parametrizations first"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_could_be_converted_and_is_left_is_named(name):
    layer, reason = LEFT[name]
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(4, 4, bias=False)})
    with pytest.warns(UserWarning, match=rf"left: layer.*{reason}"):
        table = quantize_model(model, format="E4M3")
    # Of layers that are not known, and of shapes that are not, nothing can be counted.
    assert (table.product_share < 1) == (name in ("own attention", "weight normed"))


def test_guesses_by_name_do_not_break_a_model():
    model = nn.Sequential(FeatureGate(), MyExperts())
    table = quantize_model(model, format="E4M3")
    assert [row.name for row in table if row.converted] == ["1.up"]
    model(torch.randn(3, 8)).sum().backward()
    with pytest.warns(UserWarning, match="not known of its class"):
        quantize_model(nn.Sequential(MyExperts(), nn.Linear(4, 4)), format="E4M3", policy="mxfp8")


def test_a_rule_may_leave_a_layer_and_match_by_any_of_its_names():
    model = nn.ModuleDict({"enc": nn.Linear(4, 4), "hard": nn.Conv1d(4, 4, 1)})
    model["dec"] = model["enc"]
    rules = (LayerRule(pattern="^hard", leave=True), LayerRule(pattern="^dec$", weight="E4M3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = quantize_model(model, policy=PrecisionPolicy(rules=rules))
    assert [(row.name, row.converted) for row in table] == [("enc", True), ("hard", False)] and model["enc"] is model[
        "dec"
    ]
    rules = (LayerRule(pattern="^0$", weight="E4M3"), LayerRule(pattern="", weight="E4M3"))
    with pytest.raises(ValueError, match="needs embeddings=True"):
        quantize_model(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), policy=PrecisionPolicy(rules=rules))
    with pytest.raises(ValueError, match="none that are known"):
        quantize_model(nn.Sequential(nn.LayerNorm(4)), format="E4M3")
