"""Every arm means what it says: AdamW is torch's, the step follows the spacing, rungs are whole, resume is exact."""

import copy

import pytest
import torch
from torch import nn

from altgrad.quantization import get_format, quantize, ulp
from altgrad.quantization.ops import code_index
from altgrad.training import GridOptim, ManifoldAdamW, RoundedAdamW

EIGHT_BIT = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
RESIDENT = {
    "adamw_nearest": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, rounding="nearest"),
    "adamw_sr": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, rounding="stochastic"),
    "manifold_sr": lambda p, f: ManifoldAdamW(p, lr=3e-3, format=f, rounding="stochastic"),
    "grid": lambda p, f: GridOptim(p, lr=3e-3, format=f),
    "grid_carry": lambda p, f: GridOptim(p, lr=3e-3, format=f, carry=True),
    "grid_literal": lambda p, f: GridOptim(p, lr=6.0, format=f, normalize="none", step_unit="rungs"),
}
MASTER = {
    "adamw": lambda p, f: RoundedAdamW(p, lr=3e-3, format=f, weight_decay=0.1),
    "manifold": lambda p, f: ManifoldAdamW(p, lr=3e-3, format=f),
    "manifold_gradient": lambda p, f: ManifoldAdamW(p, lr=3e-3, format=f, precondition="gradient"),
}


def parameter(seed: int = 0, shape=(48, 32), std: float = 0.02, dtype=torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((torch.randn(shape, generator=generator) * std).to(dtype))


def gradients(count: int, shape=(48, 32), seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.01 for _ in range(count)]


def train(optimizer, weight: nn.Parameter, grads) -> None:
    for grad in grads:
        weight.grad = grad.to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: RoundedAdamW([p], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, format="E5M2"),
        lambda p: ManifoldAdamW([p], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, manifold_aware=False),
        lambda p: RoundedAdamW([p], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, format=None),
    ],
)
def test_master_adamw_is_torch_adamw_to_float32_rounding(make):
    ours, theirs = parameter(), parameter()
    train(make(ours), ours, gradients(100))
    train(torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1), theirs, gradients(100))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-7)


def test_the_update_mode_steps_in_proportion_to_the_spacing_over_twelve_binades():
    exponents = torch.arange(-12.0, 0).repeat_interleave(64)
    weight = nn.Parameter(torch.exp2(exponents) * 1.3)
    before = weight.detach().clone()
    spacing = ulp(before, "E5M2", 1.0)
    optimizer = ManifoldAdamW([weight], lr=1e-3, format="E5M2", tensor_scale=1.0)
    train(optimizer, weight, [torch.full_like(before, 0.01)])
    x, y = spacing.log2(), (weight.detach() - before).abs().log2()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert slope >= 0.99


@pytest.mark.parametrize("name", ["E3M4", "E5M2", "E7M0", "BF16"])
@pytest.mark.parametrize("kind", ["manifold", "grid"])
def test_one_learning_rate_is_one_mean_step(kind, name):
    shape = (512, 512)  # rungs are drawn: the mean over fewer weights would be noise
    reference, weight = parameter(shape=shape), parameter(shape=shape)
    grads = gradients(5, shape)
    optimizer = (
        ManifoldAdamW([weight], lr=1e-4, format=name)
        if kind == "manifold"
        else GridOptim([weight], lr=1e-4, format=name, rung_clip=1e9, beta2=0.999)
    )
    adamw = torch.optim.AdamW([reference], lr=1e-4, weight_decay=0.0)
    ours, theirs = 0.0, 0.0
    for grad in grads:
        before = weight.detach().clone(), reference.detach().clone()
        train(optimizer, weight, [grad])
        train(adamw, reference, [grad])
        ours += (weight.detach() - before[0]).abs().mean().item()
        theirs += (reference.detach() - before[1]).abs().mean().item()
    assert ours == pytest.approx(theirs, rel=0.1)


def test_the_gradient_mode_is_the_literal_formula():
    weight = parameter()
    start = weight.detach().clone()
    grads = gradients(4)
    train(ManifoldAdamW([weight], lr=3e-3, format="E5M2", precondition="gradient"), weight, grads)
    w, m, v = start.double(), 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        g = grad.double() * torch.exp2(torch.floor(torch.log2(w.abs())) - 2)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 3e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("arm", RESIDENT)
def test_resident_weights_stay_on_their_grid(arm, name):
    weight = parameter()
    optimizer = RESIDENT[arm]([weight], name)
    train(optimizer, weight, gradients(12))
    assert torch.equal(weight.detach(), quantize(weight.detach(), name, weight.grid.scale))
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("arm", RESIDENT)
def test_e0m7_and_e1m6_are_one_format_up_to_scale(arm):
    one, other = parameter(), parameter()
    train(RESIDENT[arm]([one], "E0M7"), one, gradients(30))
    train(RESIDENT[arm]([other], "E1M6"), other, gradients(30))
    assert torch.equal(one, other)


@pytest.mark.parametrize("arm", ["grid", "grid_carry", "adamw_sr"])
def test_a_zero_gradient_from_rest_moves_nothing(arm):
    weight = parameter()
    optimizer = RESIDENT[arm]([weight], "E4M3")
    before = weight.detach().clone()
    train(optimizer, weight, [torch.zeros_like(before)] * 3)
    assert torch.equal(weight.detach(), before)


def test_no_weight_moves_by_more_than_rung_clip():
    weight = parameter()
    optimizer = GridOptim([weight], lr=1.0, format="E3M4", rung_clip=3)
    before = code_index(weight.detach(), "E3M4", weight.grid.scale)
    train(optimizer, weight, gradients(1))
    moved = (code_index(weight.detach(), "E3M4", weight.grid.scale) - before).abs()
    assert moved.max() == 3


def test_grid_steps_are_unbiased():
    weight = nn.Parameter(torch.full((200_000,), 0.5))
    optimizer = GridOptim([weight], lr=0.25, format="E3M4", normalize="none", step_unit="rungs", tensor_scale=1.0)
    train(optimizer, weight, [torch.ones(200_000)])
    rungs = code_index(torch.full((1,), 0.5), "E3M4", 1.0) - code_index(weight.detach(), "E3M4", 1.0)
    assert set(rungs.tolist()) == {0, 1}
    assert rungs.float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 200_000) ** 0.5)


def test_carry_keeps_what_was_not_taken():
    weight = nn.Parameter(torch.full((1000,), 0.5))
    optimizer = GridOptim(
        [weight],
        lr=0.25,
        format="E3M4",
        momentum=0.0,
        normalize="none",
        step_unit="rungs",
        carry=True,
        tensor_scale=1.0,
    )
    start = code_index(weight.detach(), "E3M4", 1.0)
    train(optimizer, weight, [torch.ones(1000)] * 6)
    exact = code_index(weight.detach(), "E3M4", 1.0) + optimizer.state[weight]["carry"]
    torch.testing.assert_close(exact, start.float() - 1.5)


def test_grid_step_returns_flips_and_updates_as_numbers():
    weight = parameter()
    optimizer = GridOptim([weight], lr=3e-3, format="E4M3")
    before = code_index(weight.detach(), "E4M3", weight.grid.scale)
    weight.grad = gradients(1)[0]
    grad = weight.grad.clone()
    flips, updates = optimizer.step()
    after = code_index(weight.detach(), "E4M3", weight.grid.scale)
    assert isinstance(flips, int) and flips == int((before != after).sum()) > 0
    assert updates == weight.numel()
    assert torch.equal(weight.grad, grad)


@pytest.mark.parametrize("arm", MASTER)
def test_flips_of_a_master_arm_are_code_changes_under_one_scale(arm):
    weight = parameter()
    optimizer = MASTER[arm]([weight], "E3M4")
    optimizer.count_every = 1
    train(optimizer, weight, gradients(3))
    before = weight.detach().clone()
    scale = before.abs().max() / get_format("E3M4").max
    train(optimizer, weight, gradients(1, seed=9))
    counts = optimizer.counts[weight]
    assert int(counts.flips) == int(
        (code_index(before, "E3M4", scale) != code_index(weight.detach(), "E3M4", scale)).sum()
    )
    assert 0 < float(counts.expected) <= int(counts.applied)


def test_nearest_rounding_swallows_small_steps_and_stochastic_does_not():
    yields = {}
    shape = (256, 256)
    for rounding in ("nearest", "stochastic"):
        weight = parameter(shape=shape)
        optimizer = RoundedAdamW([weight], lr=2e-5, format="E3M4", rounding=rounding)
        flips = expected = 0.0
        for grad in gradients(20, shape):
            train(optimizer, weight, [grad])
            flips += float(optimizer.counts[weight].flips)
            expected += float(optimizer.counts[weight].expected)
        yields[rounding] = flips / expected
    assert yields["nearest"] < 0.2
    assert yields["stochastic"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arm", [*RESIDENT, *MASTER])
def test_resume_is_exact(arm, dtype):
    make = (RESIDENT | MASTER)[arm]
    name = "E4M3"
    straight = parameter(dtype=dtype)
    optimizer = make([straight], name)
    train(optimizer, straight, gradients(6))
    saved, weights = copy.deepcopy(optimizer.state_dict()), straight.detach().clone()
    train(optimizer, straight, gradients(6, seed=5))
    resumed = parameter(seed=77, dtype=dtype)
    other = make([resumed], name)
    with torch.no_grad():
        resumed.copy_(weights)
    other.load_state_dict(saved)
    for key, value in other.state[resumed].items():
        if isinstance(value, torch.Tensor):
            special = {"overflow_streak": torch.int64, "mean_spacing": torch.float64}
            assert value.dtype == special.get(key, torch.float32), key
    train(other, resumed, gradients(6, seed=5))
    assert torch.equal(straight, resumed)


@pytest.mark.parametrize("arm", [*RESIDENT, *MASTER])
def test_a_non_finite_gradient_skips_the_tensor_and_is_counted(arm):
    weight, other = parameter(), parameter(seed=3)
    optimizer = (RESIDENT | MASTER)[arm]([weight, other], "E4M3")
    train(optimizer, weight, gradients(2))
    before, other_before = weight.detach().clone(), other.detach().clone()
    weight.grad = torch.full_like(before, float("nan"))
    other.grad = gradients(1)[0]
    optimizer.step()
    assert torch.equal(weight.detach(), before) and optimizer.skipped == 1
    assert not torch.equal(other.detach(), other_before) or "grid" in arm or "nearest" in arm


def test_sustained_overflow_doubles_the_scale_once_and_is_an_event():
    weight = nn.Parameter(torch.full((4096,), 0.5))
    optimizer = RoundedAdamW([weight], lr=0.2, format="E0M7", rounding="stochastic")
    optimizer.count_every = 1
    before = float(weight.grid.scale)
    events = 0
    for _ in range(14):
        train(optimizer, weight, [-torch.ones(4096)])
        events += int(optimizer.counts[weight].rescaled)
    assert events == 1
    assert float(weight.grid.scale) == 2 * before
    assert torch.equal(weight.detach(), quantize(weight.detach(), "E0M7", weight.grid.scale))


@pytest.mark.parametrize("arm", [*RESIDENT, *MASTER])
def test_counting_changes_no_bit(arm):
    make = (RESIDENT | MASTER)[arm]
    weights = []
    for telemetry, every in ((True, 1), (True, 8), (False, 1)):
        weight = parameter()
        optimizer = make([weight], "E3M4")
        optimizer.telemetry, optimizer.count_every = telemetry, every
        train(optimizer, weight, gradients(20))
        weights.append(weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_weights_loaded_after_construction_are_honoured():
    weight = parameter()
    optimizer = GridOptim([weight], lr=3e-3, format="E4M3")
    new = quantize(parameter(seed=8).detach(), "E4M3", weight.grid.scale)
    with torch.no_grad():
        weight.copy_(new)
    train(optimizer, weight, [torch.zeros_like(new)])
    assert torch.equal(weight.detach(), new)
    assert torch.equal(optimizer.master_p[0], new)


def test_randomness_depends_on_the_seed_and_not_on_the_format_or_the_object():
    def run(seed: int) -> torch.Tensor:
        weight = parameter()
        train(GridOptim([weight], lr=3e-3, format="E3M4", seed=seed), weight, gradients(3))
        return weight.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: GridOptim([p], rung_clip=-1), "rung_clip=-1"),
        (lambda p: GridOptim([p], rung_clip=0.5, carry=True), "rung_clip=0.5"),
        (lambda p: GridOptim([p], normalize="RMS"), "normalize='RMS'"),
        (lambda p: GridOptim([p], step_unit="ulp"), "step_unit='ulp'"),
        (lambda p: GridOptim([p], momentum=1.5), "momentum=1.5"),
        (lambda p: RoundedAdamW([p], format="E9M9"), "E9M9"),
        (lambda p: RoundedAdamW([{"params": [p], "format": "E9M9"}]), "E9M9"),
        (lambda p: RoundedAdamW([p], rounding="stochastc"), "rounding='stochastc'"),
        (lambda p: RoundedAdamW([p], lr=float("nan")), "lr=nan"),
        (lambda p: RoundedAdamW([p], lr=-1), "lr=-1"),
        (lambda p: RoundedAdamW([p], betas=(0.9, 1.0)), "betas="),
        (lambda p: RoundedAdamW([p], tensor_scale=0), "tensor_scale=0"),
        (lambda p: ManifoldAdamW([p], precondition="updat"), "precondition='updat'"),
        (lambda p: ManifoldAdamW([p], step_unit="rungs"), "step_unit='rungs'"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(parameter())


def test_a_sparse_gradient_is_refused_with_the_parameter():
    embedding = nn.Embedding(8, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"\(8, 4\) is sparse"):
        RoundedAdamW(embedding.parameters()).step()


def test_counts_of_a_bfloat16_master_are_of_what_its_dtype_kept():
    weight = parameter(dtype=torch.bfloat16, std=1.0)
    before = weight.detach().clone()
    optimizer = RoundedAdamW([weight], lr=1e-6, format="E4M3")
    train(optimizer, weight, gradients(1))
    assert int(optimizer.counts[weight].applied) == int((weight != before).sum()) < weight.numel() // 2
