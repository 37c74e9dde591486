"""Kernels against the reference on every 16-bit pattern, every layout and every thread."""

import math
import subprocess
import sys

import pytest
import torch
from oracle import ALL, ONE_ZERO, hard_inputs, has_two_zeros, nearest, same

from altgrad.quantization import FloatFormat, decode, encode, get_format, quantize, ulp
from altgrad.quantization.kernels import cpu
from altgrad.quantization.ops import code_index, hash_uniform, index_to_value, kernel_in_use, quantize_blocks

ROUNDINGS = ["nearest", "stochastic", "toward_zero"]
SPLITS = [f"E{e}M{7 - e}" for e in range(8)]
WIDE_AND_SMALL = ["E4M3/ieee", "E2M1", "E3M0", "E1M2", "E8M0/ieee", "E8M3/ieee", "E7M5", "BF16", "FP16", "E1M14"]
POWERS = [2.0**-9, 2.0, 2.0**-60, 2.0**100, 2.0**-126, 0.5, 2.0**-121]


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def both_kernels(monkeypatch, call):
    found = []
    for kernel in ("reference", "numba"):
        monkeypatch.setenv("ALTGRAD_KERNEL", kernel)
        found.append(call())
    return found


@pytest.mark.parametrize(("place", "name"), enumerate(SPLITS + WIDE_AND_SMALL + ONE_ZERO + ["INT8", "E7M0b40"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_width_pattern(place, name, dtype, monkeypatch):
    fmt, x = get_format(name), every_pattern(dtype)
    overflow = "inf" if fmt.has_inf and place % 2 else "saturate"
    power = POWERS[place % len(POWERS)]
    cases = [(rounding, scale) for rounding in ROUNDINGS for scale in (0.37, power)] + [("nearest", 1.0)]

    def all_calls():
        found = [quantize(x, fmt, s, rounding=r, overflow=overflow, seed=5) for r, s in cases]
        assert all(one.dtype == dtype for one in found)
        index = code_index(x, fmt, power)
        return [*(one.float() for one in found), index.view(torch.float32), ulp(x, fmt, 0.37)]

    reference, fast = both_kernels(monkeypatch, all_calls)
    assert all(same(a, b) for a, b in zip(reference, fast, strict=True))


@pytest.mark.parametrize("name", SPLITS)
def test_bfloat16_rounds_to_the_enumerated_nearest(name):
    x = every_pattern(torch.bfloat16)
    assert kernel_in_use(x) == "numba"
    assert same(quantize(x, name).float(), nearest(x.float(), get_format(name)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kernel", ["reference", "numba"])
def test_layouts_places_and_shapes_give_the_same_numbers(dtype, rounding, kernel, monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", kernel)
    x = (torch.randn(33, 47) * 3).to(dtype)
    for scale in (1.0, 0.3):
        options = {"rounding": rounding, "seed": 3}
        expected = quantize(x, "E4M3", scale, **options)
        strided = torch.empty(47, 33, dtype=dtype).t()
        assert torch.equal(quantize(x.t().contiguous().t(), "E4M3", scale, **options), expected)
        assert torch.equal(quantize(x, "E4M3", scale, out=strided, **options), expected)
        assert torch.equal(quantize(x, "E4M3", torch.tensor(scale), **options), expected)
        own = x.clone()
        assert quantize(own, "E4M3", scale, out=own, **options) is own and torch.equal(own, expected)
        row = x.clone()[3:7]
        assert quantize(row, "E4M3", scale, out=row, **options).data_ptr() == row.data_ptr()
        assert torch.equal(row, quantize(x[3:7], "E4M3", scale, **options))
        assert quantize(x[:0], "E4M3", scale, **options).shape == (0, 47)
        single = quantize(x[0, 0], "E4M3", scale, **options)
        assert single.shape == () and single == expected[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_threads_share_one_answer(dtype, rounding, monkeypatch):
    monkeypatch.setattr(cpu, "THREADED_FROM", 1000)
    x = torch.randn(10_007).to(dtype)
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            own = x.clone()
            quantize(own, "E5M2", rounding=rounding, seed=8, out=own)
            index = code_index(x, "E5M2", 0.3)
            found.append((own.float(), index.float(), index_to_value(index, "E5M2"), hash_uniform((5001,), 4)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


CALLERS_AND_CHILD = """
import os, threading, torch
from altgrad.quantization import quantize
from altgrad.quantization.kernels import cpu
cpu.THREADED_FROM = 1000
torch.set_num_threads(2)
x = torch.randn(5000)
expected, found = quantize(x, "E4M3").numpy().tobytes(), []
callers = [threading.Thread(target=lambda: found.append(quantize(x, "E4M3"))) for _ in range(4)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
assert len(found) == 4 and all(one.numpy().tobytes() == expected for one in found)
child = os.fork()
if child == 0:
    os._exit(0 if quantize(x, "E4M3").numpy().tobytes() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_several_callers_at_once_and_a_forked_child_do_not_wait_for_ever():
    subprocess.run([sys.executable, "-W", "ignore", "-c", CALLERS_AND_CHILD], check=True, timeout=60)


@pytest.mark.parametrize("kernel", ["reference", "numba"])
@pytest.mark.parametrize("name", ALL)
def test_toward_zero_never_grows_and_skips_no_value(name, kernel, monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", kernel)
    fmt = get_format(name)
    x = hard_inputs(fmt)
    x = x[x.isfinite()]
    toward = quantize(x, fmt, rounding="toward_zero")
    up = toward.abs() + ulp(toward, fmt)
    has_sign = (toward != 0) | has_two_zeros(fmt)
    assert (toward.abs() <= x.abs()).all() and torch.equal(torch.signbit(toward), torch.signbit(x) & has_sign)
    assert ((x.abs() < up) | (toward.abs() == fmt.max)).all()
    if fmt.has_inf:
        far = torch.tensor([math.inf, 3.4e38, -math.inf])
        kept = quantize(far, fmt, rounding="toward_zero", overflow="inf")
        assert kept.tolist() == [math.inf, fmt.max, -math.inf]


BAD = [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-60]


@pytest.mark.parametrize("scale", BAD)
@pytest.mark.parametrize("call", [quantize, encode, code_index, ulp])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scale_that_is_no_positive_number_is_refused_everywhere(call, scale, as_tensor):
    given = torch.tensor(scale, dtype=torch.float64) if as_tensor else scale
    with pytest.raises(ValueError, match=r"scale must be a positive number within float32's range; got"):
        call(torch.randn(4), "E4M3", given)


@pytest.mark.parametrize("scale", BAD)
@pytest.mark.parametrize("call", [decode, index_to_value])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_such_a_scale_is_refused_on_the_way_back_too(call, scale, as_tensor):
    given = torch.tensor(scale, dtype=torch.float64) if as_tensor else scale
    with pytest.raises(ValueError, match=r"scale must be a positive number within float32's range; got"):
        call(torch.tensor([3], dtype=torch.uint8), "E4M3", given)


@pytest.mark.parametrize("call", [quantize, encode, code_index, ulp])
def test_bad_places_of_a_scale_are_counted(call):
    with pytest.raises(ValueError, match=r"got -1\.0 in 2 of 3 places"):
        call(torch.randn(2, 3), "E4M3", torch.tensor([1.0, -1.0, 0.0]))
    with pytest.raises(ValueError, match=r"got nan in 1 of 2 places"):
        call(torch.randn(3, 2), "E4M3", torch.tensor([math.nan, 1.0]))


def test_a_nan_among_the_scales_that_blocks_found_makes_nan():
    x = torch.ones(2, 3)
    options = {"rounding": "nearest", "seed": None, "ste": "identity"}
    result = quantize_blocks(x, get_format("E4M3"), torch.tensor([[math.nan], [1.0]]), **options)
    assert result[0].isnan().all() and torch.equal(result[1], x[1])


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1, 1)])
def test_a_scale_of_one_element_adds_no_axes(shape):
    x, scale = torch.randn(3, 4), torch.full(shape, 0.3)
    codes, index = encode(x, "E4M3", scale), code_index(x, "E4M3", scale)
    pairs = [
        (quantize(x, "E4M3", scale), quantize(x, "E4M3", 0.3)),
        (ulp(x, "E4M3", scale), ulp(x, "E4M3", 0.3)),
        (codes, encode(x, "E4M3", 0.3)),
        (decode(codes, "E4M3", scale), decode(codes, "E4M3", 0.3)),
        (index_to_value(index, "E4M3", scale), index_to_value(index, "E4M3", 0.3)),
    ]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("call", [quantize, encode, code_index, ulp])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.arange(3), ValueError, "floating-point tensor, got torch.int64"),
        (torch.zeros(3, dtype=torch.complex64), ValueError, "floating-point tensor, got torch.complex64"),
        ([1.0, 2.0], TypeError, "expected a tensor, got list"),
    ],
)
def test_what_is_no_real_tensor_is_refused_everywhere(call, x, error, message):
    with pytest.raises(error, match=message):
        call(x, "E4M3")


@pytest.mark.parametrize("call", [quantize, encode, code_index, ulp])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("E4M4Q", "unknown format"),
        ("E9M6", "at most 8"),
        ("E1M1", "4 to 16 bits"),
        ("E8M8", "4 to 16 bits"),
        ("E4M3/fnus", "unknown variant 'fnus'.*nearest: fnuz"),
        ("E0M7/ieee", "use E0M7/finite"),
    ],
)
def test_unknown_and_impossible_formats_are_refused_everywhere(call, name, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4), name)


@pytest.mark.parametrize("call", [quantize, encode, code_index, ulp])
def test_what_is_neither_format_nor_number_is_refused_everywhere(call):
    with pytest.raises(TypeError, match="a format is a FloatFormat or its name, got 7"):
        call(torch.randn(4), 7)
    for scale in (None, "1"):
        with pytest.raises(TypeError, match=f"scale must be a number or a tensor, got {scale!r}"):
            call(torch.randn(4), "E4M3", scale)
    with pytest.raises(TypeError, match=r"E4\.0M3: bits are counted in whole numbers"):
        FloatFormat(4.0, 3, "fn")


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_out_that_overlaps_the_input_still_gets_the_result(dtype, shift):
    buffer = torch.randn(5001).to(dtype)
    x, out = (buffer[:-1], buffer[1:]) if shift > 0 else (buffer[1:], buffer[:-1])
    expected = quantize(x.clone(), "E4M3", 0.3)
    assert torch.equal(quantize(x, "E4M3", 0.3, out=out), expected)


def test_codes_and_indices_of_a_wrong_type_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float32"):
        decode(torch.randn(3), "E4M3")
    with pytest.raises(ValueError, match=r"torch\.float32"):
        index_to_value(torch.randn(3), "E4M3")
    with pytest.raises(ValueError, match="2 NaN to encode, and E0M7 has no code for NaN"):
        encode(torch.tensor([math.nan, 1.0, math.nan]), "E0M7")
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        quantize(torch.randn(3), "E4M3", rounding="stochastic", seed=1.5)
