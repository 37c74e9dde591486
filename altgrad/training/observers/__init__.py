"""Observers: what can be seen on a step without changing it.

They read what the optimizer counted in its own pass, look at weights, gradients and activations through hooks, hold
0-d tensors between log intervals, and everything of an interval is fetched in one host sync. Nothing here may change
a bit of the training; a test holds that. Windows count training steps: the counts of a row are sums over the steps
since the row before. `catalogue.py` says what each signal means and when it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad.training.catalogue import over_layers
from altgrad.training.config import ObserveConfig
from altgrad.training.observers.base import Layers, Moment, Observer, Readings, Subject
from altgrad.training.observers.counts import CountsObserver
from altgrad.training.observers.gradients import GradientObserver
from altgrad.training.observers.tensors import OutputSums, TensorObserver
from altgrad.training.observers.weights import CatalogueObserver, GridObserver, NonfiniteObserver, RankObserver
from altgrad.training.reference import ReferenceCurve

__all__ = ["Layers", "Moment", "Observer", "Observers", "Readings", "Subject"]


class Observers:
    """All observers of a run, called together; `extra` are more of them, of one's own."""

    def __init__(
        self,
        subject: Subject,
        config: ObserveConfig,
        reference: ReferenceCurve | None = None,
        extra: Sequence[Observer] = (),
    ) -> None:
        self._config = config
        self._outputs = OutputSums(subject.model)
        self._observers: list[Observer] = [
            CountsObserver(subject),
            RankObserver(subject, config.exact_ranks_every, reference),
            GradientObserver(subject),
            TensorObserver(subject),
            GridObserver(subject),
            NonfiniteObserver(subject),
            CatalogueObserver(subject),
            *extra,
        ]
        self._keys: list[tuple[str, str]] = []
        self._checks = 0

    @property
    def modules(self) -> list[str]:
        """Names of the modules whose outputs are summed, in the order of execution."""
        return self._outputs.names

    def start_step(self, step: int, *, check: bool) -> None:
        """Before the forward pass; `check`: this step ends a log interval."""
        every = self._config.shadow_every
        moment = Moment(
            step,
            check,
            detail=check and self._checks % self._config.detail_every == 0,
            shadow=check and every is not None and self._checks % every == 0,
        )
        self._outputs.start_step()
        for observer in self._observers:
            observer.start_step(moment)

    def start_forward(self) -> None:
        """Before each forward pass of a step."""
        self._outputs.start_forward()

    def end_forward(self, loss: Tensor) -> None:
        """After each forward pass of a step, before its backward pass, with its loss (0-d)."""
        self._outputs.end_forward(loss)

    def end_passes(self, device: torch.device) -> Tensor:
        """After the step's last pass: [modules] the sum of each module's output, finite where the output is."""
        return self._outputs.end_step(device)

    @torch.no_grad()
    def before_update(self) -> None:
        """After the backward pass, before anything touches the gradients."""
        for observer in self._observers:
            observer.before_update()

    @torch.no_grad()
    def after_update(self) -> None:
        """After the optimizer's step."""
        for observer in self._observers:
            observer.after_update()

    def close(self) -> None:
        """Takes every hook off the model."""
        self._outputs.close()
        for observer in self._observers:
            observer.close()

    @torch.no_grad()
    def collect(self) -> Tensor:
        """[readings] float64: all that the interval has measured, for `row` once it was fetched."""
        readings: Readings = {}
        for observer in self._observers:
            readings |= observer.collect()
        self._keys = list(readings)
        self._checks += 1
        return torch.stack([value.detach().double() for value in readings.values()])

    def row(self, fetched: Sequence[float]) -> dict[str, Any]:
        """The fetched numbers as the signals of a row."""
        row: dict[str, Any] = {}
        layers: Layers = {}
        for (layer, signal), value in zip(self._keys, fetched, strict=True):
            (layers.setdefault(layer, {}) if layer else row)[signal] = value
        for observer in self._observers:
            observer.finish(layers, row)
        kept = {name: values for name, values in layers.items() if values}
        return over_layers(kept) | row | {"layers": kept}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to measure on exactly."""
        return {"checks": self._checks, "observers": [observer.state_dict() for observer in self._observers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._checks = int(state["checks"])
        # Extra observers stand last and keep nothing: a run may go on with others than it began with.
        for observer, own in zip(self._observers, state["observers"], strict=False):
            observer.load_state_dict(own)


class GradientNormScore:
    """How unusual a gradient norm is: its distance from the moving mean in moving standard deviations.

    As in ZClip (arXiv 2504.02507), with decay .97; NaN for the first `warmup` norms, which only measure. A norm that
    is not finite scores NaN and enters nothing; one beyond `limit` enters as far as the limit, so that one spike does
    not hide the next.
    """

    def __init__(self, decay: float = 0.97, warmup: int = 10, limit: float = 2.5) -> None:
        self._decay, self._warmup, self._limit = decay, warmup, limit
        self._mean, self._variance, self._count = 0.0, 0.0, 0

    def update(self, norm: float) -> float:
        """Takes in one norm and returns its score."""
        if not math.isfinite(norm):
            return math.nan
        deviation = math.sqrt(self._variance)
        is_known = self._count >= self._warmup and deviation > 0
        score = (norm - self._mean) / deviation if is_known else math.nan
        taken = self._mean + self._limit * deviation if is_known and score > self._limit else norm
        self._count += 1
        weight = max(1.0 / self._count, 1.0 - self._decay)
        before = self._mean
        self._mean += weight * (taken - self._mean)
        self._variance = (1 - weight) * (self._variance + weight * (taken - before) ** 2)
        return score

    def state_dict(self) -> dict[str, float]:
        """Mean, variance and number of norms."""
        return {"mean": self._mean, "variance": self._variance, "count": self._count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._mean, self._variance, self._count = state["mean"], state["variance"], int(state["count"])
