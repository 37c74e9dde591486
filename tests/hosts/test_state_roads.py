"""Every road by which torch.optim.AdamW's state travels: ours arrives equal, both run side by side."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_models import ARMS, Net, equal, net, train, weights
from torch import nn

Pair = tuple[Net, torch.optim.Optimizer]
Make = Callable[[Any], torch.optim.Optimizer]


def saved(value: object) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fresh(pair: Pair, make: Make, state: dict[str, Any], order: Callable[[list], list] = list) -> Pair:
    model = net("E4M3" if hasattr(pair[0].head, "grid") else None)
    model.load_state_dict(pair[0].state_dict())
    optimizer = make(order(list(model.named_parameters())))
    optimizer.load_state_dict(state)
    return model, optimizer


def by_state_dict(pair: Pair, make: Make) -> Pair:
    return fresh(pair, make, saved(pair[1].state_dict()))


def optimizer_first(pair: Pair, make: Make) -> Pair:
    model = net("E4M3" if hasattr(pair[0].head, "grid") else None)
    optimizer = make(model.named_parameters())
    optimizer.load_state_dict(saved(pair[1].state_dict()))
    model.load_state_dict(saved(pair[0].state_dict()))
    return model, optimizer


def with_load_hooks(pair: Pair, make: Make) -> Pair:
    """A checkpoint of other keys, mended by a hook, as for renamed parameters; another hook looks at the result."""
    state = saved(pair[1].state_dict())
    state["state"] = {f"old {key}": value for key, value in state["state"].items()}
    model = net("E4M3" if hasattr(pair[0].head, "grid") else None)
    model.load_state_dict(pair[0].state_dict())
    optimizer = make(model.named_parameters())
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, given: given | {"state": {int(k.split()[1]): v for k, v in given["state"].items()}}
    )
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(own.state[model.head.weight]["exp_avg"]))
    optimizer.load_state_dict(state)
    assert torch.equal(seen[0], pair[1].state[pair[0].head.weight]["exp_avg"])
    return model, optimizer


def in_another_order(pair: Pair, make: Make) -> Pair:
    """Parameters in another order, brought together by their names."""
    state = saved(pair[1].state_dict())
    model = net("E4M3" if hasattr(pair[0].head, "grid") else None)
    model.load_state_dict(pair[0].state_dict())
    optimizer = make(list(model.named_parameters())[::-1])

    def by_name(own: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        old = {
            n: i for group in given["param_groups"] for n, i in zip(group["param_names"], group["params"], strict=True)
        }
        new = own.state_dict()["param_groups"]
        state = {
            i: given["state"][old[n]]
            for group in new
            for n, i in zip(group["param_names"], group["params"], strict=True)
        }
        kept = {"params", "param_names"}
        groups = [
            {k: v for k, v in was.items() if k not in kept} | {k: group[k] for k in kept}
            for was, group in zip(given["param_groups"], new, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(by_name)
    optimizer.load_state_dict(state)
    return model, optimizer


def flat_tensors(pair: Pair, make: Make) -> Pair:
    """What a file of flat tensors holds: contiguous tensors by name, numbers as tensors."""
    state = pair[1].state_dict()
    file = {
        f"{i}.{k}": torch.as_tensor(v).contiguous().clone() for i, own in state["state"].items() for k, v in own.items()
    }
    rebuilt: dict[int, dict[str, Any]] = {}
    for name, value in saved(file).items():
        index, key = name.split(".", 1)
        rebuilt.setdefault(int(index), {})[key] = value
    return fresh(pair, make, {"state": rebuilt, "param_groups": state["param_groups"]})


def in_double(pair: Pair, make: Make) -> Pair:
    """A checkpoint whose floating-point state was widened."""
    state = saved(pair[1].state_dict())
    for own in state["state"].values():
        for key, value in own.items():
            own[key] = value.double() if value.is_floating_point() else value
    return fresh(pair, make, state)


def transposed_memory(pair: Pair, make: Make) -> Pair:
    """State laid out the other way round, as other tools write matrices."""
    state = saved(pair[1].state_dict())
    for own in state["state"].values():
        for key, value in own.items():
            own[key] = value.t().contiguous().t() if value.dim() == 2 else value
    return fresh(pair, make, state)


def under_another_default_dtype(pair: Pair, make: Make) -> Pair:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = copy.deepcopy(pair[0])
        optimizer = make(model.named_parameters())
        optimizer.load_state_dict(saved(pair[1].state_dict()))
        return model, optimizer
    finally:
        torch.set_default_dtype(torch.float32)


def shared_memory(pair: Pair, make: Make) -> Pair:
    """A state_dict is not copied: what was loaded from it must not be moved by the optimizer it came from."""
    model, optimizer = fresh(pair, make, copy.copy(pair[1].state_dict()))
    return model, optimizer


ROADS: dict[str, Callable[[Pair, Make], Pair]] = {
    "state_dict": by_state_dict,
    "optimizer first": optimizer_first,
    "load hooks": with_load_hooks,
    "another order": in_another_order,
    "flat tensors": flat_tensors,
    "double": in_double,
    "transposed memory": transposed_memory,
    "default dtype": under_another_default_dtype,
    "shared memory": shared_memory,
    "deepcopy": lambda pair, _: copy.deepcopy(pair),
    "pickle": lambda pair, _: pickle.loads(pickle.dumps(pair)),
}

OPTIMIZERS: dict[str, Make] = {
    **{name: ARMS[name] for name in ("adamw", "manifold_sr", "grid_carry", "muon")},
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
}

REORDERING_CHANGES_DRAWS = {"manifold_sr", "grid_carry"}
"""Draws belong to a parameter's place among all, so an order of its own is another stream of them."""


@pytest.mark.parametrize("before", [0, 4], ids=["before the first step", "after four"])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_arrives_equal(name, road, before):
    make = OPTIMIZERS[name]
    model = net(None if name == "torch AdamW" else "E4M3")
    optimizer = make(model.named_parameters())
    train(model, optimizer, range(before))
    if name == "torch AdamW" and road == "shared memory":
        pytest.skip("torch's optimizers share what they load")
    if not optimizer.state and road in ("load hooks", "another order"):
        pytest.skip("there is no state yet")
    other_model, other = ROADS[road]((model, optimizer), make)
    for one, two in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        if road != "another order":
            assert one.keys() == two.keys()
            for key in one:
                assert torch.equal(torch.as_tensor(one[key]).double(), torch.as_tensor(two[key]).double()), key
    assert equal(weights(model), weights(other_model))
    # One after the other: memory that the two share would show.
    later = range(before, before + 20)
    ours = train(model, optimizer, later)
    theirs = train(other_model, other, later)
    if road == "another order" and name in REORDERING_CHANGES_DRAWS:
        assert ours[0] == theirs[0] and theirs[-1] < 2 * ours[-1]
        return
    assert ours == theirs
    assert equal(weights(model), weights(other_model))


@pytest.mark.parametrize("name", ["adamw", "manifold", "manifold_sr"])
def test_state_of_torchs_adamw_goes_on_in_ours(name):
    """Moments and steps mean the same there; what is ours alone starts from the weights."""
    model = net()
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, theirs, range(40))
    groups = ARMS[name]([{"params": list(model.parameters()), "format": "E4M3"}])
    groups.load_state_dict(theirs.state_dict())
    assert groups.param_groups[0]["lr"] == 1e-3 and groups.param_groups[0]["format"] == "E4M3"
    state = groups.state[model.head.weight]
    assert int(state["step"]) == 40
    before = weights(model)
    train(model, groups, range(1))
    change = max((a - b).abs().max().item() for a, b in zip(before, weights(model), strict=True))
    assert 0 < change < 0.2 and all(bool(w.isfinite().all()) for w in weights(model))


def test_partial_state_starts_what_is_missing():
    for make in (OPTIMIZERS["adamw"], OPTIMIZERS["torch AdamW"]):
        model = net()
        optimizer = make(list(model.parameters()))
        train(model, optimizer)
        state = saved(optimizer.state_dict())
        del state["state"][1]
        optimizer.load_state_dict(state)
        parameter = [p for group in optimizer.param_groups for p in group["params"]][1]
        train(model, optimizer, range(1))
        assert int(optimizer.state[parameter]["step"]) == 1


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a moment is missing": (lambda s: s.pop("exp_avg_sq"), "lacks 'exp_avg_sq'"),
    "another shape": (lambda s: s.update(exp_avg=torch.zeros(3)), r"'exp_avg' of parameter .*got float32 \(3,\)"),
    "the same length": (lambda s: s.update(exp_avg=s["exp_avg"].reshape(-1)[None]), "the parameter's shape"),
    "complex": (lambda s: s.update(exp_avg=s["exp_avg"].to(torch.complex64)), "complex64"),
    "boolean": (lambda s: s.update(exp_avg=s["exp_avg"] > 0), "got bool"),
    "sparse": (lambda s: s.update(exp_avg=s["exp_avg"].to_sparse()), "sparse_coo"),
    "on no device": (lambda s: s.update(exp_avg=s["exp_avg"].to("meta")), "on meta"),
    "too fine": (lambda s: s.update(exp_avg=s["exp_avg"].double() + 1e-13), "cannot hold"),
    "half a step": (lambda s: s.update(step=torch.tensor(2.5)), r"got 2.5; allowed: .*whole number"),
    "no number": (lambda s: s.update(step=torch.tensor(float("nan"))), "got nan"),
    "backwards": (lambda s: s.update(step=-1), "got -1"),
    "words": (lambda s: s.update(step="12"), "got a str"),
    "many steps": (lambda s: s.update(step=torch.ones(2)), r"got float32 \(2,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_state_that_no_kernel_could_take_is_refused_and_nothing_changes(case):
    spoil, message = BAD[case]
    model = net()
    optimizer = ARMS["adamw"](model.parameters())
    train(model, optimizer)
    state = saved(optimizer.state_dict())
    spoil(state["state"][0])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for one, two in zip(before["state"].values(), after["state"].values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_checkpoint_of_another_recipe_names_both():
    recipes = {
        "format='E5M2'": lambda p: ARMS["adamw"]([{"params": list(p), "format": "E5M2"}]),
        "rounding='stochastic'": lambda p: ARMS["manifold_sr"]([{"params": list(p), "format": "E4M3"}]),
    }
    for said, make in recipes.items():
        source = make(nn.Linear(4, 4).parameters())
        target = ARMS["manifold" if "rounding" in said else "adamw"](
            [{"params": list(nn.Linear(4, 4).parameters()), "format": "E4M3"}]
        )
        with pytest.raises(ValueError, match=f"made with .*{said}.* this optimizer has .*"):
            target.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="rule='lion'"):
        ARMS["adamw"](net().parameters()).load_state_dict(ARMS["lion"](net().parameters()).state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameters_no_step_could_move_exactly_are_refused(dtype):
    with pytest.raises(ValueError, match=r"parameter 0 \(3, 4\) has dtype .*; allowed: float32"):
        ARMS["adamw"]([nn.Parameter(torch.zeros(3, 4, dtype=dtype))])
    model = net()
    optimizer = ARMS["adamw"](model.parameters())
    model.to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="allowed: float32"):
        optimizer.step()
