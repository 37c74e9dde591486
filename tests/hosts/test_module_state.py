"""A converted model's state: tensors under torch's conventions, and no key a plain model would not have."""

from __future__ import annotations

import io

import pytest
import torch
from host_models import ARMS, equal, net, rounded_again, train, weights
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from altgrad.quantization import LayerRule, PrecisionPolicy, Role, ScaleRule, quantize_model

RESIDENT = ("manifold_sr", "grid_carry")


@pytest.mark.parametrize("arm", ["adamw", *RESIDENT])
def test_the_keys_are_those_of_the_plain_model(arm):
    model = net()
    train(model, ARMS[arm](model.parameters()), range(3))
    state = model.state_dict()
    assert list(state) == list(net(None).state_dict()) == list(get_model_state_dict(model))
    plain = net(None)
    plain.load_state_dict(state)
    assert equal(weights(plain), weights(model))


def stateful_pair(steps: int = 5) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = net(stateful=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(steps))
    return model, optimizer


def test_state_of_roles_is_tensors_that_files_of_tensors_can_hold():
    model, _ = stateful_pair()
    state = model.state_dict()
    own = {key: value for key, value in state.items() if "quantizer" in key or key.endswith("recipe")}
    assert len(own) == 5 * 7  # of each layer: two draws, two histories, what two gathered, the recipe
    starts = {value.untyped_storage().data_ptr() for value in state.values()}
    assert all(type(v) is torch.Tensor and v.is_contiguous() for v in state.values()) and len(starts) == len(state)
    before = {key: value.clone().nan_to_num(-1.0) for key, value in own.items()}
    model(100 * torch.randn(3, 16))
    assert all(torch.equal(before[key], value.nan_to_num(-1.0)) for key, value in own.items())


def by_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("road", ["state_dict", "assign", "helpers", "deepcopy"])
def test_stateful_roles_go_on_exactly(road):
    model, optimizer = stateful_pair()
    if road == "deepcopy":
        import copy

        other, theirs = copy.deepcopy((model, optimizer))
    else:
        other = net(stateful=True)
        if road == "helpers":
            set_model_state_dict(other, by_file(get_model_state_dict(model)))
        else:
            other.load_state_dict(by_file(model.state_dict()), assign=road == "assign")
        theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
        theirs.load_state_dict(by_file(optimizer.state_dict()))
    assert train(model, optimizer, range(5, 9)) == train(other, theirs, range(5, 9))
    assert equal(weights(model), weights(other))


def test_a_plain_checkpoint_leaves_histories_as_they_are():
    model, _ = stateful_pair()
    before = model.head.activation_quantizer.amax_history.clone()
    model.load_state_dict(net(None).state_dict())
    assert torch.equal(model.head.activation_quantizer.amax_history, before)


def of_roles(**roles: Role | str) -> torch.nn.Module:
    model = net(None)
    quantize_model(model, policy=PrecisionPolicy(rules=(LayerRule(pattern="", **roles),)))
    return model


DELAYED = ScaleRule(kind="delayed", history=4)
OTHERS = {
    "stochastic": {"weight": "E4M3", "activation": Role(format="E4M3", rounding="stochastic")},
    "another format": {"weight": "E4M3", "activation": Role(format="E5M2", scale=DELAYED)},
    "no state": {"weight": "E4M3", "activation": "E4M3"},
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_state_of_other_roles_is_refused_and_both_are_named(case):
    saved = of_roles(weight="E4M3", activation=Role(format="E4M3", scale=DELAYED))
    with pytest.raises(
        ValueError, match=r"state of blocks.0.1 was saved as '.*E4M3 delayed activation.*this layer is "
    ):
        of_roles(**OTHERS[case]).load_state_dict(saved.state_dict())


def test_a_history_of_another_length_is_refused():
    saved = of_roles(weight="E4M3", activation=Role(format="E4M3", scale=DELAYED))
    train(saved, torch.optim.SGD(saved.parameters(), lr=0.0), range(1))
    longer = Role(format="E4M3", scale=ScaleRule(kind="delayed", history=8))
    with pytest.raises(ValueError, match="history holds 8 steps, the state 4"):
        of_roles(weight="E4M3", activation=longer).load_state_dict(saved.state_dict())


def test_a_state_that_still_holds_the_scale_is_read():
    model = net()
    train(model, ARMS["grid_carry"](model.parameters()), range(3))
    old = model.state_dict() | {"head.grid_scale": torch.tensor(0.25)}
    other = net()
    other.load_state_dict(old)
    assert equal(weights(model), weights(other)) and rounded_again(other) == 0


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "carry", "step", "mean_spacing", "overflow_streak"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_state_put_in_place_by_hand_is_converted_or_refused(key, dtype):
    """Without load_state_dict: `optimizer.state[p][key] = …` between two steps."""
    results = []
    for by_hand in (False, True):
        model = net()
        optimizer = ARMS["grid_carry"](model.parameters())
        train(model, optimizer, range(3))
        state = optimizer.state[model.head.weight]
        given = state[key].to(dtype)
        exact = given.to(state[key].dtype)
        state[key] = exact if by_hand else given
        train(model, optimizer, range(3, 5))
        results.append(weights(model))
    assert equal(*results)


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(4, 16).to_sparse(), "words", None, float("nan")])
def test_state_put_in_place_that_fits_nowhere_is_named(value):
    model = net()
    optimizer = ARMS["adamw"](model.parameters())
    train(model, optimizer, range(2))
    optimizer.state[model.head.weight]["step" if isinstance(value, float) else "exp_avg"] = value
    before = weights(model)
    with pytest.raises(ValueError, match=r"state '.*' of parameter 4 \(4, 16\): got "):
        train(model, optimizer, range(2, 3))
    assert equal(before, weights(model))


def test_a_damaged_step_count_ends_the_step():
    model = net()
    optimizer = ARMS["manifold"](model.parameters())
    train(model, optimizer, range(2))
    for damage in (float("nan"), -5.0, float("inf")):
        optimizer.state[model.head.weight]["step"].fill_(damage)
        train(model, optimizer, range(2, 3))
