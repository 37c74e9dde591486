"""What every 8-bit format would make of a reference run's tensors and steps, looked at on the rarer schedule.

A format's fitness can be told before anything is trained in it: from how much of a healthy run's weights, activations
and gradients it keeps, and from how many of the run's own steps would move a weight on its grid. Each is measured under
the scale that training would take, the tensor's own amax, with rounding to nearest. Steps are those of the full
learning rate, also on the way up to it.

    weight_sqnr@E4M3      signal to quantization noise of the layer's weights, dB; activation_, gradient_sqnr the same
    weight_underflow@E4M3 share of them, not 0, that round to a zero; of activations and gradients the same
    flip_yield@E4M3       code changes over those expected of the step under unbiased rounding, the weights being on the
                          grid: what arms that round to nearest would see
    flip_rate@E4M3        code changes of that step per weight
    weight_binade@3       share of the weights 2^-4 to 2^-3 of the layer's largest

Nothing of it is a signal that a guard may test: it says nothing of the run itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from altgrad.quantization import FORMATS, FloatFormat, compute_scale, quantize, ulp
from altgrad.quantization.flip_metrics import expected_flips
from altgrad.training.observers.base import Moment, Observer, Readings, Subject

BITS = 8
BINADES = 24
"""Of the histogram of weights, from the largest weight down."""


class ProspectsObserver(Observer):
    """Prospects by layer; see the module. `lr`: the full learning rate."""

    def __init__(self, subject: Subject, lr: float) -> None:
        self._weights, self._optimizer, self._lr = subject.watched, subject.optimizer, lr
        self._found: Readings = {}
        self._before: dict[str, Tensor] = {}
        self._due = False
        self._hooks: list[RemovableHandle] = []
        for name in self._weights:
            layer = subject.model.get_submodule(name)
            self._hooks += [
                layer.register_forward_pre_hook(partial(self._came_in, name)),
                layer.register_forward_hook(partial(self._went_out, name)),
            ]

    def start_step(self, moment: Moment) -> None:
        self._due = moment.detail

    def before_update(self) -> None:
        if self._due:
            self._before = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def after_update(self) -> None:
        if self._due:
            for name, weight in self._weights.items():
                before = self._before[name]
                self._look(name, "weight", before)
                self._found |= {(name, f"weight_binade@{k}"): share for k, share in enumerate(binades(before))}
                change = (weight.detach() - before) * self._gain(weight)
                for fmt in formats():
                    flips, expected = flips_and_expected(before, change, fmt)
                    self._found[name, f"flip_yield@{fmt.name}"] = flips / expected
                    self._found[name, f"flip_rate@{fmt.name}"] = flips / before.numel()
        self._due, self._before = False, {}

    def collect(self) -> Readings:
        found, self._found = self._found, {}
        return found

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _gain(self, weight: nn.Parameter) -> float:
        """The full learning rate over the one of this step."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        own = next(group["lr"] for group in groups if any(weight is other for other in group["params"]))
        return self._lr / own if own else 0.0

    def _came_in(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._due:
            self._look(name, "activation", inputs[0].detach())

    def _went_out(self, name: str, _: nn.Module, inputs: Any, y: Tensor) -> None:
        if self._due and y.requires_grad:
            y.register_hook(lambda gradient: self._look(name, "gradient", gradient.detach()))

    def _look(self, name: str, role: str, x: Tensor) -> None:
        if (name, f"{role}_sqnr@{next(formats()).name}") in self._found:
            return  # a layer that runs twice in a step is seen at its first run
        x = x.float()
        power, filled = torch.linalg.vector_norm(x), torch.count_nonzero(x)
        for fmt in formats():
            rounded = quantize(x, fmt, compute_scale(x, fmt))
            noise = torch.linalg.vector_norm(x - rounded)
            self._found[name, f"{role}_sqnr@{fmt.name}"] = 20.0 * (power / noise).log10()
            self._found[name, f"{role}_underflow@{fmt.name}"] = (filled - torch.count_nonzero(rounded)) / x.numel()


def formats() -> Iterator[FloatFormat]:
    """The formats that are looked at."""
    return (fmt for fmt in FORMATS.values() if fmt.total_bits == BITS)


def flips_and_expected(weight: Tensor, change: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Code changes of this change to nearest, from the weight's values on the format's grid, 0-d, and how many would be
    expected of unbiased rounding.
    """
    scale = compute_scale(weight, fmt)
    start = quantize(weight, fmt, scale)
    flips = torch.count_nonzero(quantize(start + change, fmt, scale) != start)
    return flips, expected_flips(change, ulp(start, fmt, scale))


def binades(weight: Tensor) -> Tensor:
    """[BINADES] share of the weight's elements in each binade below its largest magnitude; zeros are in none."""
    magnitude = weight.float().abs().flatten()
    depth = -(magnitude / magnitude.amax()).log2().floor() - 1  # (1/2, 1] is binade 0, but 1 itself gives -1
    # What is deeper, and zeros, count in one more, which is cut off: a mask would wait for the device.
    place = depth.nan_to_num(nan=BINADES, posinf=BINADES).clamp(0, BINADES).long()
    counts = torch.zeros(BINADES + 1, dtype=torch.float64, device=weight.device)
    counts = counts.scatter_add(0, place, torch.ones_like(magnitude, dtype=torch.float64))
    return counts[:BINADES] / magnitude.numel()
