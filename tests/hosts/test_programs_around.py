"""What the program around does: schedulers' keys, stages, several optimizers, threads, evaluations, compiled passes."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch
from host_models import ARMS, batch, equal, loss_of, net, rounded_again, train, weights
from torch import nn
from torch.nn.utils import parametrize

from altgrad.quantization import QuantizedLinear, Role, ScaleRule, quantize_model
from altgrad.training import RoundedAdamW
from altgrad.training.arms import RoundedOptimizer


@pytest.mark.parametrize("made", ["loaded", "fresh"])
def test_a_compiled_forward_sees_loaded_weights(made):
    torch._dynamo.reset()
    source = net()
    keep = ARMS["manifold_sr"](source.parameters())
    train(source, keep, range(2))
    model = net() if made == "fresh" else source
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    if made == "loaded":
        forward(batch(0))
    model.load_state_dict({k: v * 16 if v.dim() == 2 else v for k, v in source.state_dict().items()})
    assert torch.equal(forward(batch(0)), model(batch(0)))
    assert rounded_again(model) == 0


def add_onecycle(optimizer: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)


FOREIGN = {
    "OneCycleLR": add_onecycle,
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
    "a user's": lambda o: o.param_groups[0].update(lr_scale=0.5),
    "torch's": lambda o: [g.update(amsgrad=False, foreach=None, fused=None) for g in o.param_groups],
}


@pytest.mark.parametrize("side", ["saved", "present", "both"])
@pytest.mark.parametrize("keys", FOREIGN)
def test_keys_of_others_in_a_group_are_nobodys_recipe(keys, side):
    models = [net(), net()]
    saved, present = (ARMS["manifold"](m.parameters()) for m in models)
    train(models[0], saved, range(2))
    for optimizer, name in ((saved, "saved"), (present, "present")):
        if side in (name, "both"):
            FOREIGN[keys](optimizer)
    present.load_state_dict(saved.state_dict())
    last = net()
    again = ARMS["manifold"](last.parameters())
    again.load_state_dict(present.state_dict())
    assert int(again.state[again.param_groups[0]["params"][0]]["step"]) == 2


def test_an_evaluation_in_inference_mode_leaves_nothing_behind():
    source = net()
    keep = ARMS["grid"](source.parameters())
    train(source, keep, range(2))
    model = net().eval()
    model.load_state_dict(copy.deepcopy(source.state_dict()))
    with torch.inference_mode():
        model(batch(0))
    optimizer = ARMS["manifold_sr"](model.train().parameters())
    train(model, optimizer, range(2))
    with torch.no_grad():
        model.head.weight.mul_(9)
    with torch.inference_mode():
        model(batch(0))
    train(model, optimizer, range(2))
    assert rounded_again(model) == 0


def stateful_layer(**roles: Role) -> QuantizedLinear:
    torch.manual_seed(0)
    defaults = {
        "activation": Role(format="E4M3", scale=ScaleRule(kind="delayed", history=4)),
        "gradient": Role(format="E5M2", rounding="stochastic"),
    }
    return QuantizedLinear(nn.Linear(16, 16), weight="E4M3", **(defaults | roles))


def test_a_layer_frozen_for_a_second_stage_goes_on():
    model = nn.Sequential(stateful_layer(), nn.Linear(16, 4))
    first = torch.optim.AdamW(model.parameters())
    for step in range(2):
        model(batch(step)).sum().backward()
        first.step()
    del first
    model[0].requires_grad_(False)
    second = torch.optim.AdamW(model[1].parameters())
    for step in range(5):
        model(1000 * batch(step)).sum().backward()
        second.step()
    assert int(model[0].gradient_quantizer.draws) == 7
    assert float(model[0].activation_quantizer.amax_history.min()) > 1000


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_of_one_layer_make_one_step(order):
    layer = stateful_layer()
    optimizers = [
        RoundedOptimizer([layer.weight], "muon", rounding=None, format="E4M3"),
        torch.optim.AdamW([layer.bias]),
    ]
    for step in range(3):
        layer(batch(step)).sum().backward()
        for place in order:
            optimizers[place].step()
    assert int(layer.gradient_quantizer.draws) == 3


def test_a_pass_without_gradients_joins_no_history():
    layer = stateful_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    layer(batch(0)).sum().backward()
    with torch.no_grad():
        layer(1000 * batch(1))
    optimizer.step()
    assert float(layer.activation_quantizer.amax_history.nan_to_num(0.0).max()) == float(batch(0).abs().max())


def test_a_pass_between_loading_and_the_step_changes_nothing():
    results = []
    for looks in (False, True):
        model = net()
        optimizer = ARMS["grid_carry"](model.parameters())
        train(model, optimizer, range(4))
        model.load_state_dict({k: 4 * v for k, v in model.state_dict().items()})
        if looks:
            with torch.no_grad():
                model(batch(9))
        train(model, optimizer, range(4, 6))
        results.append([*weights(model), *(s["carry"] for s in optimizer.state.values() if "carry" in s)])
    assert equal(*results)


class Larger(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 3000 * weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", ["parametrized", "spectral norm"])
def test_a_weight_made_from_another_since_has_its_roles_scale(wrap, caplog):
    model = net()
    optimizer = ARMS["manifold_sr"](model.parameters())
    train(model, optimizer, range(2))
    original, before = model.head.weight, model.head.weight.detach().clone()
    if wrap == "parametrized":
        parametrize.register_parametrization(model.head, "weight", Larger())
    else:
        nn.utils.spectral_norm(model.head)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with caplog.at_level(logging.WARNING, "altgrad"):
        train(model, optimizer, range(2, 4))
    assert torch.equal(original, before) and not caplog.records


def test_models_and_optimizers_are_built_in_several_threads():
    model, errors, ends = net(), [], threading.Event()

    def copies() -> None:
        kept = []
        while not ends.is_set():
            kept.append(copy.deepcopy(model))

    worker = threading.Thread(target=copies)
    worker.start()
    try:
        for _ in range(150):
            RoundedAdamW(model.parameters(), format="E4M3")
    except RuntimeError as error:
        errors.append(error)
    finally:
        ends.set()
        worker.join()
    assert not errors


@pytest.mark.parametrize("drop", [False, True])
def test_gradients_that_the_graph_sets_are_the_ones_it_steps_with(drop):
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        model = net()
        optimizer = ARMS["adamw"](model.parameters())
        parameters = list(model.parameters())

        def step(grads, parameters=parameters, optimizer=optimizer):
            for place, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
                parameter.grad = None if drop and place == 1 else grad * 2
            optimizer.step()

        chosen = torch.compile(step, backend="aot_eager", fullgraph=True) if compiles else step
        for number in range(2):
            generator = torch.Generator().manual_seed(number)
            chosen([torch.randn(p.shape, generator=generator) for p in parameters])
        results.append(weights(model))
    assert equal(*results)


def test_a_model_made_half_under_its_optimizer_is_refused_as_at_the_start():
    model = net("E5M2")
    optimizer = RoundedAdamW(model.parameters(), rounding="stochastic")
    train(model, optimizer, range(2))
    model.half()
    loss_of(model, batch(0).half()).backward()
    with pytest.raises(ValueError, match=r"float16 cannot hold the values of format='E5M2'"):
        optimizer.step()


@pytest.mark.parametrize(
    ("key", "value"), [("step", -1.0), ("step", float("nan")), ("mean_spacing", float("nan")), ("mean_spacing", -1.0)]
)
def test_numbers_put_in_place_by_hand_are_looked_at(key, value):
    model = net()
    optimizer = ARMS["manifold"](model.parameters())
    train(model, optimizer, range(2))
    state = optimizer.state[model.head.weight]
    state[key] = torch.tensor(value, dtype=state[key].dtype)
    with pytest.raises(ValueError, match=f"state '{key}' of parameter"):
        train(model, optimizer, range(2, 3))


def test_part_of_a_weight_written_through_data_is_honoured():
    model = net()
    optimizer = ARMS["manifold_sr"](model.parameters())
    train(model, optimizer, range(2))
    model.head.weight.data[2:] *= 16
    largest = model.head.weight.abs().max().item()
    train(model, optimizer, range(2, 3))
    assert model.head.weight.abs().max().item() > 0.9 * largest and rounded_again(model) == 0


def test_a_step_without_converted_weights_is_plain():
    model = net(None)
    table = quantize_model(model, format="FP32")
    assert not any(row.converted for row in table)
    optimizer = RoundedAdamW(model.parameters(), lr=1e-2, format=None)
    theirs = net(None)
    reference = train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0), range(4))
    assert train(model, optimizer, range(4)) == pytest.approx(reference, rel=1e-4)
