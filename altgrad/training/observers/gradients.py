"""Gradients as they arrive, and what the step made of them, at the last step of every log interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from altgrad.quantization import DeadUnits, gradient_statistics, stiffness_pearson, ulp_statistics, update_statistics
from altgrad.training.observers.base import Moment, Observer, Readings, Subject
from altgrad.training.observers.weights import grid_scale


class GradientObserver(Observer):
    """Norms, SNR and dead units of each weight's gradient before clipping, and the size of the update it led to."""

    def __init__(self, subject: Subject) -> None:
        self._weights, self._formats = subject.watched, dict(subject.formats)
        self._dead = DeadUnits()
        self._before: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._found: Readings = {}
        self._moment = Moment(0, check=False, detail=False)

    def start_step(self, moment: Moment) -> None:
        self._moment = moment

    def before_update(self) -> None:
        if not self._moment.check:
            return
        for name, weight in self._weights.items():
            if weight.grad is not None:
                self._look(name, weight, weight.grad)

    def _look(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        statistics = gradient_statistics(gradient)
        self._found |= {
            (name, "grad_l2"): statistics.l2,
            (name, "grad_linf"): statistics.linf,
            (name, "grad_snr"): statistics.snr,
            (name, "grad_zero"): statistics.zero,
            (name, "dead_units"): self._dead.update(name, self._moment.step, gradient),
        }
        self._before[name] = weight.detach().clone()
        if self._moment.detail and name in self._formats:
            fmt = self._formats[name][1]
            self._scales[name] = grid_scale(weight, fmt).clone()
            self._found[name, "stiffness_correlation"] = stiffness_pearson(gradient, weight, fmt)

    def after_update(self) -> None:
        for name, before in self._before.items():
            after = self._weights[name].detach()
            self._found[name, "update_ratio"] = update_statistics(before, after - before).rms_ratio
            if name in self._scales:
                travel = ulp_statistics(before, after, self._formats[name][1], self._scales[name])
                self._found[name, "ulp_travel_max"] = travel.max
        self._before, self._scales = {}, {}

    def collect(self) -> Readings:
        found, self._found = self._found, {}
        return found

    def state_dict(self) -> dict[str, Any]:
        return self._dead.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._dead.load_state_dict(state)
