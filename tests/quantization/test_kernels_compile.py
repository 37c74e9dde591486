"""The torch.library ops: their registration, and graphs that hold them."""

import pytest
import torch
from torch.library import opcheck

from altgrad.quantization import decode, encode, get_format, mix_seed, quantize, ulp
from altgrad.quantization.ops import code_index, index_to_value

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
def test_quantize_passes_opcheck(rounding):
    x, scale = torch.randn(7, 9), torch.tensor(0.3)
    for given in (x, x.bfloat16(), x.t(), x[:0], x.clone().requires_grad_()):
        opcheck(torch.ops.altgrad.quantize.default, (given, scale, "E4M3", rounding, "saturate", 5))
    opcheck(torch.ops.altgrad.quantize.default, (x, torch.rand(7, 1) + 0.1, "E5M2", rounding, "inf", 5))


def test_the_other_ops_pass_opcheck():
    x, scale = torch.randn(7, 9), torch.tensor(0.3)
    for given in (x, x.bfloat16(), x.t()):
        opcheck(torch.ops.altgrad.code_index.default, (given, scale, "E4M3"))
        opcheck(torch.ops.altgrad.ulp.default, (given, scale, "E4M3"))
    opcheck(torch.ops.altgrad.index_to_value.default, (code_index(x, "E4M3"), scale, "E4M3"))


def everything(x, scale, seed):
    drawn = quantize(x * 1.5, "E4M3", 0.003, rounding="stochastic", seed=seed)
    clipped = quantize(drawn, "E5M2", scale, ste="clipped")
    index = code_index(clipped, "E5M2", scale)
    return clipped, index, ulp(clipped, "E3M4", scale), index_to_value(index, "E5M2", scale)


@pytest.mark.parametrize("name", ["E4M3", "E0M7", "E2M3", "BF16", "E4M7", "E4M3b11/fnuz", "INT8"])
def test_codes_in_one_graph(name):
    torch._dynamo.reset()
    dtype = torch.uint8 if get_format(name).total_bits <= 8 else torch.int16

    def there_and_back(x, scale):
        codes = encode(x, name, scale)
        return codes, decode(codes, name, scale)

    graph = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 9)
    opcheck(torch.ops.altgrad.encode.default, (x, torch.tensor(0.3), name, "saturate"))
    opcheck(torch.ops.altgrad.decode.default, (encode(x, name), torch.rand(7, 1) + 0.1, name))
    strided = x.t().contiguous().t()
    for given, scale in ((x, 0.3), (strided, torch.tensor(0.3)), (x.bfloat16(), torch.rand(7, 1) + 0.1)):
        found, eager = graph(given, scale), there_and_back(given, scale)
        assert found[0].dtype == dtype and all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


def test_a_graph_refuses_what_codes_refuse():
    graph = torch.compile(lambda x: encode(x, "E0M7"), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="1 NaN to encode, and E0M7 has no code for NaN"):
        graph(torch.tensor([1.0, float("nan")]))
    back = torch.compile(lambda codes: decode(codes, "E2M3"), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="0 to 63; got 64"):
        back(torch.tensor([64], dtype=torch.uint8))


def test_saturation_in_a_graph_stops_where_the_dtype_ends():
    def clipped(x, scale):
        return quantize(x, "E6M1", scale, ste="clipped")

    graph = torch.compile(clipped, fullgraph=True, backend="aot_eager")
    x = torch.tensor([65504.0, 49152.0, -1.3], dtype=torch.float16, requires_grad=True)
    for scale in (1.0, torch.ones(3)):
        ours, eager = graph(x, scale), clipped(x, scale)
        assert torch.equal(ours, eager) and ours[0] == 49152
        assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(eager.sum(), x)[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 0.7), (torch.float32, torch.tensor(0.3)), (torch.bfloat16, torch.full((29,), 0.2))],
)
def test_one_graph_equals_eager_and_new_seeds_compile_nothing(backend, dtype, scale):
    if backend == "inductor" and not _has_compiler():
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    x = torch.randn(37, 29).to(dtype).requires_grad_()
    for seed in (1, 2, 2**63 + 5, -7, mix_seed(3, 4), mix_seed(9), 12, 2**64 - 1):
        ours, eager = compiled(x, scale, seed), everything(x, scale, seed)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True)), seed
        gradients = [torch.autograd.grad(out[0].float().square().sum(), x)[0] for out in (ours, eager)]
        assert torch.equal(*gradients)
    assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(everything.__code__)) <= 3


def test_the_op_differentiates_straight_through_by_itself():
    x = torch.randn(5, requires_grad=True)
    rounded = torch.ops.altgrad.quantize(x, torch.tensor(1.0), "E4M3", "nearest", "saturate", None)
    (rounded * torch.arange(5.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(5.0))


def test_a_graph_follows_the_kernel_asked_for(monkeypatch):
    x = torch.randn(100)
    graph = torch.compile(lambda x: quantize(x, "E4M3", 0.5), fullgraph=True, backend="aot_eager")
    monkeypatch.setenv("ALTGRAD_KERNEL", "reference")
    assert torch.equal(graph(x), quantize(x, "E4M3", 0.5))
    monkeypatch.setenv("ALTGRAD_KERNEL", "nunba")
    with pytest.raises(ValueError, match="numba"):
        graph(x)


def _has_compiler():
    import shutil

    return any(shutil.which(name) for name in ("g++", "clang++"))
