"""The compiled step equals the torch reference bit for bit: weights, state and counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from altgrad.quantization import get_format
from altgrad.quantization.kernels import grid_of
from altgrad.training import GridOptim, ManifoldAdamW, RoundedAdamW, RoundedOptimizer
from altgrad.training.kernels import Count
from altgrad.training.kernels import reference as step_reference
from altgrad.training.kernels.layout import PIECE

pytest.importorskip("numba")

DEVICE = "cpu"
SMALL = 5
SHAPE = (37, 61)  # neither a whole number of blocks nor of vectors
ARMS = {
    "plain": lambda p, f: RoundedAdamW(p, lr=3e-3, format=None, weight_decay=0.1),
    "adamw": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, weight_decay=0.1),
    "adamw_fixed_scale": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, tensor_scale=0.37),
    "nearest": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, rounding="nearest"),
    "stochastic": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, rounding="stochastic", weight_decay=0.1),
    "stochastic_odd_scale": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, rounding="stochastic", tensor_scale=0.011),
    "eco": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, rounding="stochastic", error_feedback=True),
    "manifold": lambda p, f: ManifoldAdamW(p, lr=3e-3, format=f, weight_decay=0.1),
    "manifold_sr": lambda p, f: ManifoldAdamW(p, lr=3e-3, format=f, rounding="stochastic"),
    "manifold_stiff": lambda p, f: ManifoldAdamW(p, lr=3e-3, format=f, max_stiffness=0.5),
    "manifold_ulp": lambda p, f: ManifoldAdamW(p, lr=0.3, format=f, step_unit="ulp", rounding="nearest"),
    "manifold_gradient": lambda p, f: ManifoldAdamW(p, lr=3e-3, format=f, precondition="gradient"),
    "grid": lambda p, f: GridOptim(p, lr=3e-2, format=f),
    "grid_decay": lambda p, f: GridOptim(p, lr=3e-2, format=f, weight_decay=0.1, rung_clip=1.5),
    "grid_carry": lambda p, f: GridOptim(p, lr=3e-2, format=f, carry=True, rung_clip=2.5),
    "grid_literal": lambda p, f: GridOptim(
        p, lr=60.0, format=f, normalize="none", step_unit="rungs", weight_decay=0.01
    ),
    "lion": lambda p, f: RoundedOptimizer(p, "lion", format=f),
}
HALVES = (torch.bfloat16, torch.float16)
FORMATS = (
    *("E0M7", "E1M6", "E3M4", "E4M3", "E5M2", "E7M0", "BF16", "FP16", "E2M1"),
    *("E4M3/fnuz", "E7M0/p3109", "INT8"),
)


def run(arm: str, name: str, dtype: torch.dtype, count_every: int = 1):
    """Ten steps, the fourth with a NaN gradient, the last ones outwards to fill the grid."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((torch.randn(SHAPE, generator=generator) * 0.02).to(DEVICE, dtype))
    small = nn.Parameter(torch.randn(SMALL, generator=generator).to(DEVICE, dtype))
    optimizer = ARMS[arm]([weight, small], name)
    optimizer.count_every = count_every
    counts = []
    for step in range(10):
        for parameter in (weight, small):
            grad = torch.randn(parameter.shape, generator=generator) * 0.01
            if step == 3:
                grad.view(-1)[2] = float("nan")
            if step > 5:
                grad = -parameter.detach().float().cpu().sign() * grad.abs()
            parameter.grad = grad.to(DEVICE, dtype)
        optimizer.step()
        counts.append(torch.cat([rows for _, rows in optimizer.counted]))
    state = [value for p in (weight, small) for value in optimizer.state[p].values()]
    return [weight.detach(), small.detach(), *state], torch.stack(counts)


def cases() -> list[tuple[str, str, torch.dtype]]:
    """Every arm and format in float32; in half-width parameters those that can hold the grid, in two formats."""
    whole = [(arm, name, torch.float32) for arm in ARMS for name in FORMATS]
    halves = [(arm, name, dtype) for arm in ARMS for name in ("E4M3", "E2M1") for dtype in HALVES]
    return whole + [case for case in halves if "odd_scale" not in case[0]]


@pytest.mark.parametrize(("arm", "name", "dtype"), cases())
def test_compiled_step_equals_the_reference(arm, name, dtype, monkeypatch):
    compiled, compiled_counts = run(arm, name, dtype)
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    reference, reference_counts = run(arm, name, dtype)
    assert torch.equal(compiled_counts, reference_counts)
    for ours, theirs in zip(compiled, reference, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "_scale" not in arm])
def test_int8_steps_as_e0m7_does(arm):
    weights, counts = run(arm, "INT8", torch.float32)
    others, counts_of_others = run(arm, "E0M7", torch.float32)
    assert torch.equal(counts, counts_of_others)
    for ours, theirs in zip(weights[:2], others[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("arm", ["grid", "grid_carry", "stochastic", "adamw", "manifold"])
def test_steps_that_count_less_equal_the_reference_too(arm, monkeypatch):
    compiled, compiled_counts = run(arm, "E4M3", torch.float32, 3)
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    reference, reference_counts = run(arm, "E4M3", torch.float32, 3)
    assert torch.equal(compiled_counts, reference_counts)
    for ours, theirs in zip(compiled, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("arm", ["adamw", "manifold"])
def test_a_master_that_others_have_changed_is_counted_under_its_own_amax(arm, monkeypatch):
    def changed_between_steps() -> list[torch.Tensor]:
        torch.manual_seed(0)
        weight, results = nn.Parameter(torch.randn(40, 30) * 0.02), []
        optimizer = ARMS[arm]([weight], "E4M3")
        optimizer.count_every = 1
        for step in range(4):
            weight.grad = torch.randn(40, 30) * 0.01
            optimizer.step()
            results += [weight.detach().clone(), optimizer.counted[0][1]]
            with torch.no_grad():
                weight.mul_(0.3) if step % 2 else weight.copy_(weight * 5)
        return results

    compiled = changed_between_steps()
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled, changed_between_steps(), strict=True))


def test_the_comparison_can_fail(monkeypatch):
    compiled, _ = run("grid", "E4M3", torch.float32)
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    other, _ = run("grid", "E3M4", torch.float32)
    assert not torch.equal(compiled[0], other[0])


@pytest.mark.parametrize("arm", ["adamw", "grid", "manifold_sr"])
def test_threads_change_nothing(arm):
    torch.manual_seed(0)
    before, results = torch.get_num_threads(), []
    start = [torch.randn(300, 300) * 0.02 for _ in range(5)]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            parameters = [nn.Parameter(tensor.clone()) for tensor in start]
            optimizer = ARMS[arm](parameters, "E4M3")
            for parameter in parameters:
                parameter.grad = parameter.detach() * 0.1
            optimizer.step()
            results.append((parameters, optimizer.counted[0][1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


SIZES = (40, 5, 0, PIECE + 33, 16, 3, 2 * PIECE, 1, PIECE + 7, 100)
"""Shorter and longer than the tensors beside them, than a piece and than a vector."""


def stepped(bad: dict[int, int], value: float = float("nan")):
    """Weights, moments and skips after two steps; in the second a gradient of each bad tensor has one bad element."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, generator=generator) * 0.02) for size in SIZES]
    optimizer = ARMS["grid"](parameters, "E4M3")
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(2):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.01
            if step and index in bad:
                parameter.grad[bad[index]] = value
        optimizer.step()
        before = before or [(p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for p in parameters]
    after = [(p.detach(), optimizer.state[p]["exp_avg"]) for p in parameters]
    (skips,) = (rows[:, Count.SKIPPED].tolist() for _, rows in optimizer.counted)
    return before, after, skips


def hard_places() -> list[dict[int, int]]:
    """One bad element at the ends of tensors, pieces and vectors, and bad tensors in a row."""
    single = [
        {index: place}
        for index, size in enumerate(SIZES)
        for place in {0, 15, 16, size - 17, size - 1, PIECE - 1, PIECE}
        if 0 <= place < size
    ]
    return [*single, {0: 3, 1: 2}, {3: PIECE, 4: 0, 5: 2, 6: PIECE}, {8: 0, 9: 99}]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_bad_gradient_skips_its_own_tensor_wherever_it_lies(value):
    before, clean, skips = stepped({})
    assert not any(skips)
    for bad in hard_places():
        _, after, skips = stepped(bad, value)
        assert [index for index, skipped in enumerate(skips) if skipped] == sorted(bad)
        for index, found in enumerate(after):
            wanted = before[index] if index in bad else clean[index]
            assert all(map(torch.equal, found, wanted)), (bad, index)


def test_views_with_gaps_are_stepped_like_their_copies():
    base = torch.randn(8, 6)
    gapped, whole = nn.Parameter(base.t()), nn.Parameter(base.t().contiguous())
    for parameter in (gapped, whole):
        parameter.grad = torch.full_like(parameter, 0.01)
        RoundedAdamW([parameter], lr=1e-2, format="E4M3", rounding="stochastic").step()
    assert not gapped.is_contiguous() and torch.equal(gapped, whole)


def test_the_binade_of_a_quotient_needs_no_division():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0x00800000, 0x7F800000, (1 << 18,), generator=generator, dtype=torch.int32)
    weights = torch.cat([bits.view(torch.float32), -bits.view(torch.float32), torch.zeros(1)])
    for scale in (1.0, 1.5, 1 + 2**-23, 2 - 2**-23, 3.7e-20, 2.0**-100, 1e30, *weights[:20].abs().tolist()):
        scale = torch.tensor(scale)
        for name in ("E4M3", "E7M0", "E7M0/p3109", "E0M7", "INT8", "BF16"):
            grid = grid_of(get_format(name))
            assert torch.equal(
                step_reference.quotient_bits(weights, scale, grid), step_reference.exponent_bits(weights / scale, grid)
            )
