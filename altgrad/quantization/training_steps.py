"""When a training step ends, for layers that keep something from one step to the next.

A step is what an optimizer makes of it: any number of forward passes, recomputed ones and evaluations among them, and
one `optimizer.step()`. A hook on all of torch's optimizers therefore moves a layer on when the optimizer that holds its
weight has stepped. A layer whose weight no living optimizer holds (frozen, an adapter beside it, flattened by a
sharding wrapper) moves on with every optimizer if it has run in training since. A step that a gradient scaler leaves
out does not count.
"""

from __future__ import annotations

import threading
import weakref
from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_STATEFUL: weakref.WeakSet[Any] = weakref.WeakSet()
_HOLDERS: weakref.WeakKeyDictionary[Any, weakref.ref[torch.optim.Optimizer]] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def follow_steps(layer: Any) -> None:
    """Calls the layer's `end_step()` after each training step from now on."""
    _install()
    with _LOCK:
        _STATEFUL.add(layer)


def forget_steps(layer: Any) -> None:
    """Leaves the layer as it is from now on."""
    with _LOCK:
        _STATEFUL.discard(layer)


@cache
def _install() -> None:
    register_optimizer_step_post_hook(_end_step)


def _end_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling():
        if getattr(optimizer, "ends_its_steps", False):
            return  # at run time, from within the op that is its step
        torch._dynamo.graph_break()
    end_step_of(optimizer)


def end_step_of(optimizer: torch.optim.Optimizer) -> None:
    """Moves on the layers whose weights the optimizer holds."""
    held = _held_by(optimizer)
    for layer in _layers():
        weight = layer.held_parameter()
        if id(weight) in held:
            _HOLDERS[layer] = weakref.ref(optimizer)
            layer.end_step()
            continue
        holder = _HOLDERS[layer]() if layer in _HOLDERS else None
        is_free = holder is None or id(weight) not in _held_by(holder)
        if layer.has_run and is_free and not _awaits_step(weight):
            layer.end_step()


def _layers() -> list[Any]:
    with _LOCK:
        return list(_STATEFUL)


def _held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _awaits_step(weight: Any) -> bool:
    """Whether a weight has a gradient to be used: it is somebody's, whose step is still to come."""
    return weight is not None and weight.requires_grad and weight.grad is not None
