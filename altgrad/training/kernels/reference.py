"""The step in readable torch, on any device; the other kernels equal it bit for bit. It waits for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from altgrad.quantization import FloatFormat, hash_uniform, mix_seed
from altgrad.quantization.kernels import Grid, Rounding, grid_of, reference
from altgrad.quantization.scaling import scale_of_amax
from altgrad.training.kernels import (
    FIXED,
    GRADIENT_FLOOR,
    MAX_RUNGS,
    OVERFLOW_SHARE,
    OVERFLOW_STEPS,
    Count,
    Counting,
    Geometry,
    Job,
    Moments,
    Placement,
    Plan,
    corrections,
    least_stiffness,
    measures_mean,
)

_EXPONENT, _ONE, _NORMAL = 0x7F800000, 0x3F800000, 0x00800000


def step_tensors(jobs: list[Job], plan: Plan, call: int, counts: Tensor) -> None:
    """One step of every job; `counts` is int64 [jobs, len(Count)] and is added to."""
    for job, row in zip(jobs, counts, strict=True):
        _step(job, plan, mix_seed(job.seed, call), row)


def _step(job: Job, plan: Plan, seed: int, row: Tensor) -> None:
    weight, grad = job.weight.float().clone(), job.grad.float()
    if not bool(torch.isfinite(grad).all()):
        row[Count.SKIPPED] += 1
        if job.largest is not None:
            job.largest.copy_(_largest_bits(job.weight))
        return
    job.step += 1
    scale = _scale(job, plan, weight) if plan.needs_scale else None
    mean = 1.0
    if plan.needs_mean and scale is not None:
        assert job.mean is not None
        if measures_mean(int(job.step)):
            # In weights, for the scale drifts faster than they do.
            job.mean.fill_(_mean(weight / scale, plan) * float(scale))
        mean = float(job.mean)
    direction = _direction(job, plan, weight, grad)
    if plan.counting == Counting.ALL:
        row[Count.GRADIENT] += (grad.abs() > GRADIENT_FLOOR).sum()
    if plan.placement == Placement.RUNGS and plan.fmt is not None:
        assert scale is not None
        _move_by_rungs(job, plan, weight, direction, scale, mean, seed, row)
    else:
        _move(job, plan, weight, direction, scale, mean, seed, row)
    if plan.rescales:
        _rescale_on_overflow(job, plan, seed, row)


def _largest_bits(weight: Tensor) -> Tensor:
    return (weight.float().view(torch.int32) & 0x7FFFFFFF).max() if weight.numel() else weight.new_zeros(())


def _scale(job: Job, plan: Plan, weight: Tensor) -> Tensor:
    assert plan.fmt is not None
    if job.scale is not None:
        return job.scale
    if plan.master_scale is not None:
        return torch.tensor(plan.master_scale, dtype=torch.float32, device=weight.device)
    if plan.fmt.total_bits > 8 or weight.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=weight.device)
    return scale_of_amax(weight.abs().max(), plan.fmt)


def _mean(y: Tensor, plan: Plan) -> float:
    """Mean spacing (of rungs: mean gap) over the tensor, in units of the scale; 1 for no elements."""
    assert plan.fmt is not None
    if y.numel() == 0:
        return 1.0
    grid = grid_of(plan.fmt)
    top = int(exponent_bits(y.abs().max(), grid))
    if plan.placement == Placement.RUNGS:
        gaps = gap(reference.code_index(y, 1.0, grid), grid)
        shares = gaps * _power(0x7F000000 - top) * (2.0**FIXED / grid.mantissa_step)
    else:
        difference = exponent_bits(y, grid) - top + ((127 + FIXED) << 23)
        shares = difference.clamp(min=0).view(torch.float32)
    total = int(shares.to(torch.int64).sum())
    return total * 2.0**-FIXED / y.numel() * (_power(top) * grid.mantissa_step)


def exponent_bits(y: Tensor, grid: Grid) -> Tensor:
    """The float32 bits of the binade that y's spacing belongs to, int32; NaN counts as the top one."""
    return (y.view(torch.int32) & _EXPONENT).clamp(grid.min_exponent_bits, grid.max_exponent_bits)


def quotient_bits(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """`exponent_bits(weight / scale)` without the division, which would be the longest part of a step.

    The difference of the bits borrows from the exponent where the weight's mantissa is the smaller one, as the quotient
    does; and a quotient below a power of two never rounds up to it, for both have 24 bits. Weights below 2^-126, whose
    mantissas start with zeros, pass for zero.
    """
    magnitude = (weight.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    difference = magnitude - (scale.view(torch.int32).to(torch.int64) - _ONE)
    difference = torch.where(magnitude < _NORMAL, 0, difference)
    bits = (difference.clamp(0, _EXPONENT) & _EXPONENT).to(torch.int32)
    return bits.clamp(grid.min_exponent_bits, grid.max_exponent_bits)


def gap(index: Tensor, grid: Grid) -> Tensor:
    """Half the distance between a grid point's two neighbours: the mean length of a rung up and a rung down.

    Where a binade begins the rung down is half as long as the rung up, so the spacing alone would overstate steps.
    """
    size = index.abs()
    inner = reference.magnitude_value((size - 1).abs(), grid)
    outer = reference.magnitude_value((size + 1).clamp(max=grid.max_index), grid)
    return (outer - torch.where(size == 0, -inner, inner)) * 0.5


def _power(bits: int) -> float:
    """The power of two of those float32 bits."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def literal_stiffness(weight: Tensor, fmt: FloatFormat, limit: float) -> Tensor:
    """S = 2^(floor(log2|w|) - M), 2^-M without an exponent; at zero the format's own smallest spacing."""
    if fmt.exponent_bits == 0:
        return torch.full_like(weight, min(least_stiffness(fmt), limit))
    binade = (weight.view(torch.int32) & _EXPONENT).view(torch.float32)
    return torch.where(weight == 0, least_stiffness(fmt), binade * 2.0**-fmt.mantissa_bits).clamp_(max=limit)


def root(x: Tensor) -> Tensor:
    """√x correctly rounded, which torch's float32 root on a CPU is not."""
    return x.double().sqrt_().float()


def adam(grad: Tensor, first: Tensor, second: Tensor, plan: Plan, step: int) -> Tensor:
    """m̂ / (√v̂ + eps) (arXiv 1412.6980); advances the moments."""
    by_mean, by_root = corrections(plan.beta1, plan.beta2, step)
    first.mul_(plan.beta1).add_(grad * (1 - plan.beta1))
    second.mul_(plan.beta2).add_((grad * grad).mul_(1 - plan.beta2))
    return (first * by_mean).div_(root(second).mul_(by_root).add_(plan.eps))


def _direction(job: Job, plan: Plan, weight: Tensor, grad: Tensor) -> Tensor:
    if plan.moments == Moments.GIVEN:
        assert job.direction is not None
        return job.direction
    if plan.geometry == Geometry.GRADIENT and plan.fmt is not None:
        grad = grad * literal_stiffness(weight, plan.fmt, plan.max_stiffness)
    assert job.first is not None
    if plan.moments == Moments.MOMENTUM:
        return job.first.mul_(plan.beta1).add_(grad).clone()
    assert job.second is not None
    return adam(grad, job.first, job.second, plan, int(job.step))


def _move(
    job: Job, plan: Plan, weight: Tensor, direction: Tensor, scale: Tensor | None, mean: float, seed: int, row: Tensor
) -> None:
    grid = plan.grid
    if grid is None or plan.geometry in (Geometry.NONE, Geometry.GRADIENT):
        change = direction * plan.lr
    else:
        assert scale is not None
        spacing = quotient_bits(weight, scale, grid).view(torch.float32) * grid.mantissa_step
        if plan.geometry == Geometry.ULP:
            change = direction * (spacing * (plan.lr * float(scale)))
        else:
            factor = plan.lr * float(scale) / mean
            change = direction * (spacing * factor).clamp_(max=plan.lr * plan.max_stiffness)
    target = weight - (change + weight * (plan.lr * plan.weight_decay))
    if plan.placement == Placement.MASTER or grid is None:
        job.weight.copy_(target)
        if job.largest is not None:
            job.largest.copy_(_largest_bits(job.weight))
        if plan.counting and grid is not None:
            assert scale is not None
            new = job.weight.float()
            y, y_new = weight / scale, new / scale
            moved = reference.code_index(y_new, 1.0, grid) - reference.code_index(y, 1.0, grid)
            _add_counts(row, plan, moved, new != weight, _share(y, y_new, grid))
        return
    assert scale is not None
    rounding: Rounding = "nearest" if plan.placement == Placement.NEAREST else "stochastic"
    codes = reference.quantize(target / scale, 1.0, grid, rounding, "saturate", seed)
    new = codes * scale
    job.weight.copy_(new)
    row[Count.OVERFLOW] += ((target / scale).abs() > grid.max_value).sum()
    if plan.feedback and plan.lr > 0:
        _feed_back(job, plan, target, new, scale, grid)
    if plan.counting:
        y = weight / scale
        moved = reference.code_index(codes, 1.0, grid) - reference.code_index(y, 1.0, grid)
        _add_counts(row, plan, moved, target != weight, _share(y, target / scale, grid))


def feedback_factor(plan: Plan, by_mean: float) -> float:
    """What an error is multiplied with, beside Adam's denominator, before it is fed into the first moment.

    Put into m at once, it returns to the weight over all later steps as lr · m̂'s share of beta1 + beta1² + …; with
    (1 - beta1) / beta1 that sum is the error itself.
    """
    return (1 - plan.beta1) / (plan.beta1 * plan.lr * by_mean)


def _feed_back(job: Job, plan: Plan, target: Tensor, new: Tensor, scale: Tensor, grid: Grid) -> None:
    assert job.first is not None and job.second is not None
    by_mean, by_root = corrections(plan.beta1, plan.beta2, int(job.step))
    # What left the grid is lost, not owed: it would wind up in the moment without end.
    end = grid.max_value * float(scale)
    error = target.clamp(-end, end) - new
    denominator = root(job.second).mul_(by_root).add_(plan.eps)
    job.first.sub_(error.mul_(denominator).mul_(feedback_factor(plan, by_mean)))


def _share(y_old: Tensor, y_target: Tensor, grid: Grid) -> Tensor:
    """|y_target - y_old| / spacing: what unbiased rounding would move, in codes; 2^FIXED is one."""
    # Into a lower binade the way to the next code is the lower binade's spacing.
    lowest = torch.minimum(exponent_bits(y_old, grid), exponent_bits(y_target, grid))
    inverse = (0x7F000000 - lowest).view(torch.float32)
    return (y_target - y_old).abs() * inverse * (2.0**FIXED / grid.mantissa_step)


def _add_counts(row: Tensor, plan: Plan, moved: Tensor, applied: Tensor, share: Tensor) -> None:
    row[Count.FLIPS] += (moved != 0).sum()
    row[Count.APPLIED] += applied.sum()
    if plan.counting != Counting.ALL:
        return
    row[Count.EXPECTED] += torch.where(share < 2.0**FIXED, share, 2.0**FIXED).to(torch.int64).sum()
    row[Count.TRAVEL] += moved.abs().sum()
    row[Count.POSITION] += moved.sum()


def _move_by_rungs(
    job: Job, plan: Plan, weight: Tensor, direction: Tensor, scale: Tensor, mean: float, seed: int, row: Tensor
) -> None:
    assert plan.fmt is not None
    grid = grid_of(plan.fmt)
    y = weight / scale
    index = reference.code_index(y, 1.0, grid)
    rungs = direction * (plan.lr if plan.own_unit else plan.lr / mean)
    if plan.weight_decay:
        rungs += y * (plan.weight_decay * (1.0 if plan.own_unit else plan.lr)) / gap(index, grid)
    clip = min(plan.rung_clip, MAX_RUNGS)
    rungs.nan_to_num_(0.0, math.inf, -math.inf).clamp_(-clip, clip)
    carry = torch.zeros_like(rungs) if job.carry is None else job.carry
    position = carry - rungs
    steps = split_rungs(position if plan.carry else rungs, seed)
    if plan.carry:
        whole = int(clip)
        wanted = index + torch.where(rungs != 0, steps.clamp(-whole, whole), 0).to(torch.int32)
    else:
        wanted = index - steps.to(torch.int32)
    end = grid.max_index
    inside = wanted.clamp(-end, end)
    if plan.carry:
        left = torch.clamp(position - (inside - index), -end - inside, end - inside)
        carry.copy_(torch.where(rungs != 0, left, carry))
    value = reference.index_to_value(inside, scale, grid)
    # A NaN has no code; it must stay visible to the guards.
    job.weight.copy_(torch.where(weight.isnan(), weight, value))
    row[Count.OVERFLOW] += (wanted != inside).sum()
    if plan.counting:
        _add_counts(row, plan, inside - index, rungs != 0, rungs.abs() * 2.0**FIXED)


def split_rungs(rungs: Tensor, seed: int) -> Tensor:
    """floor(rungs + u), u uniform in [0, 1) by counter hash; whole rungs stay, zero never moves."""
    whole = rungs.floor()
    # Comparing the fraction is exact where adding u in float32 would round.
    return whole + (hash_uniform(rungs.shape, seed, rungs.device) < rungs - whole)


def _rescale_on_overflow(job: Job, plan: Plan, seed: int, row: Tensor) -> None:
    """Doubles the tensor's scale after sustained overflow, which is counted."""
    assert plan.fmt is not None and job.scale is not None and job.streak is not None
    crowded = int(row[Count.OVERFLOW]) > OVERFLOW_SHARE * job.weight.numel()
    job.streak.copy_(job.streak + 1 if crowded else torch.zeros_like(job.streak))
    if int(job.streak) < OVERFLOW_STEPS:
        return
    job.streak.zero_()
    job.scale.mul_(2)
    row[Count.RESCALED] += 1
    rounding: Rounding = "nearest" if plan.placement == Placement.NEAREST else "stochastic"
    weight = job.weight.float()
    grid = grid_of(plan.fmt)
    job.weight.copy_(reference.quantize(weight, job.scale, grid, rounding, "saturate", mix_seed(seed, 1)))
    if job.carry is not None:
        job.carry.mul_(0.5)
