"""Spectra against float64 SVD, the warm search against exact norms, and the laws of odd inputs."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from altgrad.quantization import RankGauge, SpectralNormTracker, compute_effective_rank, compute_stable_rank
from altgrad.quantization.ranks import SpectralNorms, Spectrum, spectrum, variance_rank

RANKS = [compute_stable_rank, compute_effective_rank, variance_rank]
NUMBERS = ["stable_rank", "spectral_norm", "frobenius_norm", "effective_rank", "variance_rank"]


def numbers_of(weight: torch.Tensor) -> dict[str, float]:
    """The definitions, from numpy's singular values in float64."""
    s = np.linalg.svd(weight.double().reshape(weight.shape[0], -1).numpy(), compute_uv=False)
    energy = s**2
    return {
        "stable_rank": energy.sum() / energy[0],
        "spectral_norm": s[0],
        "frobenius_norm": math.sqrt(energy.sum()),
        "effective_rank": math.exp(scipy.stats.entropy(s)),
        "variance_rank": int((np.cumsum(energy) / energy.sum() < 0.99).sum()) + 1,
    }


def weights_of_all_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(40, 170, generator=generator)
    decaying = torch.linalg.qr(torch.randn(60, 60, generator=generator)).Q * torch.logspace(0, -6, 60)
    return {
        "wide": wide,
        "tall": wide.T.contiguous(),
        "square": torch.randn(30, 30, generator=generator),
        "convolution": torch.randn(8, 3, 5, 5, generator=generator),
        "not contiguous": torch.randn(90, 64, generator=generator)[::3, 1::2],
        "transposed": wide.T,
        "half": wide.half(),
        "bfloat16": wide.bfloat16(),
        "float64": wide.double(),
        "tiny": wide * 1e-25,
        "huge": wide * 1e30,
        "decaying": decaying,
        "one dominant": wide + 30 * torch.outer(torch.ones(40), torch.ones(170)),
    }


@pytest.mark.parametrize("kind", weights_of_all_kinds())
def test_a_spectrum_equals_the_definitions_by_singular_values(kind):
    weight = weights_of_all_kinds()[kind]
    found, expected = spectrum(weight), numbers_of(weight)
    assert {name: getattr(found, name).item() for name in NUMBERS} == pytest.approx(expected, rel=1e-6)
    assert all(getattr(found, name).shape == () for name in NUMBERS)
    assert compute_stable_rank(weight) == found.stable_rank
    assert compute_effective_rank(weight) == found.effective_rank
    assert variance_rank(weight) == found.variance_rank


def test_stable_rank_of_a_gpt_layer_is_within_a_thousandth():
    weight = torch.randn(768, 768) * 0.02 + torch.outer(torch.randn(768), torch.randn(768)) * 0.01
    assert spectrum(weight).stable_rank.item() == pytest.approx(numbers_of(weight)["stable_rank"], rel=1e-3)


def test_variance_rank_of_other_shares():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert [variance_rank(weight, share).item() for share in (0.5, 0.7, 0.95, 1.0)] == [1, 2, 3, 3]
    with pytest.raises(ValueError, match=r"share.*1\.5"):
        variance_rank(weight, 1.5)


@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_known_matrices(size):
    for rank in RANKS:
        assert rank(torch.eye(12) * size).item() == pytest.approx(12)
        assert rank(torch.outer(torch.randn(300), torch.randn(700)) * size).item() == pytest.approx(1, abs=1e-3)
        assert rank(torch.randn(5) * size).item() == pytest.approx(1)
        assert rank(torch.full((), size)).item() == pytest.approx(1)
        assert rank(torch.zeros(5, 6)).item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_not_finite_has_no_rank(bad, whole):
    weight = (
        torch.full((6, 4), bad)
        if whole
        else torch.randn(6, 4).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(bad))
    )
    assert all(getattr(spectrum(weight), name).isnan() for name in NUMBERS)
    found = SpectralNormTracker().update("a", weight)
    assert all(value.isnan() for value in vars(found).values())


@pytest.mark.parametrize("bad", [torch.zeros(0, 3), torch.zeros(2, 2, dtype=torch.int64)])
def test_no_rank_without_numbers(bad):
    for call in (spectrum, lambda weight: SpectralNormTracker().update("a", weight), *RANKS):
        with pytest.raises(ValueError, match="floating-point elements"):
            call(bad)


@pytest.mark.parametrize("kind", weights_of_all_kinds())
def test_the_first_search_finds_the_norm(kind):
    weight = weights_of_all_kinds()[kind]
    found, expected = SpectralNormTracker().update("a", weight), numbers_of(weight)
    assert type(found) is SpectralNorms
    for name, value in vars(found).items():
        assert value.shape == () and value.item() == pytest.approx(expected[name], rel=1e-3)


def test_known_matrices_by_search():
    tracker = SpectralNormTracker()
    zero = tracker.update("zero", torch.zeros(4, 3))
    assert [value.item() for value in vars(zero).values()] == [0.0, 0.0, 0.0]
    assert tracker.update("row", torch.randn(7)).stable_rank.item() == pytest.approx(1, rel=1e-5)
    assert tracker.update("rank 1", torch.outer(torch.randn(20), torch.randn(30))).stable_rank.item() == (
        pytest.approx(1, rel=1e-5)
    )
    assert tracker.update("identity", torch.eye(12)).stable_rank.item() == pytest.approx(12, rel=1e-5)
    single = torch.zeros(20, 30)
    single[7, 11] = 1e-30
    assert tracker.update("one element", single).stable_rank.item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("drift", [0.01, 0.05])
def test_warm_searches_stay_close_to_a_drifting_weight(drift):
    tracker, weight = SpectralNormTracker(), torch.randn(96, 384)
    for _ in range(20):
        exact = numbers_of(weight)
        found = tracker.update("a", weight)
        assert found.spectral_norm.item() == pytest.approx(exact["spectral_norm"], rel=1e-2)
        assert found.spectral_norm.item() <= exact["spectral_norm"] * (1 + 1e-5)
        weight = weight * math.sqrt(1 - drift) + torch.randn_like(weight) * math.sqrt(drift)


def test_a_sudden_collapse_is_seen_at_the_next_check():
    tracker, weight = SpectralNormTracker(), torch.randn(64, 128)
    for _ in range(5):
        tracker.update("a", weight)
    collapsed = weight + 30 * torch.outer(torch.randn(64), torch.randn(128))
    found = tracker.update("a", collapsed)
    assert found.stable_rank.item() == pytest.approx(numbers_of(collapsed)["stable_rank"], rel=1e-3) and (
        found.stable_rank < 1.1
    )


def test_a_direction_the_vector_lacks_is_found():
    tracker, first, second = SpectralNormTracker(), torch.zeros(10, 10), torch.zeros(10, 10)
    first[0, 0], second[0, 0], second[5, 5] = 1.0, 1.0, 1.001
    for _ in range(3):
        tracker.update("a", first)
    assert tracker.update("a", second).spectral_norm.item() == pytest.approx(1.001, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_broken_check_leaves_the_vector_alone(bad):
    disturbed, calm, weight = SpectralNormTracker(), SpectralNormTracker(), torch.randn(48, 64)
    for tracker in (disturbed, calm):
        tracker.update("a", weight)
    disturbed.update("a", torch.full_like(weight, bad))
    assert torch.equal(disturbed.state_dict()["a"], calm.state_dict()["a"])
    assert vars(disturbed.update("a", weight)) == vars(calm.update("a", weight))


def test_matrices_searched_together_do_not_disturb_each_other():
    weights = {
        "a": torch.randn(48, 64),
        "zero": torch.zeros(48, 64),
        "b": torch.randn(48, 64),
        "other": torch.randn(8, 3),
        "nan": torch.full((48, 64), math.nan),
        "tiny": torch.randn(48, 64) * 1e-30,
        "rank 1": torch.ones(48, 64),
        "large": torch.randn(600, 500),
    }
    together = SpectralNormTracker()
    for check in range(3):
        found = together.update_all(weights)
        assert list(found) == list(weights)
        weights |= {"late": torch.randn(48, 64)} if check == 0 else {}
    for name, weight in weights.items():
        alone = SpectralNormTracker()
        for _ in range(2 if name == "late" else 3):
            expected = alone.update(name, weight)
        for number, value in vars(found[name]).items():
            assert value.item() == pytest.approx(getattr(expected, number).item(), rel=1e-4, nan_ok=True), name


def test_a_tracker_refuses_another_shape():
    tracker = SpectralNormTracker()
    tracker.update("a", torch.randn(3, 4))
    with pytest.raises(ValueError, match="'a' had 4 columns, now it has 5"):
        tracker.update("a", torch.randn(3, 5))
    with pytest.raises(ValueError, match="products"):
        SpectralNormTracker(0)


def test_the_gauge_is_exact_on_schedule_and_resumes_bitwise():
    weights = [{"a": torch.randn(20, 30), "b": torch.randn(40, 10)} for _ in range(9)]
    gauge = RankGauge(exact_every=4)
    whole = [gauge.measure(check) for check in weights]
    assert [isinstance(found["a"], Spectrum) for found in whole] == [i % 4 == 0 for i in range(9)]
    assert whole[8]["b"].effective_rank == compute_effective_rank(weights[8]["b"])
    for cut in (1, 4, 6):
        before, after = RankGauge(exact_every=4), RankGauge(exact_every=4)
        for check in weights[:cut]:
            before.measure(check)
        after.load_state_dict(before.state_dict())
        for check, expected in zip(weights[cut:], whole[cut:], strict=True):
            found = after.measure(check)
            assert all(vars(found[name]) == vars(expected[name]) for name in found)
    with pytest.raises(ValueError, match="exact_every"):
        RankGauge(0)
