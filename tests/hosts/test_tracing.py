"""torch.export, make_fx, fake tensors and torch.jit.trace: the right graph, or one line that says why not."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from host_models import batch, equal, loss_of, net
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from altgrad.quantization import decode, encode, quantize, ulp
from altgrad.quantization.ops import code_index, index_to_value

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": lambda x: quantize(x, "E4M3", 0.3),
    "stochastic": lambda x: quantize(x, "E5M2", 0.3, rounding="stochastic", seed=7),
    "scales": lambda x: quantize(x, "E3M4", x.abs().amax(1, keepdim=True) / 15.5),
    "codes": lambda x: decode(encode(x, "E3M4"), "E3M4") + index_to_value(code_index(x, "E2M5"), "E2M5"),
    "spacing": lambda x: ulp(x, "E7M0", 0.3),
}


def data(seed: int = 0) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("call", CALLS)
def test_make_fx_records_what_was_called(call, mode):
    graph = make_fx(CALLS[call], tracing_mode=mode)(data())
    assert torch.equal(graph(data(1)), CALLS[call](data(1)))


def test_make_fx_records_the_gradient_and_a_layer():
    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(quantize(x, "E4M3", 0.3, ste="clipped").square().sum(), x)[0]

    graph = make_fx(gradient)(data().requires_grad_())
    other = data(1).requires_grad_()
    assert torch.equal(graph(other), gradient(other))
    model = net().eval()
    assert torch.equal(make_fx(lambda x: model(x))(batch(0))(batch(1)), model(batch(1)))


@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors_have_shapes_and_no_memory(call):
    with FakeTensorMode() as mode:
        found = CALLS[call](mode.from_tensor(data()))
    assert type(found).__name__ == "FakeTensor" and found.shape == (4, 6)


def test_a_model_runs_on_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net()(mode.from_tensor(batch(0))).shape == (8, 4)


@pytest.mark.parametrize(("stateful", "strict"), [(False, True), (True, False)])
def test_a_converted_model_exports_saves_and_takes_other_batches(stateful, strict):
    model = net(stateful=stateful).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (batch(0),), dynamic_shapes=({0: rows},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (8, 5):
        x = batch(3, rows)
        assert torch.equal(program.module()(x), model(x)) and torch.equal(loaded(x), model(x))


def test_jit_trace_records_calls_without_a_gradient():
    traced = torch.jit.trace(CALLS["nearest"], data())
    assert torch.equal(traced(data(1)), CALLS["nearest"](data(1)))


def test_a_mode_that_only_watches_changes_nothing():
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which other tests set up first

    model, watched = net(), net()
    loss_of(model, batch(0)).backward()
    with FlopCounterMode(display=False) as counter:
        loss_of(watched, batch(0)).backward()
    assert counter.get_total_flops() > 0
    assert equal(*([p.grad for p in m.parameters()] for m in (model, watched)))


def forward_mode(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return quantize(forward_ad.make_dual(x, x), "E4M3")


def second_derivative(x: Tensor) -> None:
    x = batch(0).requires_grad_()
    torch.autograd.grad(net()(x).square().sum(), x, create_graph=True)


REFUSED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "vmap": (torch.vmap(lambda row: quantize(row, "E4M3")), "cannot run under vmap"),
    "vmap of codes": (torch.vmap(lambda row: code_index(row, "E4M3")), "cannot run under vmap"),
    "vmap of a layer": (
        lambda _: torch.vmap(net())(batch(0).view(2, 4, -1)),
        "a quantized layer cannot run under vmap",
    ),
    "torch.func.grad": (torch.func.grad(lambda x: quantize(x, "E4M3").sum()), "torch.func.grad"),
    "jvp": (lambda x: torch.func.jvp(CALLS["nearest"], (x,), (x,)), "jvp"),
    "forward mode": (forward_mode, "forward-mode"),
    "second derivative": (second_derivative, "no second derivative through a quantized layer"),
    "jit.trace of a layer": (lambda _: torch.jit.trace(net(), batch(0)), "use torch.export or torch.compile"),
    "jit.trace of a gradient": (
        lambda x: torch.jit.trace(CALLS["nearest"], x.clone().requires_grad_()),
        "cannot record the straight-through gradient",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_says_so_in_one_line(case):
    call, message = REFUSED[case]
    with pytest.raises(NotImplementedError, match=message) as caught:
        call(data())
    assert "\n" not in str(caught.value)
