"""The Triton kernels equal the reference bit for bit: under the interpreter here, on a GPU where there is one."""

from __future__ import annotations

import os
import time

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="triton is not installed (extra 'gpu')")

from altgrad.quantization import compute_scale, get_format  # noqa: E402
from altgrad.quantization.kernels import gpu, grid_of, reference  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
FORMATS = (
    "E0M7",
    "E1M6",
    "E2M5",
    "E3M4",
    "E4M3",
    "E4M3/ieee",
    "E5M2",
    "E5M2/finite",
    "E6M1",
    "E7M0",
    "E2M1",
    "E3M2",
    "E4M3b11/fnuz",
    "E7M0/p3109",
    "E3M4/p3109",
    "INT8",
    "BF16",
    "FP16",
)
SEED = 0x9876_5432_1FED_CBA9
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def inputs(name: str) -> torch.Tensor:
    """Every value, every midpoint and their float32 neighbours, specials, and magnitudes from 2^-140 to 2^127."""
    values = get_format(name).values[:: max(1, get_format(name).num_codes // 1024)]
    middle = (values[1:].double() + values[:-1].double()).div(2).float()
    points = torch.cat([values, middle])
    infinity = torch.tensor(float("inf"))
    around = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-140, 128, (2000,), generator=generator).double()
    spread = (torch.randn(2000, generator=generator).double() * torch.exp2(exponents)).float()
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3.4e38])
    return torch.cat([around, spread, special]).to(DEVICE)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal including the sign of zero; any NaN equals any other."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool((a.isnan() & b.isnan() | (a.view(bits) == b.view(bits))).all())


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_the_references(name, rounding):
    grid, x = grid_of(get_format(name)), inputs(name)
    seed = SEED if rounding == "stochastic" else None
    for scale in (1.0, 0.37, 2.0**-20):
        out = torch.empty_like(x)
        gpu.quantize(x, scale, grid, rounding, "saturate", seed, out)
        expected = reference.quantize(x, torch.tensor(scale, device=DEVICE), grid, rounding, "saturate", seed)
        assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E0M7", "E7M0"])
def test_half_inputs_are_widened_and_rounded_back(name, dtype):
    grid, x = grid_of(get_format(name)), inputs(name).to(dtype)
    for scale in (1.0, 0.37):
        one, out = torch.tensor(scale, device=DEVICE), torch.empty_like(x)
        gpu.quantize(x, scale, grid, "nearest", "saturate", None, out)
        assert same_bits(out, reference.quantize(x.float(), one, grid, "nearest", "saturate", None, dtype).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["E6M1", "E7M0", "E8M7", "E5M2/finite", "E6M9", "E0M7"])
def test_saturation_stops_where_the_dtype_ends(name, dtype):
    grid, x = grid_of(get_format(name)), inputs(name).to(dtype)
    for scale in (1.0, 0.37, 300.0, 2.0**14, 1e30, 3e38):
        for rounding in ("nearest", "toward_zero", "stochastic"):
            one, out = torch.tensor(scale, device=DEVICE), torch.empty_like(x)
            gpu.quantize(x, scale, grid, rounding, "saturate", SEED, out)
            expected = reference.quantize(x.float(), one, grid, rounding, "saturate", SEED, dtype).to(dtype)
            assert same_bits(out, expected) and bool((out.isfinite() | x.isnan()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "FP16"])
def test_grid_values_are_what_the_scale_is_multiplied_with(name, rounding, dtype):
    grid, x = grid_of(get_format(name)), inputs(name).to(dtype)
    scale = torch.tensor(0.37, device=DEVICE)
    out = torch.empty_like(x, dtype=torch.bfloat16)
    gpu.grid_values(x, scale, grid, rounding, SEED, out)
    y = x.float() / scale
    rounded = reference.quantize(y, torch.ones_like(scale), grid, rounding, "saturate", SEED)
    assert same_bits(out.float(), torch.where(y.isinf(), y, rounded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("largest", [3.7, 0.0, 1e-42, float("inf"), float("nan")])
def test_amax_scale_and_values_at_once(largest, power_of_two, dtype):
    fmt = get_format("E4M3")
    x = (torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 0.1).clamp_(-0.5, 0.5)
    x = (x * (largest if largest < 1 else 1.0)).to(DEVICE, dtype)
    x[4321] = -largest
    out, expected = (torch.empty_like(x, dtype=torch.bfloat16) for _ in range(2))
    rule = gpu.Rule(1.5 / fmt.max, power_of_two)
    scale = gpu.grid_values_by_rule(x, grid_of(fmt), "nearest", None, out, rule)
    wanted = compute_scale(x, fmt, headroom=1.5, power_of_two=power_of_two)
    gpu.grid_values(x, wanted, grid_of(fmt), "nearest", None, expected)
    assert torch.equal(scale, wanted) and same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_scaled_and_rounded_once(dtype):
    y, out = torch.randn(37, 61, device=DEVICE), torch.empty(37, 61, dtype=dtype, device=DEVICE)
    one, other = (torch.tensor(value, device=DEVICE) for value in (0.37, 1.9))
    gpu.scaled(y, [one], out)
    assert torch.equal(out, (y * one).to(dtype))
    gpu.scaled(y, [one, other], out)
    assert torch.equal(out, (y * one * other).to(dtype))
    bias = torch.randn(61, device=DEVICE)
    gpu.scaled(y, [one], out, bias)
    assert torch.equal(out, (y * one + bias).to(dtype))
    gpu.scaled(y, [], out, bias)
    assert torch.equal(out, (y + bias).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_transposes_keep_the_values(dtype):
    if not ON_GPU and dtype != torch.bfloat16:
        pytest.skip("Triton's interpreter has no float8; needs an NVIDIA GPU")
    x = torch.randint(-7, 8, (70, 130), device=DEVICE).to(torch.bfloat16)
    assert torch.equal(gpu.transposed(x, dtype).float(), x.T.float())


def test_overflow_to_infinity_and_in_place():
    grid, x = grid_of(get_format("E5M2")), inputs("E5M2")
    expected = reference.quantize(x, 1.0, grid, "nearest", "inf")
    assert expected.isinf().sum() > x.isinf().sum()
    gpu.quantize(x, 1.0, grid, "nearest", "inf", None, x)
    assert same_bits(x, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_indices_are_the_references(name):
    grid, x = grid_of(get_format(name)), inputs(name)
    out = torch.empty(x.shape, dtype=torch.int32, device=DEVICE)
    gpu.code_index(x, 0.37, grid, out)
    assert torch.equal(out, reference.code_index(x, torch.tensor(0.37, device=DEVICE), grid))


def test_seeds_that_are_small_numbers_stay_numbers():
    grid, x = grid_of(get_format("E4M3")), inputs("E4M3")
    for seed in (0, 1, 2**63):
        out = torch.empty_like(x)
        gpu.quantize(x, 1.0, grid, "stochastic", "saturate", seed, out)
        assert same_bits(out, reference.quantize(x, 1.0, grid, "stochastic", "saturate", seed))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_ratio_to_a_device_copy_is_printed(record_property):
    x = torch.randn(2**26, device="cuda")
    out = torch.empty_like(x)
    grid = grid_of(get_format("E4M3"))

    def seconds(work) -> float:
        work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    ratio = seconds(lambda: gpu.quantize(x, 1.0, grid, "nearest", "saturate", None, out)) / seconds(
        lambda: out.copy_(x)
    )
    record_property("quantize_over_copy", ratio)
    print(f"quantize / copy_ on {torch.cuda.get_device_name()}: {ratio:.2f}")
    assert torch.isfinite(out).all()
