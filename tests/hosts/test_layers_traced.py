"""Layers other than nn.Linear where torch records, stands in for or repeats their forward pass."""

from collections.abc import Callable

import pytest
import torch
from host_models import STATEFUL
from layer_models import SelfAttention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from altgrad.quantization import PrecisionPolicy, named_policy, quantize_model, register_layer


class Own(nn.Module):
    """Its own forward pass is looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.between


register_layer(Own, "between", contracted=0)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv1d(7, 7, 3),
    "attention": lambda: SelfAttention(batch_first=True),
    "embedding": lambda: nn.Embedding(4, 16),
    "own": Own,
}
POLICIES = {"uniform_full": named_policy("uniform_full", "E4M3").rules, "stateful": (STATEFUL,)}


def converted(layer: str, policy: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer]())
    quantize_model(model, policy=PrecisionPolicy(rules=POLICIES[policy], embeddings=True))
    return model, torch.randint(0, 4, (3, 7)) if layer == "embedding" else torch.randn(3, 7, 16)


def results(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    own = x.clone().requires_grad_(x.is_floating_point())
    y = run(own)
    y.square().sum().backward()
    grads = [p.grad for p in (own, *model.parameters()) if p.grad is not None]
    model.zero_grad()
    return [y, *grads]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_compiled_and_checkpointed_it_computes_the_same(layer, policy):
    model, x = converted(layer, policy)
    plain = results(model, model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=layer != "own")
    assert all(map(torch.equal, results(model, compiled, x), plain))
    again = results(model, lambda own: checkpoint(model, own, use_reentrant=False), x)
    assert all(map(torch.equal, again, plain))


@pytest.mark.parametrize("layer", LAYERS)
def test_what_traces_it_works_or_is_refused(layer):
    model, x = converted(layer, "uniform_full")
    model.eval()
    with torch.no_grad():
        y = model(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), y)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model(fake.from_tensor(x)).shape == y.shape
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace cannot record a quantized layer"):
        torch.jit.trace(model, x)
    with pytest.raises(NotImplementedError, match="cannot run under vmap"):
        torch.vmap(model)(x)
    if layer != "embedding":
        with pytest.raises(NotImplementedError, match="no second derivative"):
            own = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(model(own).square().sum(), own, create_graph=True)
            g.sum().backward()
    if layer == "own":
        with pytest.raises(torch._dynamo.exc.Unsupported, match="AltGrad looks into this layer's own forward pass"):
            torch.compile(model, backend="aot_eager", fullgraph=True)(x)
