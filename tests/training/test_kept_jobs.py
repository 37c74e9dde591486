"""What an optimizer keeps of a parameter between steps is only for speed: it gives way to whatever others change."""

import copy
import weakref

import pytest
import torch

from altgrad.training import GridOptim, ManifoldAdamW, RoundedAdamW, RoundedOptimizer


def _clear_state(optimizer, parameter):
    optimizer.state.clear()


def _new_momentum(optimizer, parameter):
    optimizer.state[parameter]["exp_avg"] = torch.full_like(parameter, 0.5)


def _other_memory(optimizer, parameter):
    parameter.data = parameter.detach().clone()


def _other_seed(optimizer, parameter):
    optimizer.param_groups[0]["seed"] = 99


def _other_scale(optimizer, parameter):
    if hasattr(parameter, "grid") and parameter.grid.scale is not None:
        parameter.grid.scale = parameter.grid.scale * 2


def _reloaded(optimizer, parameter):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _turned(optimizer, parameter):
    parameter.data = parameter.detach().t()


CHANGES = (_clear_state, _new_momentum, _other_memory, _other_seed, _other_scale, _reloaded, _turned)
KEEPING = {
    "master": lambda p: RoundedAdamW(p, format="E4M3"),
    "stochastic": lambda p: ManifoldAdamW(p, format="E4M3", rounding="stochastic"),
    "grid": lambda p: GridOptim(p, format="E4M3", carry=True),
    "lion": lambda p: RoundedOptimizer(p, "lion", format="E4M3"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arm", KEEPING)
def test_what_is_kept_from_step_to_step_gives_way_to_what_others_change(arm: str, change):
    """Against an optimizer that keeps nothing."""
    found = []
    for keeps in (True, False):
        generator = torch.Generator().manual_seed(3)
        parameter = torch.nn.Parameter(torch.randn(24, 24, generator=generator) * 0.05)
        optimizer = KEEPING[arm]([parameter])
        for step in range(6):
            parameter.grad = torch.randn(24, 24, generator=generator)
            if step == 3:
                change(optimizer, parameter)
            if not keeps:
                for kept in optimizer._kept.values():
                    kept.job = None
            optimizer.step()
        found.append((parameter.detach().clone(), optimizer.state[parameter]))
    (weight, state), (expected, expected_state) = found
    assert torch.equal(weight, expected) and state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


@pytest.mark.parametrize("arm", KEEPING)
def test_no_gradient_outlives_its_step(arm: str):
    parameter = torch.nn.Parameter(torch.randn(16, 16) * 0.05)
    optimizer = KEEPING[arm]([parameter])
    parameter.grad = torch.randn(16, 16)
    gone = weakref.ref(parameter.grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert gone() is None
