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

from altgrad.quantization.ops import hash_uniform
from altgrad.quantization.ranks import SpectralNorms, as_matrix, spectrum

EXACT_EVERY = 20
"""Checks from one exact spectrum to the next."""
WARM_PRODUCTS = 8
COLD_PRODUCTS = 32
RESTART = 1e-2
"""Length of the fixed vector added to the kept one, of length 1."""
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

    @torch.no_grad()
    def update(self, name: str, weight: Tensor) -> SpectralNorms:
        """Norms and stable rank of [out, ...], shapes and edge cases as in `ranks`; ValueError for another width."""
        matrix = as_matrix(weight)
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        fixed = _unit(hash_uniform((matrix.shape[1],), 0, matrix.device).to(matrix.dtype) - 0.5)
        kept = self._vectors.get(name)
        if kept is not None and kept.shape != fixed.shape:
            raise ValueError(f"{name!r} had {kept.numel()} columns, now it has {fixed.numel()}")
        kept = fixed if kept is None else kept.to(fixed)
        frobenius = torch.linalg.vector_norm(matrix, dtype=torch.float64)
        products = self.products if name in self._vectors else self.cold_products
        share, vector = _longest_image(matrix, frobenius, kept + RESTART * fixed, products)
        self._vectors[name] = torch.where(torch.isfinite(share), vector, kept)
        return _norms(share, frobenius)

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
        estimates = {name: self._tracker.update(name, weight) for name, weight in matrices.items()}
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


def _norms(share: Tensor, frobenius: Tensor) -> SpectralNorms:
    """From the spectral over the Frobenius norm; the zero matrix and the non-finite one have laws of their own."""
    is_zero, is_finite = frobenius == 0, torch.isfinite(frobenius)
    found = (torch.where(is_zero, 0.0, value) for value in (share**-2, share * frobenius, frobenius))
    return SpectralNorms(*(torch.where(is_finite, value, math.nan) for value in found))


def _longest_image(matrix: Tensor, frobenius: Tensor, guess: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """Longest |W x| / |W|_F over unit vectors x in the span of guess, G guess, ...: float64, and that x."""
    # Over the Frobenius norm every length is at most 1, so nothing overflows whatever the weight's scale.
    length = torch.where(frobenius > 0, frobenius, 1.0).to(matrix.dtype)
    basis = guess.new_zeros(products, matrix.shape[1])
    images = guess.new_zeros(products, matrix.shape[0])
    direction = _unit(guess)
    for i in range(products):
        basis[i] = direction
        images[i] = torch.mv(matrix, direction) / length
        following, known = torch.mv(matrix.T, images[i]) / length, basis[: i + 1]
        smallest = _EXHAUSTED * torch.linalg.vector_norm(following)
        for _ in range(2):  # once leaves too much of the basis in float32
            following = following - torch.mv(known.T, torch.mv(known, following))
        direction = torch.where(torch.linalg.vector_norm(following) > smallest, _unit(following), 0.0)
    value, weights = _top_eigenpair((images @ images.T).double())
    return value.sqrt(), _unit(torch.mv(basis.T, weights.to(basis.dtype)))


def _top_eigenpair(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Of a small positive semidefinite matrix, from its 2^14-th power: an eigensolver would wait for the device."""
    power = gram / gram.trace()
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / power.trace()
    return (power * gram).sum(), power.index_select(1, power.diagonal().argmax().reshape(1)).flatten()


def _unit(vector: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(vector)
    return torch.where(norm > 0, vector / norm, vector)
