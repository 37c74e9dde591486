"""Spectral norm and stable rank at every check, for the price of reading the matrix a few times.

A weight hardly turns between two checks, so the direction in which it was largest is a good first guess at where it
is now. `SpectralNormTracker` keeps that vector v and searches the span of v, G v, G^2 v ... (G = W^T W) for the
longest image: a power iteration that forgets nothing on its way (Lanczos; Golub and Van Loan, Matrix Computations,
10.1). That matters, since the top singular values of a weight lie close together. On random matrices, the hardest
case, that drift by 1 % of their energy from check to check, eight products with G find the norm to 1e-3, where a
plain power iteration of as many remains 2e-2 below. The result is never above the true norm, so a stable rank made
of it, (|W|_F / norm)^2, is never below the true one but for rounding.

Each guess has a little of one fixed vector added (`RESTART`): a direction that was absent from the weight, and so
from the kept vector, finds its way in when it comes to dominate, as in a sudden collapse onto it.

`RankGauge` is the default schedule: every number of `ranks` exactly once in `EXACT_EVERY` checks, these on all
others. For the matrices of a 12-layer GPT, 768 wide, that costs about 1/20 of their singular values at each check (in
float32, one CPU thread); `tests/bench/ranks.py` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad.quantization.kernels.dispatch import scalar
from altgrad.quantization.ops import hash_uniform
from altgrad.quantization.ranks import SpectralNorms, as_matrix, spectrum

EXACT_EVERY = 20
"""Checks from one exact spectrum to the next."""
WARM_PRODUCTS = 8
COLD_PRODUCTS = 32
RESTART = 1e-2
"""Length of the fixed vector added to the kept one, of length 1."""
_SMALL = 1 << 18
"""Elements up to which matrices are searched together: copying larger ones would cost more than their calls."""
_SAFE = 1e-12, 1e18
"""Lengths between which float32's squares neither overflow nor vanish."""
_SQUARINGS = 14
_EXHAUSTED = 1e-5
"""A new direction shorter than this part of what it was before the known ones were taken out is rounding."""


class SpectralNormTracker:
    """Warm search for the spectral norm; keeps one vector per name and never waits for the device.

    `products` with G at each update, `cold_products` at a name's first. The first guess is the same in every run.
    A matrix that is zero or not finite leaves its vector as it was.
    """

    def __init__(self, products: int = WARM_PRODUCTS, cold_products: int = COLD_PRODUCTS) -> None:
        if products < 1 or cold_products < 1:
            raise ValueError(f"products must be at least 1, got {products} and {cold_products}")
        self.products, self.cold_products = products, cold_products
        self._vectors: dict[str, Tensor] = {}

    def update(self, name: str, weight: Tensor) -> SpectralNorms:
        """Norms and stable rank of [out, ...], shapes and edge cases as in `ranks`; ValueError for another width."""
        return self.update_all({name: weight})[name]

    @torch.no_grad()
    def update_all(self, weights: Mapping[str, Tensor]) -> dict[str, SpectralNorms]:
        """`update` of all by name; small matrices of one shape are searched together."""
        groups: dict[object, dict[str, Tensor]] = {}
        for name, weight in weights.items():
            matrix = as_matrix(weight)
            kept = self._vectors.get(name)
            if kept is not None and kept.numel() != matrix.shape[1]:
                raise ValueError(f"{name!r} had {kept.numel()} columns, now it has {matrix.shape[1]}")
            alone = name if matrix.numel() > _SMALL else None
            kind = matrix.shape, matrix.dtype, matrix.device, kept is None, alone
            groups.setdefault(kind, {})[name] = matrix
        found: dict[str, SpectralNorms] = {}
        for group in groups.values():
            matrices = [m if m.dtype == torch.float64 else m.float() for m in group.values()]
            together = torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]
            found |= self._update_group(list(group), together)
        return {name: found[name] for name in weights}

    def _update_group(self, names: list[str], matrices: Tensor) -> dict[str, SpectralNorms]:
        """Of [count, out, in] matrices that are all known or all new."""
        is_new = names[0] not in self._vectors
        columns = matrices.shape[2]
        fixed = _unit(hash_uniform((columns,), 0, matrices.device).to(matrices.dtype) - 0.5)
        kept = fixed.expand(len(names), columns)
        if not is_new:
            kept = torch.stack([self._vectors[name].to(fixed) for name in names])
        frobenius = _frobenius(matrices)
        products = self.cold_products if is_new else self.products
        shares, vectors = _longest_images(matrices, frobenius, kept + RESTART * fixed, products)
        vectors = torch.where(torch.isfinite(shares)[:, None], vectors, kept)
        self._vectors |= dict(zip(names, vectors.unbind(), strict=True))
        numbers = zip(*(number.unbind() for number in _norms(shares, frobenius)), strict=True)
        return {name: SpectralNorms(*own) for name, own in zip(names, numbers, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """The kept vectors by name."""
        return {name: vector.clone() for name, vector in self._vectors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._vectors = {name: vector.clone() for name, vector in state.items()}


class RankGauge:
    """Measures a model's matrices check by check: all five numbers at the first and every `exact_every`-th.

    Call it once per logging interval. Where a check was exact the results are `Spectrum`s, else `SpectralNorms`.
    """

    def __init__(self, exact_every: int = EXACT_EVERY, tracker: SpectralNormTracker | None = None) -> None:
        if exact_every < 1:
            raise ValueError(f"exact_every counts checks, at least 1; got {exact_every}")
        self.exact_every = exact_every
        self._tracker = SpectralNormTracker() if tracker is None else tracker
        self._checks = 0

    def measure(self, matrices: Mapping[str, Tensor]) -> dict[str, SpectralNorms]:
        """One check of all matrices by name; 0-d tensors, for whoever logs them to fetch."""
        estimates = self._tracker.update_all(matrices)
        is_exact = self._checks % self.exact_every == 0
        self._checks += 1
        return {name: spectrum(weight) for name, weight in matrices.items()} if is_exact else estimates

    def state_dict(self) -> dict[str, Any]:
        """Checks so far and the tracker's vectors."""
        return {"checks": self._checks, "vectors": self._tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken."""
        self._checks = int(state["checks"])
        self._tracker.load_state_dict(state["vectors"])


def _frobenius(matrices: Tensor) -> Tensor:
    """Of [count, out, in]: float64 [count], to float32's rounding where its squares neither overflow nor vanish.

    Only a CPU can be asked where that is without waiting; elsewhere all is float64.
    """
    if matrices.device.type == "cpu":
        rows = torch.linalg.vector_norm(matrices, dim=2).double()
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
        least, most = scalar(lengths.min()), scalar(lengths.max())
        if least is not None and most is not None and _SAFE[0] < least and most < _SAFE[1]:
            return lengths
    exact: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64)
    return exact


def _norms(shares: Tensor, frobenius: Tensor) -> list[Tensor]:
    """Stable rank, spectral and Frobenius norm from the spectral norm's share in the latter, [count] each.

    The zero matrix and the non-finite one have laws of their own.
    """
    is_zero, is_finite = frobenius == 0, torch.isfinite(frobenius)
    found = (torch.where(is_zero, 0.0, value) for value in (shares**-2, shares * frobenius, frobenius))
    return [torch.where(is_finite, value, math.nan) for value in found]


def _longest_images(matrices: Tensor, frobenius: Tensor, guesses: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """Longest |W x| / |W|_F over unit vectors x in the span of guess, G guess, ...: float64 [count], and these x.

    `matrices` [count, out, in], `guesses` [count, in].
    """
    count, rows, columns = matrices.shape
    # Over the Frobenius norm every length is at most 1, so nothing overflows whatever the weight's scale.
    length = torch.where(frobenius > 0, frobenius, 1.0).to(matrices.dtype)[:, None]
    basis = guesses.new_zeros(count, products, columns)
    images = guesses.new_zeros(count, products, rows)
    directions = _unit(guesses)
    for i in range(products):
        basis[:, i] = directions
        images[:, i] = _times(matrices, directions) / length
        following, known = _times(matrices.mT, images[:, i]) / length, basis[:, : i + 1]
        smallest = _EXHAUSTED * torch.linalg.vector_norm(following, dim=1, keepdim=True)
        for _ in range(2):  # once leaves too much of the basis in float32
            following = following - _times(known.mT, _times(known, following))
        is_new = torch.linalg.vector_norm(following, dim=1, keepdim=True) > smallest
        directions = torch.where(is_new, _unit(following), 0.0)
    values, weights = _top_eigenpairs((images @ images.mT).double())
    return values.sqrt(), _unit(_times(basis.mT, weights.to(basis.dtype)))


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[count, rows, columns] by [count, columns], as rows by transposed matrices: BLAS is twice as fast at that."""
    return torch.bmm(vectors[:, None], matrices.mT)[:, 0]


def _top_eigenpairs(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Of small positive semidefinite matrices, from their 2^14-th powers: an eigensolver would wait for the device."""
    power = grams / _trace(grams)
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / _trace(power)
    longest = power.diagonal(dim1=1, dim2=2).argmax(dim=1)
    vectors = power.gather(2, longest[:, None, None].expand(-1, power.shape[1], 1))[:, :, 0]
    return (power * grams).sum(dim=(1, 2)), vectors


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def _unit(vectors: Tensor) -> Tensor:
    """Along the last axis; the zero vector stays."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(norms > 0, vectors / norms, vectors)
