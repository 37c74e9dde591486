"""How many of torch's operators a converted model's step dispatches: each costs host time, on a GPU more than its work.

Counted from the profiler's events, as the operators that a dispatch mode would see; the mode itself would turn the
compiled kernels off, which cannot be recorded.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad.quantization import POLICIES, LayerRule, PrecisionPolicy, Role, ScaleRule, named_policy, quantize_model
from altgrad.training.config import ModelConfig
from altgrad.training.model import GPT, build_model

MODEL = ModelConfig(layers=2, heads=2, width=64, block=16)
MOST = 230


class _Counting(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@cache
def _is_composite(name: str) -> bool:
    """Whether the operator of an event is made of others before anything is dispatched."""
    _, overloads = torch._C._jit_get_operation(name)
    names = [f"{name}.{overload}" if overload else name for overload in overloads or ()]
    known = [full for full in names if torch._C._dispatch_has_kernel(full)]
    key = "CompositeImplicitAutograd"
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(full, key) for full in known)


def _dispatched(model: GPT) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        _step(model)
    count = 0
    for event in found.events():
        parent, is_outermost = event, event.name.startswith(("aten::", "altgrad::")) and not _is_composite(event.name)
        while is_outermost and (parent := parent.cpu_parent) is not None:
            is_outermost = not parent.name.startswith(("aten::", "altgrad::")) or _is_composite(parent.name)
        count += is_outermost
    return count


def _step(model: GPT) -> Tensor:
    model.zero_grad(set_to_none=True)
    tokens = torch.arange(32).view(2, 16)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss


def _policy(weight: Role, gradient: Role) -> PrecisionPolicy:
    return PrecisionPolicy(rules=(LayerRule(pattern="", weight=weight, activation=weight, gradient=gradient),))


def _by_rule(rounding: str = "nearest", **rule: object) -> PrecisionPolicy:
    roles = (Role(format=fmt, scale=ScaleRule.model_validate(rule), rounding=rounding) for fmt in ("E4M3", "E5M2"))
    return _policy(*roles)


ALL = {
    **{f"{fmt} {name}": named_policy(name, fmt) for name in POLICIES for fmt in ("BF16", "E4M3", "E7M0")},
    "delayed": _by_rule(kind="delayed"),
    "per channel": _by_rule(kind="per_channel"),
    "stochastic": _by_rule("stochastic"),
    "toward zero": _by_rule("toward_zero"),
    "MX": _by_rule(kind="block"),
    "NVFP4-like": _by_rule(kind="block", block_scale_format="E4M3"),
}


def test_the_count_is_that_of_a_dispatch_mode() -> None:
    model = build_model(MODEL, vocabulary=64, seed=0)
    _step(model)
    with _Counting() as mode:
        _step(model)
    assert 0 <= mode.count - _dispatched(model) <= 8  # the mode sees some calls of detach that raise no event


@pytest.mark.parametrize("name", ALL)
def test_a_step_dispatches_little_more_than_a_plain_one(name: str) -> None:
    model = build_model(MODEL, vocabulary=64, seed=0)
    quantize_model(model, policy=ALL[name])
    _step(model)
    assert _dispatched(model) <= MOST


@pytest.mark.parametrize("name", ["E4M3 uniform_full", "per channel", "stochastic", "NVFP4-like"])
def test_a_graph_holds_one_operator_for_each_operand(name: str) -> None:
    # Imports triton, whose interpreter other tests ask for before its first import.
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    quantize_model(model, policy=ALL[name])
    x = torch.randn(4, 16, requires_grad=True)
    torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x).sum().backward()
    forward, backward = graphs
    assert forward.count("altgrad.operand.default") == 2
    assert backward.count("altgrad.operand.default") == 1
    # Bias and rounding of the output, its shape; the products' transposes and shapes: no scale, no guard of infinities.
    assert len(forward) + len(backward) <= 20
