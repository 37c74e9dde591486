"""Random state for load_state_dict, in a process of its own: a kernel that read wild memory would take it down.

Each round spoils a checkpoint (dtypes, layouts, shapes, devices, origins, keys, numbers, groups). Either a ValueError
comes and nothing has changed, or the next step equals that of an optimizer whose state was converted by hand.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import warnings
from typing import Any

import numpy as np
import torch
from host_models import ARMS, net, train
from torch import Tensor

from altgrad.quantization import get_format, weight_grid

warnings.filterwarnings("ignore")

FLOATS_AND_COUNTS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32]
DTYPES = [*FLOATS_AND_COUNTS, torch.int16, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
NUMBERS = [0, 1, 2, 5, 16, 17, 40, 2.5, -1, 1e9, 2**24, math.nan, math.inf, -math.inf, 1e-45, 1e-30, 0.25, 3.7, True]
KEYS = ["step", "exp_avg", "exp_avg_sq", "carry", "mean_spacing", "grid_scale", "overflow_streak"]


def laid_out(value: Tensor, rng: random.Random) -> Any:
    """The same numbers in another layout, or of another origin."""
    kind = rng.choice(
        ["transposed", "slice", "negated", "shared row", "read-only", "leaf", "inference", "sparse", "meta", "view"]
    )
    if kind == "transposed" and value.dim() == 2:
        return value.t().contiguous().t()
    if kind == "slice" and value.dim():
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), math.pi).to(value.dtype)
        wide[..., ::2] = value
        return wide[..., ::2]
    if kind == "negated" and value.is_floating_point() and value.dtype.itemsize > 1:
        return torch._neg_view(-value)
    if kind == "shared row" and value.dim() == 2:
        return value[:1].expand_as(value)
    if kind == "read-only" and value.dtype in (torch.float32, torch.float64, torch.int64):
        array = np.array(value.detach().numpy())
        array.setflags(write=False)
        return torch.from_numpy(array)
    if kind == "leaf" and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    if kind == "inference":
        with torch.inference_mode():
            return value.clone()
    if kind == "sparse" and value.dim() and value.dtype == torch.float32:
        return value.to_sparse()
    return value.to("meta") if kind == "meta" else value.view_as(value)


def shaped(value: Tensor, rng: random.Random) -> Tensor:
    kind = rng.choice(["flat", "deeper", "short", "long", "empty", "number", "one"])
    return {
        "flat": lambda: value.reshape(-1),
        "deeper": lambda: value[None],
        "short": lambda: value.reshape(-1)[:-1],
        "long": lambda: torch.cat([value.reshape(-1), value.reshape(-1)]),
        "empty": lambda: value.reshape(-1)[:0],
        "number": lambda: value.reshape(-1)[0] if value.numel() else value,
        "one": lambda: value.reshape(-1)[:1],
    }[kind]()


def spoil(given: dict[str, Any], rng: random.Random) -> None:
    """One change to a checkpoint."""
    index = rng.choice(list(given["state"]))
    state = given["state"][index]
    if not state or rng.random() < 0.15:
        group = rng.choice(given["param_groups"])
        change = rng.choice(["lr", "betas", "format", "drop", "extra", "calls", "rounding"])
        if change == "drop":
            group.pop(rng.choice([key for key in group if key != "params"]))
        elif change == "extra":
            group["fused"] = True
        else:
            group[change] = {
                "lr": rng.choice([0.02, -1.0, "fast", math.nan, torch.tensor(0.01)]),
                "betas": rng.choice([(0.5, 0.6), (0.9,), (0.9, 1.5), None]),
                "format": rng.choice(["E5M2", "E4M3", None]),
                "calls": rng.choice([3, 100]),
                "rounding": rng.choice([None, "nearest", "stochastic"]),
            }[change]
        return
    key = rng.choice(list(state))
    value = state[key]
    kind = rng.choice(
        ["dtype", "dtype", "layout", "layout", "shape", "number", "drop", "strange", "swap", "add", "junk"]
    )
    if kind == "number":
        number = rng.choice(NUMBERS)
        state[key] = number if rng.random() < 0.3 else torch.tensor(number, dtype=rng.choice([None, torch.float64]))
    elif kind == "drop":
        del state[key]
    elif kind == "strange":
        state[key] = rng.choice([None, "0.5", [1.0, 2.0], {"a": 1}, np.float32(2.0), object()])
    elif kind == "swap":
        other = rng.choice(list(given["state"].values()))
        state[key] = rng.choice(list(other.values()) or [1])
    elif kind == "add":
        state[rng.choice(KEYS)] = torch.zeros(rng.choice([(), (4, 16), (3,)]), dtype=rng.choice(FLOATS_AND_COUNTS))
    elif kind == "junk":
        state["max_exp_avg_sq"] = torch.zeros(2)
    elif isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided:
        if kind == "dtype":
            state[key] = value.detach().to(rng.choice(DTYPES))
        else:
            state[key] = (laid_out if kind == "layout" else shaped)(value.detach(), rng)


def by_hand(given: dict[str, Any], optimizer: Any) -> None:
    """The checkpoint's state as plain tensors, put where the optimizer keeps it, through numpy's float64."""
    for group, saved in zip(optimizer.param_groups, given["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            state = optimizer.state[parameter] = {}
            for key, value in given["state"].get(index, {}).items():
                if key not in KEYS:
                    continue
                if isinstance(value, Tensor):
                    assert value.layout == torch.strided and not value.is_meta and not value.is_complex(), "was let in"
                    value = value.detach().clone().resolve_neg().to(torch.float64).numpy()
                is_shaped = key in ("exp_avg", "exp_avg_sq", "carry")
                dtype = {"overflow_streak": torch.int64, "mean_spacing": torch.float64}.get(key, torch.float32)
                wanted = np.asarray(value, dtype=np.float64).reshape(tuple(parameter.shape) if is_shaped else ())
                state[key] = torch.from_numpy(wanted.copy()).to(dtype)
                assert np.array_equal(state[key].double().numpy(), wanted, equal_nan=True), "a bit was lost"
            if "grid_scale" in state and group["format"] is not None and optimizer._is_resident(group):
                weight_grid(parameter).own(optimizer, get_format(group["format"]), state["grid_scale"])
    optimizer._forget()


def step(optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def same(one: Any, two: Any) -> bool:
    if not isinstance(one, Tensor):
        return one == two
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.nan_to_num(1.5), two.nan_to_num(1.5))


def round_of(seed: int, trained: dict[str, tuple[Any, Any]]) -> str:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    arm = rng.choice(list(trained))
    (model, optimizer), (other_model, other) = (copy.deepcopy(trained[arm]) for _ in range(2))
    given = copy.deepcopy(optimizer.state_dict())
    for _ in range(rng.randint(1, 2)):
        spoil(given, rng)
    before = copy.deepcopy(optimizer.state_dict())
    kept = copy.copy(given)
    kept["state"] = {index: dict(state) for index, state in given["state"].items()}
    kept["param_groups"] = [dict(group) for group in given["param_groups"]]
    try:
        torch.set_default_dtype(rng.choice([torch.float32, torch.bfloat16, torch.float64]))
        optimizer.load_state_dict(given)
    except ValueError:
        after = optimizer.state_dict()
        assert all(same(s[key], after["state"][i][key]) for i, s in before["state"].items() for key in s), "changed"
        return "refused"
    finally:
        torch.set_default_dtype(torch.float32)
    by_hand(kept, other)
    for number in range(2):
        step(optimizer, number)
        step(other, number)
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert same(one, two), "another step"
        for key, value in other.state[two].items():
            assert key not in KEYS or same(optimizer.state[one][key], value), key
    return "loaded"


def main(first: int, rounds: int) -> None:
    torch.set_num_threads(1)
    trained = {}
    for arm in ("adamw", "manifold", "manifold_sr", "eco", "grid_carry", "lion"):
        model = net()
        trained[arm] = model, ARMS[arm](model.parameters())
        train(*trained[arm], range(3))
    ends = {"refused": 0, "loaded": 0}
    for seed in range(first, first + rounds):
        try:
            ends[round_of(seed, trained)] += 1
        except BaseException as error:
            raise SystemExit(f"round {seed}: {type(error).__name__}: {error}") from error
    print(ends)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
