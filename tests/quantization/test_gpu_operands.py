"""Whole operands by the Triton kernels equal the steps taken one by one, bit for bit, and take few launches.

Under the interpreter, where the CPU stands in for the card: its tensors go to the kernels, and operands are carried
as bfloat16 grid values.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="triton is not installed (extra 'gpu')")

from altgrad.quantization import LayerRule, PrecisionPolicy, Role, ScaleRule, quantize_model  # noqa: E402
from altgrad.quantization.kernels import dispatch, gpu, gpu_lines  # noqa: E402
from altgrad.quantization.roles import RoleQuantizer  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
RULES = {
    "current": ScaleRule(headroom=1.5, power_of_two=True),
    "per channel": ScaleRule(kind="per_channel"),
    "per channel, power of two": ScaleRule(kind="per_channel", margin=1, power_of_two=True),
    "delayed": ScaleRule(kind="delayed", history=3),
    "delayed, shared": ScaleRule(kind="delayed", history=2, shared=True),
    "MX": ScaleRule(kind="block"),
    "MX of 5": ScaleRule(kind="block", block_size=5),
    "NVFP4-like": ScaleRule(kind="block", block_scale_format="E4M3"),
}
FORMATS = ("E4M3", "E0M7", "E7M0", "E7M0/p3109")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def carried_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altgrad.quantization.products.BF16_DEVICES", {DEVICE})
    monkeypatch.setattr("altgrad.quantization.layer_products.BF16_DEVICES", {DEVICE})


def stand_in_for_a_card(patch: pytest.MonkeyPatch) -> None:
    """The CPU's tensors take the Triton kernels, as those of a card do."""
    if not ON_GPU:
        patch.setattr(dispatch, "triton_for", lambda x, scale: gpu if x.is_contiguous() and x.numel() else None)


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(5, 7, 43, generator=draw)
    odd = x.clone()
    odd.view(-1)[::7] = torch.tensor([0.0, -0.0, 1e-40, -1e-45, 3.3e38, -(2.0**-126)]).repeat(36)[:215]
    return {
        "usual": x,
        "long rows": torch.randn(3, 2500, generator=draw),
        "odd": odd,
        "huge": x * 1e37,
        "tiny": x * 1e-42,
        "infinite": torch.where(x > 2, torch.inf, torch.where(x < -2.5, -torch.inf, x)),
        "NaN": torch.where(x > 2.5, torch.nan, x),
        "zeros": torch.zeros(3, 32),
        "one": torch.tensor([[-3.25]]),
        "bfloat16": x.to(torch.bfloat16),
    }


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; a NaN is a NaN."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(torch.int32)[~nan], b.view(torch.int32)[~nan])


def operands(rule: str, rounding: str) -> dict[tuple[object, ...], Tensor]:
    """Operands, scales and states of some steps, by format and tensor."""
    found = {}
    has_state = RULES[rule].kind == "delayed"
    for fmt in FORMATS if rounding == "nearest" else FORMATS[:1]:
        for name, x in tensors().items():
            quantizer = RoleQuantizer(Role(format=fmt, scale=RULES[rule], rounding=rounding), key=1 << 63 | 77)
            for step in range(3 if has_state else 1 + (rounding == "stochastic")):
                for advance in (False, True) if has_state else (True,):
                    operand = quantizer.operand(x.to(DEVICE) * (1 + step), advance=advance)
                    found[fmt, name, step, advance] = operand.numbers.cpu()
                    if operand.is_per_tensor:
                        found[fmt, name, step, advance, "scale"] = operand.scale.float().reshape(1).cpu()
                quantizer.end_step()
                for key, state in quantizer.state_dict().items():
                    found[fmt, name, step, key] = state.float().cpu()
    return found


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
@pytest.mark.parametrize("rule", RULES)
def test_an_operand_is_that_of_single_steps(rule: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RoleQuantizer, "_at_once", lambda *_: None)
        single = operands(rule, rounding)
    stand_in_for_a_card(monkeypatch)
    whole = operands(rule, rounding)
    for key in single.keys() & whole.keys():
        assert same(single[key], whole[key]), key
    # Of blocks the single steps know a scale for each element.
    assert single.keys() == whole.keys() or RULES[rule].kind == "block"


class _Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: object, launches: Counter[str], name: str) -> None:
        self.kernel, self.launches, self.name = kernel, launches, name

    def __getitem__(self, programs: object) -> object:
        self.launches[self.name] += 1
        return self.kernel[programs]  # type: ignore[index]


KERNELS = {
    gpu: ("largest_parts_of", "round_elements", "scale_and_add", "transpose"),
    gpu_lines: ("_largest_block", "_round_lines"),
}


@pytest.mark.parametrize(
    ("rule", "launches"), [("current", 9), ("delayed", 9), ("per channel", 4), ("MX", 4), ("NVFP4-like", 7)]
)
def test_launches_of_a_layer(rule: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three operands, a rounding each, and a look at the amax where the tensor has a scale; products finished once."""
    stand_in_for_a_card(monkeypatch)
    role = Role(format="E4M3", scale=RULES[rule])
    everywhere = LayerRule(pattern="", weight=role, activation=role, gradient=role)
    model = torch.nn.Sequential(torch.nn.Linear(24, 8)).to(DEVICE)
    quantize_model(model, policy=PrecisionPolicy(rules=(everywhere,)), product="emulated")
    x = torch.randn(6, 24, device=DEVICE, requires_grad=True)
    counted: Counter[str] = Counter()
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, _Counted(getattr(module, name), counted, name))
    y = model(x)
    y.backward(torch.randn_like(y))
    assert counted.total() == launches, counted
