"""What the course of a rank says about a run: a warning names the layer, what was measured and the limit.

| detector | warns when | unit of the value |
| --- | --- | --- |
| `RankHealthMonitor` | the stable rank lost a share (0.30; critical layers 0.15) since the first check | share lost |
| `RankTrendDetector` | the smoothed rank moved by a share within a window of training steps | relative change |
| `ReferenceRatioDetector` | rank / the reference run's rank at the same step left [0.5, 2], k checks in a row | ratio |

The first is the plain rule, kept for comparison, and it is inverted: healthy training lowers the mean stable rank
severalfold (25 to 6 in a pilot), while a dead run keeps the rank of its initialization (25 to 23). The last judges
both ways, against a healthy run of the same model, data and seed.

A rank that is not finite is a warning of its own kind and enters no mean, no baseline and no count. A matrix of zeros
has rank 0; being initialized so is no loss, so a baseline is the first rank above 0, while a fall to 0 is a loss of
everything. Windows count training steps, however often a detector is called.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from altgrad.quantization.policy import HEAD_PATTERN
from altgrad.quantization.ranks import compute_stable_rank


@dataclass(frozen=True)
class RankWarning:
    """One finding: which layer, what it measured, and the limit it crossed."""

    layer: str
    kind: Literal["drop", "nonfinite", "falling", "rising", "below_reference", "above_reference"]
    value: float
    limit: float
    message: str


class RankHealthMonitor:
    """Warns of layers whose stable rank fell by more than a share since the first check.

    Critical layers get a stricter share: those with a part of their name in `critical_layers`, those that end like
    a head, and those in `critical`, full names of layers or parameters that are heads by role whatever they are called.
    """

    def __init__(
        self,
        log_interval: int = 100,
        warn_threshold: float = 0.3,
        critical_layers: tuple[str, ...] = ("lm_head", "c_proj"),
        critical_threshold_multiplier: float = 0.5,
        *,
        critical: Collection[str] = (),
    ) -> None:
        if log_interval < 1 or not 0.0 < warn_threshold < 1.0 or not 0.0 < critical_threshold_multiplier <= 1.0:
            raise ValueError(
                "need log_interval >= 1, 0 < warn_threshold < 1 and 0 < critical_threshold_multiplier <= 1; "
                f"got {log_interval}, {warn_threshold} and {critical_threshold_multiplier}"
            )
        self.log_interval = log_interval
        self.warn_threshold = warn_threshold
        self.critical_layers = critical_layers
        self.critical_threshold_multiplier = critical_threshold_multiplier
        self.critical = frozenset(name.removesuffix(".weight") for name in critical)
        self._first: dict[str, float] = {}

    def is_due(self, step: int) -> bool:
        """Whether ranks are to be computed at this training step."""
        return step % self.log_interval == 0

    def get_threshold_for_layer(self, name: str) -> float:
        """Share of the first rank that may be lost, for a layer or parameter name."""
        return self.warn_threshold * (self.critical_threshold_multiplier if self._is_critical(name) else 1.0)

    def compute_layer_ranks(self, model: nn.Module) -> dict[str, float]:
        """Stable rank of every matrix by parameter name; a tied one once, by its critical name if any."""
        names: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.dim() >= 2 and (parameter not in names or self._is_critical(name)):
                names[parameter] = name
        ranks = [compute_stable_rank(parameter) for parameter in names]
        values = torch.stack(ranks).tolist() if ranks else []
        return dict(zip(names.values(), values, strict=True))

    def check_warnings(self, ranks: Mapping[str, float]) -> list[RankWarning]:
        """Layers beyond their threshold, held against the first finite rank above 0 seen of each."""
        return [warning for name, rank in ranks.items() if (warning := self._check(name, rank)) is not None]

    def state_dict(self) -> dict[str, float]:
        """The baselines by name."""
        return dict(self._first)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._first = dict(state)

    def _check(self, name: str, rank: float) -> RankWarning | None:
        if not math.isfinite(rank):
            return _nonfinite(name, rank)
        if rank > 0.0:
            self._first.setdefault(name, rank)
        first, limit = self._first.get(name, 0.0), self.get_threshold_for_layer(name)
        lost = 1.0 - rank / first if first else 0.0
        if lost <= limit:
            return None
        return RankWarning(name, "drop", lost, limit, f"{name}: stable rank {first:.3g} -> {rank:.3g}, {lost:.0%} lost")

    def _is_critical(self, name: str) -> bool:
        layer = name.removesuffix(".weight")
        is_named = any(part in layer.split(".") for part in self.critical_layers)
        return is_named or layer in self.critical or re.search(HEAD_PATTERN, layer) is not None


class RankTrendDetector:
    """Warns where the smoothed rank moved by more than a share within a window of training steps.

    The mean decays by e over `smoothing` steps, however often it is updated. A rank that is not finite is
    reported and left out of the mean.
    """

    def __init__(self, window: int = 1000, threshold: float = 0.3, smoothing: int = 100) -> None:
        if window < 1 or smoothing < 1:
            raise ValueError(f"window and smoothing count training steps, at least 1; got {window} and {smoothing}")
        self.window, self.threshold, self.smoothing = window, threshold, smoothing
        self._course: dict[str, deque[tuple[int, float]]] = {}

    def update(self, layer: str, step: int, rank: float) -> RankWarning | None:
        """Takes in one rank; ValueError where steps do not ascend."""
        if not math.isfinite(rank):
            return _nonfinite(layer, rank)
        course = self._course.setdefault(layer, deque())
        if course and step <= course[-1][0]:
            raise ValueError(f"steps must ascend: {step} after {course[-1][0]} for {layer!r}")
        mean = rank
        if course and course[-1][1] > 0.0:
            last_step, last = course[-1]
            mean = rank + (last - rank) * math.exp((last_step - step) / self.smoothing)
        course.append((step, mean))
        # The last mean from before the window stays: checks may lie further apart than the window is long.
        while len(course) > 1 and course[1][0] <= step - self.window:
            course.popleft()
        return self._judge(layer, next((earlier for _, earlier in course if earlier > 0.0), mean), mean)

    def state_dict(self) -> dict[str, list[tuple[int, float]]]:
        """The window's steps and means, oldest first, by layer."""
        return {layer: list(course) for layer, course in self._course.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken, also through JSON."""
        self._course = {layer: deque((int(step), mean) for step, mean in course) for layer, course in state.items()}

    def _judge(self, layer: str, before: float, mean: float) -> RankWarning | None:
        change = mean / before - 1.0 if before else 0.0
        if abs(change) <= self.threshold:
            return None
        kind: Literal["falling", "rising"] = "falling" if change < 0 else "rising"
        text = f"{layer}: smoothed rank {before:.3g} -> {mean:.3g} within {self.window} steps"
        return RankWarning(layer, kind, change, self.threshold, text)


class ReferenceRatioDetector:
    """Warns where rank over the reference run's rank left [low, high] on `checks` checks in a row."""

    def __init__(self, low: float = 0.5, high: float = 2.0, checks: int = 3) -> None:
        if not 0.0 < low < 1.0 < high or checks < 1:
            raise ValueError(f"need 0 < low < 1 < high and checks >= 1; got {low}, {high}, {checks}")
        self.low, self.high, self.checks = low, high, checks
        self._outside: dict[str, int] = {}

    def update(self, layer: str, rank: float, reference: float) -> RankWarning | None:
        """Takes in one check; one that is not finite is reported and counts neither way; 0 of 0 is a ratio of 1."""
        if not math.isfinite(rank) or not math.isfinite(reference):
            return _nonfinite(layer, rank if not math.isfinite(rank) else reference)
        if rank < 0.0 or reference < 0.0:
            raise ValueError(f"ranks are never negative; got {rank} and {reference} for {layer!r}")
        ratio = rank / reference if reference else (math.inf if rank else 1.0)
        is_outside = not self.low <= ratio <= self.high
        self._outside[layer] = self._outside.get(layer, 0) + 1 if is_outside else 0
        if self._outside[layer] < self.checks:
            return None
        is_below = ratio < self.low
        limit = self.low if is_below else self.high
        text = f"{layer}: stable rank {rank:.3g} is {ratio:.2g} of the reference's {reference:.3g}"
        return RankWarning(layer, "below_reference" if is_below else "above_reference", ratio, limit, text)

    def state_dict(self) -> dict[str, int]:
        """Checks in a row outside, by layer."""
        return dict(self._outside)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._outside = dict(state)


def _nonfinite(layer: str, rank: float) -> RankWarning:
    return RankWarning(layer, "nonfinite", rank, math.inf, f"{layer}: the rank is {rank}")
