"""Ranks of weight matrices, and what their course says about a run.

| number | formula over the singular values s |
| --- | --- |
| stable rank | sum s^2 / max s^2 |
| effective rank | exp of the entropy of s / sum s (Roy and Vetterli 2007) |
| variance rank | smallest k whose k largest s^2 hold a share (0.99) of sum s^2 |

All come from the eigenvalues of one Gram matrix, W W^T on the shorter side, in float64: five times cheaper
than the singular values and equal to 2e-8. A zero matrix has rank 0, a matrix with a NaN or infinity has rank
NaN.

A drop of the rank alone is no alarm: healthy training lowers the mean stable rank severalfold, while a dead
run keeps the rank of its initialization. `RankHealthMonitor` is the plain rule (a share lost since the first
check), kept for comparison; `ReferenceRatioDetector` judges both ways against a reference run at the same
step.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from altgrad.quantization.policy import HEAD_PATTERN


def compute_stable_rank(weight: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm of [out, ...], later dimensions flattened: 0-d."""
    power = _squared_singular_values(weight)
    return _zero_where_empty(power, power.sum() / power.max())


def compute_effective_rank(weight: Tensor) -> Tensor:
    """exp(entropy of s / sum s): 0-d float64 between 1 and the shorter side, 0 for a zero matrix."""
    power = _squared_singular_values(weight)
    singular = power.sqrt()
    share = singular / singular.sum()
    return _zero_where_empty(power, torch.special.entr(share).sum().exp())


def variance_rank(weight: Tensor, share: float = 0.99) -> Tensor:
    """Fewest directions that hold `share` of the squared Frobenius norm: 0-d float64."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    power = _squared_singular_values(weight).flip(0)
    held = power.cumsum(0) / power.sum()
    rank = (held < share).sum().clamp(max=power.numel() - 1) + 1
    return _zero_where_empty(power, torch.where(power.sum().isnan(), math.nan, rank.double()))


def _squared_singular_values(weight: Tensor) -> Tensor:
    """Ascending, of the matrix divided by its largest magnitude: float64, all NaN for a non-finite matrix."""
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(f"a rank needs a matrix with elements, got the shape {tuple(weight.shape)}")
    matrix = weight.detach().flatten(1).double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    largest = matrix.abs().amax()
    is_finite = torch.isfinite(largest)
    # The eigensolver raises on NaN, and asking first would wait for the device: solve a zero matrix instead.
    normalized = torch.where(is_finite & (largest > 0), matrix / largest, 0.0)
    power = torch.linalg.eigvalsh(normalized @ normalized.T).clamp(min=0.0)
    return torch.where(is_finite, power, math.nan)


def _zero_where_empty(power: Tensor, rank: Tensor) -> Tensor:
    return torch.where(power.sum() == 0, 0.0, rank)


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

    Output projections and heads get a stricter share: layers named in `critical_layers`, and any head, also
    where its weight goes by an embedding's name.
    """

    def __init__(
        self, log_interval: int = 100, warn_threshold: float = 0.3,
        critical_layers: tuple[str, ...] = ("lm_head", "c_proj"), critical_threshold_multiplier: float = 0.5,
    ) -> None:  # fmt: skip
        self.log_interval = log_interval
        self.warn_threshold = warn_threshold
        self.critical_layers = critical_layers
        self.critical_threshold_multiplier = critical_threshold_multiplier
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
        """Layers beyond their threshold, held against the first finite rank seen of each."""
        return [warning for name, rank in ranks.items() if (warning := self._check(name, rank)) is not None]

    def _check(self, name: str, rank: float) -> RankWarning | None:
        if not math.isfinite(rank):
            return _nonfinite(name, rank)
        first = self._first.setdefault(name, rank)
        limit = self.get_threshold_for_layer(name)
        lost = 1.0 - rank / first if first else 0.0
        if lost <= limit:
            return None
        return RankWarning(
            name, "drop", lost, limit, f"{name}: stable rank {first:.3g} -> {rank:.3g}, {lost:.0%} lost"
        )

    def _is_critical(self, name: str) -> bool:
        layer = name.removesuffix(".weight")
        return any(part in layer.split(".") for part in self.critical_layers) or bool(
            re.search(HEAD_PATTERN, layer)
        )


class RankTrendDetector:
    """Warns where the smoothed rank moved by more than a share within a window of training steps.

    The mean decays by e over `smoothing` steps, however often it is updated. A rank that is not finite is
    reported and left out of the mean.
    """

    def __init__(self, window: int = 1000, threshold: float = 0.3, smoothing: int = 100) -> None:
        if window < 1 or smoothing < 1:
            raise ValueError(
                f"window and smoothing count training steps, at least 1; got {window} and {smoothing}"
            )
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
        if course:
            last_step, last = course[-1]
            mean = rank + (last - rank) * math.exp((last_step - step) / self.smoothing)
        course.append((step, mean))
        while course[0][0] < step - self.window:
            course.popleft()
        return self._judge(layer, course[0][1], mean)

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
        """Takes in one check; a rank that is not finite is reported and counts neither way."""
        if not math.isfinite(rank) or not math.isfinite(reference) or reference <= 0:
            return _nonfinite(layer, rank if not math.isfinite(rank) else reference)
        ratio = rank / reference
        is_outside = not self.low <= ratio <= self.high
        self._outside[layer] = self._outside.get(layer, 0) + 1 if is_outside else 0
        if self._outside[layer] < self.checks:
            return None
        is_below = ratio < self.low
        limit = self.low if is_below else self.high
        text = f"{layer}: stable rank {rank:.3g} is {ratio:.2g} of the reference's {reference:.3g}"
        return RankWarning(layer, "below_reference" if is_below else "above_reference", ratio, limit, text)


def _nonfinite(layer: str, rank: float) -> RankWarning:
    return RankWarning(layer, "nonfinite", rank, math.inf, f"{layer}: the rank is {rank}")
