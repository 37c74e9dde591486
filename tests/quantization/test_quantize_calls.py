import math
import subprocess
import sys

import pytest
import torch

from altgrad.quantization import decode, encode, quantize, ulp
from altgrad.quantization.ops import code_index, hash_uniform, kernel_in_use


def test_identity_gradient_passes_everywhere_and_clipped_stops_where_saturated():
    x = torch.tensor([0.3, -1000.0, 448.0, 449.0, math.inf], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (quantize(x, "E4M3") * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    x.grad = None
    result = quantize(x, "E4M3", ste="clipped")
    (result * weights)[:4].sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 3.0, 0.0, 0.0]
    x.grad = None
    quantize(x, "E4M3", 2.0, ste="clipped")[:4].sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_shape_are_kept(dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    result = quantize(x, "E5M2", 0.5)
    assert result.dtype == dtype and result.shape == x.shape
    assert torch.equal(result, quantize(x.float(), "E5M2", 0.5).to(dtype))


@pytest.mark.parametrize("scale_shape", [(), (1,), (6, 1), (1, 8), (6, 8)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_broadcast_scale_is_each_element_under_its_own(scale_shape, rounding):
    x, scale = torch.randn(6, 8), torch.rand(scale_shape) + 0.1
    result = quantize(x, "E3M4", scale, rounding=rounding, seed=4)
    draws = quantize(x / scale, "E3M4", rounding=rounding, seed=4) * scale
    assert torch.equal(result, draws)
    assert torch.equal(code_index(x, "E3M4", scale), code_index(x / scale, "E3M4"))
    assert torch.equal(ulp(x, "E3M4", scale), ulp(x / scale, "E3M4") * scale)
    assert torch.equal(decode(encode(x, "E3M4", scale), "E3M4", scale), quantize(x, "E3M4", scale))


def test_layout_does_not_matter():
    x = torch.randn(64, 48)
    for rounding in ("nearest", "stochastic"):
        strided = x.t().contiguous().t()
        assert kernel_in_use(strided) == "reference" and kernel_in_use(x) == "numba"
        assert torch.equal(
            quantize(strided, "E4M3", rounding=rounding, seed=1), quantize(x, "E4M3", rounding=rounding, seed=1)
        )
    assert torch.equal(quantize(x[:, ::3], "E4M3"), quantize(x, "E4M3")[:, ::3])


def test_out_receives_the_result_and_may_be_the_input():
    x = torch.randn(100)
    expected = quantize(x, "E4M3", 0.1)
    buffer = torch.empty(100)
    assert quantize(x, "E4M3", 0.1, out=buffer) is buffer and torch.equal(buffer, expected)
    strided = torch.empty(200)[::2]
    assert torch.equal(quantize(x, "E4M3", 0.1, out=strided), expected)
    quantize(x, "E4M3", torch.rand(100), out=buffer)
    assert torch.equal(quantize(x, "E4M3", 0.1, out=x), expected) and torch.equal(x, expected)


def test_empty_and_scalar_tensors():
    assert quantize(torch.empty(0, 3), "E4M3").shape == (0, 3) and code_index(torch.empty(0), "E4M3").numel() == 0
    assert quantize(torch.tensor(0.3), "E2M1").item() == 0.5 and encode(torch.tensor(1.0), "E4M3").item() == 0x38


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fmt": "E4M2Q"}, "nearest"),
        ({"rounding": "stochastics", "seed": 1}, "stochastic"),
        ({"scale": 0.0}, "positive"),
        ({"scale": -1.0}, "positive"),
        ({"scale": math.nan}, "positive"),
        ({"scale": 1e-60}, "positive"),
        ({"rounding": "stochastic"}, "seed"),
        ({"overflow": "inf"}, "E4M3 has none"),
        ({"overflow": "wrap"}, "saturate"),
        ({"ste": "clip"}, "clipped"),
        ({"out": torch.empty(3)}, "out must be"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.randn(4), **({"fmt": "E4M3"} | arguments))


def test_integers_and_gradients_into_out_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        quantize(torch.arange(3), "E4M3")
    with pytest.raises(ValueError, match="no gradient"):
        quantize(torch.randn(3, requires_grad=True), "E4M3", out=torch.empty(3))


def test_the_kernel_can_be_forced(monkeypatch):
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    assert kernel_in_use(torch.randn(3)) == "reference"
    monkeypatch.setenv("ALTGRAD_KERNEL", "nunba")
    with pytest.raises(ValueError, match="numba"):
        kernel_in_use(torch.randn(3))


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else found(name, *rest)
import torch
import altgrad.quantization as q
from altgrad.quantization.ops import kernel_in_use
x = torch.randn(8)
assert kernel_in_use(x) == "reference" and q.quantize(x, "E4M3").shape == x.shape
import os
os.environ["ALTGRAD_KERNEL"] = "numba"
try:
    q.quantize(x, "E4M3")
except ModuleNotFoundError as error:
    assert "pip install numba" in str(error)
else:
    raise SystemExit("a forced kernel was silently replaced")
"""


def test_works_without_numba_and_says_so_where_it_is_forced():
    subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], check=True, timeout=120)


READ_ONLY = """
import os, tempfile
from pathlib import Path
Path.mkdir = lambda self, *a, **k: (_ for _ in ()).throw(PermissionError("read-only"))
import torch, altgrad.quantization as q
from altgrad.quantization.kernels import compiled
assert compiled.FOLDER is None
assert torch.equal(q.quantize(torch.tensor([0.3]), "E2M1"), torch.tensor([0.5]))
"""


def test_kernels_compile_where_nothing_can_be_written():
    subprocess.run([sys.executable, "-c", READ_ONLY], check=True, timeout=120)


def test_one_seed_is_one_stream_for_both_kernels(monkeypatch):
    drawn = hash_uniform((1000,), 9)
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    assert torch.equal(drawn, hash_uniform((10, 100), 9).view(-1))
    x = torch.full((1000,), 0.3)
    up = quantize(x, "E2M1", rounding="stochastic", seed=9) > 0.3
    assert torch.equal(up, drawn >= 1 - 0.6)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
@pytest.mark.parametrize("options", [{"ste": "clipped"}, {"rounding": "stochastic", "seed": 3}])
def test_compiles_into_one_graph_with_the_same_bits(options):
    x = torch.randn(1000, requires_grad=True)

    def rounded(x):
        return quantize(x, "E4M3", 0.003, **options)

    eager = rounded(x)
    compiled = torch.compile(rounded, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.autograd.grad(compiled.sum(), x)[0], torch.autograd.grad(eager.sum(), x)[0])


@pytest.mark.parametrize("shape", [(4000, 1), (2, 1000), (999,), (1000, 1, 1)])
@pytest.mark.parametrize("call", [quantize, encode, code_index, ulp])
def test_a_scale_that_would_enlarge_the_tensor_is_refused(call, shape):
    with pytest.raises(ValueError, match="does not broadcast"):
        call(torch.randn(1000), "E5M2", torch.full(shape, 0.5))
    assert quantize(torch.randn(3, 1000), "E5M2", torch.full((1000,), 0.5)).shape == (3, 1000)
