"""Native 8-bit products equal the emulated ones within the stated accumulation error, and say when they can't."""

from __future__ import annotations

import pytest
import torch

from altgrad.quantization import compute_scale, get_format, quantize
from altgrad.quantization.products import Operand, matmul_transposed, native_kind

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operand(shape: tuple[int, int], name: str, seed: int, power_of_two: bool = False) -> Operand:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 0.3).to(DEVICE)
    scale = compute_scale(x, name, power_of_two=power_of_two)
    return Operand(quantize(x, name, scale), get_format(name), scale)


def carried(a: Operand) -> Operand:
    """The same operand as bfloat16 grid values."""
    return Operand((a.values / a.scale).to(torch.bfloat16), a.fmt, a.scale, a.scale)


def accumulation_bound(a: Operand, b: Operand, is_native: bool = False) -> torch.Tensor:
    """K · 2^-23 of the sum of magnitudes: float32 sums in any order, and the operands' own last bit.

    The float8 units of an H100 keep fewer bits of a sum: 1.5e-4 of the magnitudes was the worst seen (K 256 to 4096).
    """
    magnitudes = a.values.abs().float() @ b.values.abs().float().T
    if is_native and DEVICE == "cuda" and native_kind(a.fmt, b.fmt) == "float8":
        return 2.0**-12 * magnitudes
    return a.values.shape[1] * 2.0**-23 * magnitudes


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("E4M3", "E4M3"),
        ("E5M2", "E4M3"),
        ("E4M3", "E5M2"),
        ("E0M7", "E0M7"),
        ("E1M6", "E1M6"),
        ("E0M7", "E1M6"),
        ("INT8", "INT8"),
        ("INT8", "E0M7"),
        ("INT4", "INT8"),
    ],
)
def test_native_equals_emulated(left, right, power_of_two):
    a, b = operand((48, 128), left, 1, power_of_two), operand((32, 128), right, 2, power_of_two)
    exact = a.values.double() @ b.values.double().T
    for left, right in ((a, b), (carried(a), carried(b))):
        for product in ("native", "emulated"):
            error = (matmul_transposed(left, right, product).double() - exact).abs()
            assert (error <= accumulation_bound(a, b, product == "native")).all()


def test_integer_products_are_exact_under_power_of_two_scales():
    for left, right in (("E0M7", "E1M6"), ("INT8", "INT4")):
        a, b = operand((32, 512), left, 1, True), operand((32, 512), right, 2, True)
        exact = a.values.double() @ b.values.double().T
        assert torch.equal(matmul_transposed(a, b, "native").double(), exact)


@pytest.mark.parametrize(("left", "right"), [("E5M2", "E5M2"), ("E3M4", "E4M3"), ("BF16", "BF16"), ("E0M7", "E4M3")])
def test_pairs_without_a_unit_say_so(left, right):
    assert native_kind(get_format(left), get_format(right)) is None
    a, b = operand((16, 16), left, 1), operand((16, 16), right, 2)
    with pytest.raises(ValueError, match="no hardware multiplies"):
        matmul_transposed(a, b, "native")
    assert torch.equal(matmul_transposed(a, b, "auto"), matmul_transposed(a, b, "emulated"))
