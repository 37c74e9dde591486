"""Faults to plant in a run, for the tests of the guards and the table of what each guard catches.

Each takes a Trainer before its first step and the step at which the fault happens, and names the layer that it hits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from altgrad.quantization import Role
from altgrad.quantization.roles import RoleQuantizer
from altgrad.quantization.scaling import ScaleRule
from altgrad.training import ARMS, TrainConfig, Trainer
from altgrad.training.workers import Share

HEAD, BRANCH, MIDDLE = "lm_head", "transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_fc"

AT = 24
"""The step at which a fault is planted; checks are at multiples of 10."""


def config(arm: str = "adamw", format: str = "E4M3", **changes: Any) -> TrainConfig:
    optimizer = ARMS[arm].model_dump() | {"lr": changes.pop("lr", ARMS[arm].lr)}
    base = {
        "model": {"layers": 2, "heads": 2, "width": 32, "block": 64},
        "data": {"batch": 4, "eval_batches": 1},
        "steps": 100,
        "eval_interval": 100,
        "checkpoint_interval": 100,
    }
    return TrainConfig(**(base | {"optimizer": optimizer, "format": format} | changes))


Fault = Callable[[Trainer, int], None]


def at_step(trainer: Trainer, step: int, act: Callable[[], None], *, on: bool = False) -> None:
    """Does something right before a training step; with `on`, before every later one too."""
    train_step = trainer._train_step

    def with_fault(number: int, **rest: Any) -> Tensor:
        if number == step or (on and number > step):
            act()
        return train_step(number, **rest)

    trainer._train_step = with_fault  # type: ignore[method-assign]


def weight_of(trainer: Trainer, layer: str) -> torch.nn.Parameter:
    return trainer.model.get_submodule(layer).weight  # type: ignore[return-value]


@torch.no_grad()
def _poison(weight: Tensor) -> None:
    weight[0, 0] = torch.nan


def nan_weight(trainer: Trainer, step: int, layer: str = MIDDLE) -> None:
    at_step(trainer, step, lambda: _poison(weight_of(trainer, layer)))


def nan_gradient(trainer: Trainer, step: int, layer: str = MIDDLE) -> None:
    def poison() -> None:
        hook = weight_of(trainer, layer).register_hook(lambda gradient: gradient * torch.nan)
        at_step(trainer, step + 1, hook.remove)

    at_step(trainer, step, poison)


def nan_loss(trainer: Trainer, step: int) -> None:
    loss = trainer.task.loss

    def broken(model: torch.nn.Module, number: int, *share: Share) -> Tensor:
        return loss(model, number, *share) * (torch.nan if number == step else 1.0)

    trainer.task.loss = broken  # type: ignore[method-assign]


def inf_activation(trainer: Trainer, step: int, layer: str = MIDDLE) -> None:
    def poison() -> None:
        module = trainer.model.get_submodule(layer)
        hook = module.register_forward_hook(lambda _, args, y: y + torch.inf, prepend=True)
        at_step(trainer, step + 1, hook.remove)

    at_step(trainer, step, poison)


def frozen_layer(trainer: Trainer, step: int, layer: str = MIDDLE) -> None:
    """The layer's learning rate is 0 from the step on: it gets a gradient and nothing is applied."""
    parameter = weight_of(trainer, layer)
    group = next(group for group in trainer.optimizer.param_groups if any(p is parameter for p in group["params"]))
    group["params"] = [p for p in group["params"] if p is not parameter]
    trainer.optimizer.add_param_group({**group, "params": [parameter]})
    own = trainer.optimizer.param_groups[-1]
    at_step(trainer, step, lambda: own.update(lr=0.0), on=True)


def collapse(trainer: Trainer, step: int, layer: str = HEAD, share: float = 0.2) -> None:
    """Before every step from this one on, a share of all but the layer's first singular direction is lost."""

    @torch.no_grad()
    def shrink() -> None:
        weight = weight_of(trainer, layer)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((1 - share) * weight + share * s[0] * u[:, :1] @ v[:1])

    at_step(trainer, step, shrink, on=True)


def collapse_branch(trainer: Trainer, step: int) -> None:
    collapse(trainer, step, BRANCH)


def bad_scale(trainer: Trainer, step: int, layer: str = MIDDLE, role: str = "activation") -> None:
    """The scale of what the layer multiplies becomes 1/64 of what it should be."""

    def shrink() -> None:
        module = trainer.model.get_submodule(layer)
        own = module.quantizers()[role].role  # type: ignore[operator]
        wrong = Role(format=own.format, scale=ScaleRule(headroom=1 / 64), rounding=own.rounding)
        setattr(module, f"{role}_quantizer", RoleQuantizer(wrong))

    at_step(trainer, step, shrink)
