"""A float32 shadow: what the gradient of this step would have been without quantization.

At the checks its schedule names, a float32 copy of the model takes the weights as they are, sees the same batch and
has its own backward pass. Compared layer by layer:

    gradient_cosine      <g, s> / (|g| |s|)               g: the run's gradient, s: the shadow's
    gradient_shadow_snr  10 log10(|s|^2 / |g - s|^2)      dB

It costs one more training step per measurement and a second copy of the weights; the run itself is not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from altgrad.training.observers.base import Layers, Moment, Observer, Readings, Subject
from altgrad.training.tasks import Task, device_of


class ShadowObserver(Observer):
    """The task makes the float32 model, and has the loss of each step's batch."""

    def __init__(self, subject: Subject, task: Task) -> None:
        self._subject, self._task = subject, task
        self._shadow: nn.Module | None = None
        self._moment = Moment(0, check=False, detail=False)
        self._found: Readings = {}

    def start_step(self, moment: Moment) -> None:
        self._moment = moment

    def before_update(self) -> None:
        if not self._moment.shadow:
            return
        gradients = self._shadow_gradients()
        for name, parameter in self._subject.watched.items():
            own, shadow = parameter.grad, gradients.get(parameter)
            if own is not None and shadow is not None:
                self._compare(name, own.double(), shadow.double())

    def collect(self) -> Readings:
        found, self._found = self._found, {}
        return found

    def finish(self, layers: Layers, row: dict[str, Any]) -> None:
        sums = [values.pop("_shadow") for values in layers.values() if "_shadow" in values]
        if not sums:
            return
        parts = {
            name: sum(values.pop(name) for values in layers.values() if name in values)
            for name in ("_dot", "_own", "_error")
        }
        total = torch.tensor([parts["_dot"], parts["_own"], sum(sums), parts["_error"]], dtype=torch.float64)
        row["gradient_cosine"], row["gradient_shadow_snr"] = (float(v) for v in _scores(*total))

    def _compare(self, name: str, own: Tensor, shadow: Tensor) -> None:
        dot, mine, theirs = (own * shadow).sum(), own.square().sum(), shadow.square().sum()
        error = (own - shadow).square().sum()
        cosine, snr = _scores(dot, mine, theirs, error)
        self._found |= {
            (name, "gradient_cosine"): cosine,
            (name, "gradient_shadow_snr"): snr,
            (name, "_dot"): dot,
            (name, "_own"): mine,
            (name, "_shadow"): theirs,
            (name, "_error"): error,
        }

    def _shadow_gradients(self) -> dict[nn.Parameter, Tensor]:
        model = self._subject.model
        if self._shadow is None:
            self._shadow = self._task.build().to(device_of(model))
        shadow = self._shadow.train(model.training)
        pairs = dict(zip(model.parameters(), shadow.parameters(), strict=True))
        for own, copy in pairs.items():
            copy.data.copy_(own.data)
        with torch.enable_grad():
            found = torch.autograd.grad(
                self._task.loss(shadow, self._moment.step), list(pairs.values()), allow_unused=True
            )
        return {own: gradient for own, gradient in zip(pairs, found, strict=True) if gradient is not None}


def _scores(dot: Tensor, own: Tensor, shadow: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    return dot / (own * shadow).sqrt(), 10.0 * (shadow / error).log10()
