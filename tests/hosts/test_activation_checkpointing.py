"""Recomputed forwards, micro-batches and evaluations: one training step is one step."""

from __future__ import annotations

import pytest
import torch
from host_models import ARMS, batch, equal, loss_of, net, train, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

STEPS = 5


class Checkpointed(nn.Module):
    """The same net, its blocks recomputed in the backward pass."""

    def __init__(self, model: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for block in self.model.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.model.head(x)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if "quantizer" in key}


def same_state(one: nn.Module, two: nn.Module) -> bool:
    return all(
        torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
        for a, b in zip(state(one).values(), state(two).values(), strict=True)
    )


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_the_same_forward(reentrant, stateful):
    plain, recomputed = net(stateful=stateful), net(stateful=stateful)
    expected = train(plain, ARMS["manifold"](plain.parameters()), range(STEPS))
    host = Checkpointed(recomputed, reentrant=reentrant)
    found = train(host, ARMS["manifold"](recomputed.parameters()), range(STEPS))
    assert found == expected and equal(weights(plain), weights(recomputed))
    assert same_state(plain, recomputed)


def test_checkpointing_lets_go_of_operands():
    """What a layer keeps for its backward pass are saved tensors, which checkpointing can drop and pack hooks see."""
    packed: list[torch.Tensor] = []
    model = net()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1, packed.__getitem__):
        loss = loss_of(model, batch(0))
    node, held, kept = loss.grad_fn, [], 0
    queue, seen = [node], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # What a node holds beside its saved tensors: no tensor, and no operand that has one.
        for value in getattr(node, "__dict__", {}).values():
            parts = [getattr(value, name, None) for name in ("activation", "weight")]
            held += [part.values for part in parts if part is not None] + [value]
            kept += 1
        queue += [edge for edge, _ in node.next_functions]
    assert kept and not any(isinstance(value, torch.Tensor) for value in held)


def micro_batched(model: nn.Module, optimizer: torch.optim.Optimizer, pieces: int, steps: int = STEPS) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for piece in batch(step).chunk(pieces):
            loss = loss_of(model, piece) / pieces
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize("make", [ARMS["manifold"], lambda p: torch.optim.AdamW(p, lr=1e-2)])
def test_micro_batches_and_evaluations_are_no_steps(make):
    whole, pieces = net(stateful=True), net(stateful=True)
    train(whole, make(whole.parameters()), range(STEPS))
    optimizer = make(pieces.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        for piece in batch(step).chunk(4):
            (loss_of(pieces, piece) / 4).backward()
            pieces.eval()
            with torch.no_grad():
                pieces(10 * piece)
            pieces.train()
        optimizer.step()
    for key, value in state(whole).items():
        if "draws" in key:
            assert int(value) == int(state(pieces)[key]) == STEPS
        if "amax_history" in key:
            assert int(value.isfinite().sum()) == int(state(pieces)[key].isfinite().sum()) == 4, key


def test_a_steps_amax_is_the_largest_of_its_pieces():
    whole, pieces = net(stateful=True), net(stateful=True)
    train(whole, ARMS["adamw"](whole.parameters()), range(1))
    micro_batched(pieces, ARMS["adamw"](pieces.parameters()), 4, steps=1)
    one, other = (model.blocks[0][1].activation_quantizer.amax_history for model in (whole, pieces))
    assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0)) and one.isfinite().any()


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, pieces = net(), net()
    expected = train(whole, ARMS["adamw"](whole.parameters()), range(STEPS))
    found = micro_batched(pieces, ARMS["adamw"](pieces.parameters()), 4)
    assert found == pytest.approx(expected, rel=1e-2)


def test_one_scale_and_one_draw_serve_all_passes_of_a_step():
    model = net(stateful=True)
    layer, x = model.head, batch(0)
    layer.grid.expect_new_weights()
    first = [layer(x), layer(x / 7), layer(x)]
    assert torch.equal(first[0], first[2])
    scale = layer.activation_quantizer.operand(x, advance=False).scale
    assert torch.equal(scale, layer.activation_quantizer.operand(1000 * x, advance=False).scale)
    optimizer = torch.optim.SGD([layer.weight], lr=0.0)
    first[0].sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x), first[0])


def test_a_step_the_scaler_leaves_out_is_none():
    model = net(stateful=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(step))).backward()
        if step == 1:
            model.head.weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    assert int(model.head.weight_quantizer.draws) == 2


def test_layers_that_no_optimizer_holds_follow_every_optimizer():
    frozen, other = net(stateful=True), nn.Linear(4, 4)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-2)
    for step in range(3):
        other(frozen(batch(step))).sum().backward()
        optimizer.step()
    held = net(stateful=True)
    train(held, torch.optim.SGD(held.parameters(), lr=1e-2), range(2))
    optimizer.step()
    assert int(frozen.head.weight_quantizer.draws) == 3 and int(held.head.weight_quantizer.draws) == 2
