"""A step under torch.compile: one op of the graph, which runs the eager step of the optimizer it names.

Nothing of the step is traced, so learning rates, counts and state are read when the op runs, and no step compiles
anything again. The op says that it changes the weights; its other effects are the optimizer's own.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad.quantization.training_steps import end_step_of
from altgrad.training.kernels import Count

_HANDLES: Iterator[int] = itertools.count()
_OPTIMIZERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def handle_of(optimizer: torch.optim.Optimizer) -> int:
    """A number that stands for the optimizer in graphs, for as long as it lives."""
    handle = next(_HANDLES)
    _OPTIMIZERS[handle] = optimizer
    return handle


def step_in_graph(handle: int, groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Puts the step into the graph that is being traced; its summed counts, [1, len(Count)], none without gradients."""
    moved, places, place = [], [], 0
    for group in groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                moved.append(parameter)
                places.append(place)
            place += 1
    return [_step_op(handle, places, moved, [p.grad for p in moved])] if moved else []


@torch.library.custom_op("altgrad::optimizer_step", mutates_args=("weights",))
def _step_op(handle: int, places: list[int], weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    """A graph may hand over copies of the parameters, and gradients that it has changed; `places`: which they are."""
    optimizer = _OPTIMIZERS[handle]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = [parameters[place] for place in places]
    with torch.no_grad():
        apart = [(p, w) for p, w in zip(held, weights, strict=True) if p.data_ptr() != w.data_ptr()]
        for parameter, weight in apart:
            parameter.data.copy_(weight)
        optimizer._step(dict(zip(held, grads, strict=True)))
        end_step_of(optimizer)
        for parameter, weight in apart:
            weight.copy_(parameter)
    # The graph writes to the parameters once more when it ends, and what it writes is what they are.
    optimizer._seen.clear()
    return torch.stack([rows.sum(0) for _, rows in optimizer.counted]).sum(0, keepdim=True)


@_step_op.register_fake
def _step_shape(handle: int, places: list[int], weights: list[Tensor], grads: list[Tensor]) -> Tensor:
    return torch.empty(1, len(Count), dtype=torch.int64, device=weights[0].device)
