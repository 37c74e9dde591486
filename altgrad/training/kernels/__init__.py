"""One optimizer step of one tensor, said three times: `reference` in torch, `cpu` in numba, `gpu` in Triton.

A step has four parts, and every arm is a choice in each:

    moments     what the gradient becomes: Adam's unit step, momentum, or a direction computed elsewhere
    geometry    how long the step is at a weight: plain, by the format's spacing there, or the literal gradient scaling
    placement   where the weight may lie: a float32 master, the grid (nearest or stochastic), or whole rungs of it
    counts      what the step did: flips, updates, expected flips, travel

All three work in y = weight / scale, where the format's codes live, in float32 without fused multiply-add, so they
agree bit for bit. Sums over a tensor are integers (shares of one in fixed point, `FIXED`), so they depend neither on
the order of the elements nor on who adds them; the mean spacing, which enters the step, is such a sum too.

A tensor whose gradient holds a NaN or an infinity is left as it is, state included, and is counted as skipped. Nothing
here waits for a GPU: the step count, the scale and the overflow streak are 0-d tensors beside the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from torch import Tensor

from altgrad.quantization import FloatFormat
from altgrad.quantization.kernels import Grid, grid_of

GRADIENT_FLOOR = 1e-10
"""A gradient above this magnitude counts as a non-zero one."""

OVERFLOW_SHARE = 1e-3
OVERFLOW_STEPS = 3
"""A scale doubles when more than this share of a tensor's weights left the grid in so many steps in a row."""

FIXED = 30
"""Fractional bits of the shares of one that are summed as integers."""

MEAN_EVERY = 16
"""Steps between two measurements of a tensor's mean spacing, after as many at every step: it drifts slowly, and
measuring reads every weight once more."""

MAX_RUNGS = 2.0**24
"""Rungs a weight may move in one step at the very most: what float32 counts exactly."""


class Moments(IntEnum):
    """What the gradient becomes."""

    GIVEN = 0
    ADAM = 1
    MOMENTUM = 2


class Geometry(IntEnum):
    """How long the step is at a weight."""

    NONE = 0
    RELATIVE = 1
    ULP = 2
    GRADIENT = 3


class Placement(IntEnum):
    """Where the weight may lie."""

    MASTER = 0
    NEAREST = 1
    STOCHASTIC = 2
    RUNGS = 3


class Counting(IntEnum):
    """What is counted: nothing, flips and updates, or everything."""

    NONE = 0
    MOVES = 1
    ALL = 2


class Count(IntEnum):
    """Columns of the counts, one int64 row per tensor; EXPECTED is in units of 2^-FIXED codes."""

    FLIPS = 0
    APPLIED = 1
    GRADIENT = 2
    EXPECTED = 3
    OVERFLOW = 4
    RESCALED = 5
    SKIPPED = 6
    TRAVEL = 7
    POSITION = 8


@dataclass(frozen=True)
class Plan:
    """What a step does to every tensor of a parameter group; see the package's docstring for the four choices.

    `lr` and all other numbers are as in the group. `own_unit`: lr counts ULPs or rungs, not weights.
    `master_scale`: the scale under which a master's codes are counted, None for that of its current amax.
    """

    fmt: FloatFormat | None
    moments: Moments
    geometry: Geometry = Geometry.NONE
    placement: Placement = Placement.MASTER
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_stiffness: float = 1e6
    rung_clip: float = 10.0
    own_unit: bool = False
    feedback: bool = False
    carry: bool = False
    counting: Counting = Counting.ALL
    master_scale: float | None = None

    @property
    def grid(self) -> Grid | None:
        """The format's constants."""
        return None if self.fmt is None else grid_of(self.fmt)

    @cached_property
    def needs_mean(self) -> bool:
        """Whether the step is measured by the tensor's mean spacing."""
        if self.fmt is None or self.own_unit:
            return False
        return self.geometry == Geometry.RELATIVE or self.placement == Placement.RUNGS

    @cached_property
    def needs_scale(self) -> bool:
        """Whether the codes of the weights matter to this step."""
        is_resident = self.placement != Placement.MASTER
        return self.fmt is not None and (
            is_resident or self.counting != Counting.NONE or self.geometry in (Geometry.RELATIVE, Geometry.ULP)
        )

    @cached_property
    def follows_amax(self) -> bool:
        """Whether the scale is that of a master's current amax: 8-bit formats and below without a fixed one."""
        if self.fmt is None or self.placement != Placement.MASTER:
            return False
        return self.needs_scale and self.master_scale is None and self.fmt.total_bits <= 8

    @cached_property
    def watches_weights(self) -> bool:
        """Whether it matters to the step that others wrote the weights since the last one."""
        is_resident = self.fmt is not None and self.placement != Placement.MASTER
        return is_resident or self.needs_mean or self.follows_amax

    @cached_property
    def rescales(self) -> bool:
        """Whether sustained overflow doubles the scale: that of 8-bit formats and below; wider ones have scale 1."""
        return self.fmt is not None and self.placement != Placement.MASTER and self.fmt.total_bits <= 8


@dataclass
class Job:
    """One tensor's share of a step: `weight` is changed in place, and so is what else is given.

    `first` and `second` are the moments (float32, of the weight's shape), None where the plan has none; `direction`
    replaces them. `step`, `scale`, `streak` and `mean` are 0-d: float32, float32, int64 and float64. `seed`: of this
    tensor's draws before the number of the call is mixed in. Weights with a `scale` lie on the grid.

    `largest`, 0-d int32, is given where the plan follows the amax: it takes the bits of the largest new magnitude,
    which spares the next step a look at all weights if it says so by `knows_largest`.
    """

    weight: Tensor
    grad: Tensor
    step: Tensor
    seed: int
    first: Tensor | None = None
    second: Tensor | None = None
    direction: Tensor | None = None
    carry: Tensor | None = None
    scale: Tensor | None = None
    streak: Tensor | None = None
    mean: Tensor | None = None
    largest: Tensor | None = None
    knows_largest: bool = False

    def addresses(self) -> tuple[int, ...]:
        """A row of the compiled kernels' tables, in the order of `layout`: 0 for what is not given."""
        shaped = (self.weight, self.grad, self.first, self.second, self.direction, self.carry)
        given = (*shaped, self.step, self.scale, self.streak, self.mean, self.largest)
        seed = self.seed if self.seed < 1 << 63 else self.seed - (1 << 64)
        return (*(0 if t is None else t.data_ptr() for t in given), self.weight.numel(), seed, int(self.knows_largest))


def least_stiffness(fmt: FloatFormat) -> float:
    """The literal formula's factor at zero, the smallest spacing; without an exponent 2^-M everywhere, whatever the
    unit, so that INT8 steps as E0M7 does."""
    return fmt.min_spacing if fmt.exponent_bits else math.ldexp(1.0, -fmt.mantissa_bits)


def measures_mean(step: int) -> bool:
    """Whether this step of a tensor, the first from 1, measures the mean spacing anew."""
    return step <= MEAN_EVERY or step % MEAN_EVERY == 0


def integer_power(base: float, exponent: int) -> float:
    """base^exponent by squaring, exponent >= 0: the same float64 on every device, where a library's pow is not."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def corrections(beta1: float, beta2: float, step: int) -> tuple[float, float]:
    """Adam's bias corrections of this step, the first from 1: factors on m and on √v."""
    return (1.0 / (1.0 - integer_power(beta1, step)), 1.0 / math.sqrt(1.0 - integer_power(beta2, step)))
