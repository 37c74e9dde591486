"""One kernel makes of a tensor, bit for bit, what torch's operators make of it: every rule, rounding and shape."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor

from altgrad.quantization.formats import get_format
from altgrad.quantization.layers import QuantizedLinear
from altgrad.quantization.roles import Role, RoleQuantizer
from altgrad.quantization.scaling import ScaleRule

FORMATS = ("E0M7", "E1M6", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "E2M1", "E7M0/p3109", "INT8", "FP16", "BF16")
RULES = {
    "current": ScaleRule(),
    "head-room, power of two": ScaleRule(headroom=1.5, margin=2, power_of_two=True),
    "per channel": ScaleRule(kind="per_channel"),
    "delayed": ScaleRule(kind="delayed", history=3),
    "delayed, shared, power of two": ScaleRule(kind="delayed", history=2, shared=True, power_of_two=True),
    "MX": ScaleRule(kind="block"),
    "MX of 5": ScaleRule(kind="block", block_size=5),
    "NVFP4": ScaleRule(kind="block", block_scale_format="E4M3"),
}


def tensors() -> dict[str, Tensor]:
    """Shapes and contents that a rule may meet."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 11, 37, generator=draw)
    large = torch.randn(300, 500, generator=draw)  # pieces of a kernel, and a second thread's
    odd = x.clone().view(-1)
    odd[::7] = torch.tensor([0.0, -0.0, 1e-40, -1e-45, 3.3e38, -(2.0**-126)]).repeat(59)[: odd[::7].numel()]
    return {
        "usual": x,
        "large": large,
        "tiny": x * 1e-42,
        "huge": x * 1e37,
        "odd": odd.view(6, 11, 37),
        "infinite": torch.where(x > 2, math.inf, torch.where(x < -2.5, -math.inf, x)),
        "NaN": torch.where(x > 2.5, math.nan, x),
        "zeros": torch.zeros(3, 32),
        "one row": torch.randn(70, generator=draw),
        "one": torch.tensor([[-3.25]]),
        "end of float32": x.sign() * torch.finfo(torch.float32).max,
        "bfloat16": x.to(torch.bfloat16),
        "float16": x.to(torch.float16),
    }


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; a NaN is a NaN."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(torch.int32)[~nan], b.view(torch.int32)[~nan])


def pair(fmt: str, rule: ScaleRule, rounding: str) -> tuple[RoleQuantizer, RoleQuantizer]:
    role = Role(format=fmt, scale=rule, rounding=rounding)
    return RoleQuantizer(role, key=1 << 63 | 12345), RoleQuantizer(role, key=1 << 63 | 12345)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
@pytest.mark.parametrize("rule", RULES)
def test_values_are_those_of_the_operand(threads: None, rule: str, rounding: str) -> None:
    left = 0
    for fmt in FORMATS:
        if RULES[rule].kind == "block" and get_format(fmt).total_bits > 8:
            continue
        for name, x in tensors().items():
            one, other = pair(fmt, RULES[rule], rounding)
            for step in range(3):
                y = x * (1 + step) if x.is_floating_point() else x
                for advance in (False, True):
                    values, operand = one.values(y, advance=advance), other.operand(y, advance=advance)
                    if values is None:
                        left += 1
                        values = one.operand(y, advance=advance).numbers
                    assert same(values, operand.numbers), (fmt, name, step, advance)
                one.end_step()
                other.end_step()
                assert all(
                    torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
                    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
                ), (fmt, name)
    # What kernels leave to torch: scales beyond float32, NaN in a block, history of formats that have scale 1.
    assert left < 250


def outcomes(layer: QuantizedLinear, x: Tensor) -> list[Tensor]:
    """Output and gradients under upstream gradients in several layouts."""
    found, draw = [], torch.Generator().manual_seed(2)
    for axes in (None, *itertools.permutations(range(x.dim()))):
        x = x.detach().requires_grad_()
        y = layer(x)
        moved = y if axes is None else y.permute(axes)
        factors = torch.ones(()) if axes is None else torch.randn(moved.shape, generator=draw).to(y.dtype)
        gradients = torch.autograd.grad((moved * factors).sum(), (x, *layer.parameters()))
        found += [y.detach(), *gradients]
    return found


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (16, 3, 64), (2, 0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["E4M3", "BF16", None])
def test_a_layers_products_are_those_of_single_operands(
    shape: tuple[int, ...], dtype: torch.dtype, fmt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, for every number of axes, and for inputs and gradients that are not contiguous."""
    found = []
    for is_fused in (True, False):
        if not is_fused:
            monkeypatch.setattr("altgrad.quantization.layers.values_of", lambda *_, **__: None)
        torch.manual_seed(0)
        layer = QuantizedLinear(torch.nn.Linear(64, 1000, dtype=dtype), weight="BF16", activation=fmt, gradient=fmt)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append(outcomes(layer, x))
        if x.dim() == 3:
            found[-1] += outcomes(layer, x.transpose(0, 1).contiguous().transpose(0, 1))
    assert len(found[0]) == len(found[1])
    assert all(same(a.float(), b.float()) for a, b in zip(*found, strict=True))


def test_a_bias_that_does_not_fit_is_torchs_to_refuse() -> None:
    layer = QuantizedLinear(torch.nn.Linear(8, 7), weight="E4M3")
    layer.bias = torch.nn.Parameter(torch.tensor([100.0]))
    assert (layer(torch.zeros(3, 8)) == 100).all()
    layer.bias = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="size of tensor"):
        layer(torch.zeros(3, 8))


def test_a_copy_rounds_as_its_original_does() -> None:
    role = Role(format="E4M3", scale=ScaleRule(kind="delayed", history=2), rounding="stochastic")
    quantizer, x = RoleQuantizer(role, key=5), torch.randn(4, 8)
    quantizer.values(x, advance=True)
    quantizer.end_step()
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert same(other.values(2 * x, advance=False), quantizer.values(2 * x, advance=False))
