"""How many directions a weight matrix uses: five numbers from one Gram matrix.

| number | formula over the singular values s | unit |
| --- | --- | --- |
| spectral norm | max s | the weight's |
| Frobenius norm | sqrt(sum s^2) | the weight's |
| stable rank | sum s^2 / max s^2 | directions, 1 to the shorter side |
| effective rank | exp of the entropy of s / sum s (Roy and Vetterli 2007) | directions, 1 to the shorter side |
| variance rank | smallest k whose k largest s^2 hold a share (0.99) of sum s^2 | directions, an integer |

s^2 are the eigenvalues of W W^T on the shorter side, in float64: equal to those from the singular values to 2e-8, in
half the time that these take in float32. A Gram matrix in float32 would be cheaper by half, but its noise of 2e-7
in s^2 is 5e-4 in s, and 767 such ghosts give a matrix of rank one an effective rank of 1.2. For the same reason
eigenvalues below n * 2^-52 of the largest are no directions but rounding, and count as zero.

Shapes: a vector is one row, so its rank is 1; later dimensions are flattened, [out, in, kh, kw] to [out, in * kh * kw].
A matrix is zero, of rank 0, only where every element is: nothing absolute enters, so a matrix of 1e-30s has the rank
that its shape has. A matrix with a NaN or an infinity has NaN everywhere.

Nothing here waits for the device but the eigensolver itself, which does so on a GPU: measure on a schedule (see
`spectral_norm`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

VARIANCE_SHARE = 0.99
"""Share of the squared Frobenius norm that the variance rank of a `Spectrum` holds."""

_GRAM_BLOCK = 192


@dataclass(frozen=True)
class SpectralNorms:
    """Stable rank and the two norms it is made of, 0-d float64."""

    stable_rank: Tensor
    spectral_norm: Tensor
    frobenius_norm: Tensor


@dataclass(frozen=True)
class Spectrum(SpectralNorms):
    """All five numbers of one matrix, 0-d float64."""

    effective_rank: Tensor
    variance_rank: Tensor


def spectrum(weight: Tensor) -> Spectrum:
    """The five numbers of [out, ...] in one pass; ValueError without elements or for integers."""
    power, largest = _squared_singular_values(weight)
    return Spectrum(
        stable_rank=_stable_rank(power),
        spectral_norm=power[-1].sqrt() * largest,
        frobenius_norm=power.sum().sqrt() * largest,
        effective_rank=_effective_rank(power),
        variance_rank=_variance_rank(power, VARIANCE_SHARE),
    )


def compute_stable_rank(weight: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm: 0-d float64, 0 for a zero matrix, NaN for a non-finite one."""
    return _stable_rank(_squared_singular_values(weight)[0])


def compute_effective_rank(weight: Tensor) -> Tensor:
    """exp(entropy of s / sum s): 0-d float64, 0 for a zero matrix, NaN for a non-finite one."""
    return _effective_rank(_squared_singular_values(weight)[0])


def variance_rank(weight: Tensor, share: float = VARIANCE_SHARE) -> Tensor:
    """Fewest directions that hold `share` of the squared Frobenius norm: 0-d float64."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    return _variance_rank(_squared_singular_values(weight)[0], share)


def as_matrix(weight: Tensor) -> Tensor:
    """[out, everything else], no copy where the layout allows; ValueError without elements or for integers."""
    if weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"a rank needs floating-point elements, got {weight.dtype} of the shape {tuple(weight.shape)}")
    weight = weight.detach()
    return weight.reshape(1, -1) if weight.dim() < 2 else weight.flatten(1)


def _squared_singular_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending, of the matrix over its largest magnitude, and that magnitude: float64, NaN where not finite."""
    matrix = as_matrix(weight)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    low, high = torch.aminmax(matrix)
    largest = torch.maximum(high, -low).double()
    is_finite = torch.isfinite(largest)
    wide = matrix.to(torch.float64, copy=True).div_(torch.where(is_finite & (largest > 0), largest, 1.0))
    # The eigensolver raises on NaN, and asking first would wait for the device: solve a zero matrix instead.
    power = torch.linalg.eigvalsh(torch.where(is_finite, _gram(wide), 0.0))
    power = torch.where(power > power[-1] * (power.numel() * 2.0**-52), power, 0.0)
    return torch.where(is_finite, power, math.nan), torch.where(is_finite, largest, math.nan)


def _gram(matrix: Tensor) -> Tensor:
    """W W^T in its lower triangle, all that the eigensolver reads; above, what fell off in blocks."""
    rows = matrix.shape[0]
    gram = matrix.new_zeros(rows, rows)
    for start in range(0, rows, _GRAM_BLOCK):
        end = min(start + _GRAM_BLOCK, rows)
        torch.matmul(matrix[start:end], matrix[:end].T, out=gram[start:end, :end])
    return gram


def _stable_rank(power: Tensor) -> Tensor:
    return _zero_where_empty(power, power.sum() / power[-1])


def _effective_rank(power: Tensor) -> Tensor:
    singular = power.sqrt()
    return _zero_where_empty(power, torch.special.entr(singular / singular.sum()).sum().exp())


def _variance_rank(power: Tensor, share: float) -> Tensor:
    held = power.flip(0).cumsum(0) / power.sum()
    rank = (held < share).sum().clamp(max=power.numel() - 1) + 1
    return _zero_where_empty(power, torch.where(power[-1].isnan(), math.nan, rank.double()))


def _zero_where_empty(power: Tensor, rank: Tensor) -> Tensor:
    return torch.where(power[-1] == 0, 0.0, rank)
