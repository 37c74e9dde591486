"""torch.compile(fullgraph=True) of forward, backward and step: the same numbers, and nothing compiled twice."""

from __future__ import annotations

import shutil

import pytest
import torch
from host_models import ARMS, batch, equal, loss_of, net, train, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

STEPS = 7


def compiled_losses(model, optimizer, backend: str) -> tuple[list[float], list[int]]:
    """Losses of the steps, and the number of graphs there were after each."""
    forward = torch.compile(model, fullgraph=True, backend=backend)
    step = torch.compile(optimizer.step, fullgraph=True, backend=backend)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses, graphs = [], []
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(forward, batch(number))
        loss.backward()
        step()
        schedule.step()
        losses.append(loss.item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return losses, graphs


def eager_losses(model, optimizer) -> list[float]:
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses = []
    for number in range(STEPS):
        losses += train(model, optimizer, [number])
        schedule.step()
    return losses


CASES = [
    ("adamw", False, "aot_eager"),
    ("adamw", True, "aot_eager"),
    ("manifold_sr", False, "aot_eager"),
    ("grid_carry", False, "aot_eager"),
    ("muon", False, "aot_eager"),
    pytest.param("manifold", True, "inductor", marks=pytest.mark.slow),
    pytest.param("grid", False, "inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("arm", "stateful", "backend"), CASES)
def test_forward_backward_and_step_compile_once(arm, stateful, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    eager, traced = (net(stateful=stateful) for _ in range(2))
    expected = eager_losses(eager, ARMS[arm](eager.parameters()))
    found, graphs = compiled_losses(traced, ARMS[arm](traced.parameters()), backend)
    if backend == "inductor":
        assert found == pytest.approx(expected, rel=0.05)  # fused sums round elsewhere
    else:
        assert found == expected and equal(weights(eager), weights(traced))
    # The first step compiles; the second where a history or a gradient was missing in the first; then nothing.
    assert graphs[1:] == [graphs[1]] * (STEPS - 1), graphs
    if stateful:
        assert int(traced.head.weight_quantizer.draws) == STEPS


def test_clipping_and_step_in_one_graph():
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        model = net()
        optimizer = ARMS["manifold"](model.parameters())

        def update(model=model, optimizer=optimizer):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

        chosen = torch.compile(update, fullgraph=True, backend="aot_eager") if compiles else update
        for number in range(3):
            optimizer.zero_grad()
            loss_of(model, batch(number)).backward()
            chosen()
        results.append(weights(model))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_a_compiled_step_returns_flips_and_updates():
    torch._dynamo.reset()
    model = net()
    optimizer = ARMS["grid"](model.parameters())
    loss_of(model, batch(0)).backward()
    flips, updates = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    assert 0 < flips <= updates
