"""Each arm's rule against its own formula in float64, and what every arm must do whatever its rule."""

from __future__ import annotations

import pickle
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from altgrad.quantization import get_format, quantize
from altgrad.quantization.ops import code_index
from altgrad.training import ARMS, GridOptim, ManifoldAdamW, RoundedAdamW, RoundedOptimizer, TrainConfig
from altgrad.training.arms import build_optimizer
from altgrad.training.optimizer import GridAwareOptimizer
from altgrad.training.rules import RULES, orthogonalized

STEPS = 6


def start(shape=(24, 16), seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02)


def gradients(shape=(24, 16), count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * 0.01 for _ in range(count)]


def stepped(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach().double()


def sgdm(w: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    m = torch.zeros_like(w)
    for g in grads:
        m = 0.9 * m + g.double()
        w = w - lr * m
    return w


def lion(w: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    m = torch.zeros_like(w)
    for g in grads:
        w = w - lr * torch.sign(0.9 * m + 0.1 * g.double())
        m = 0.95 * m + 0.05 * g.double()
    return w


def madam(w: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    v = torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        v = 0.95 * v + 0.05 * g.double() ** 2
        normalized = (g.double() / (v / (1 - 0.95**t)).sqrt()).clamp(-10, 10)
        w = w * torch.exp(-lr * torch.sign(w) * normalized)
    return w


def adamw(w: Tensor, grads: list[Tensor], lr: float, decay: float = 0.0) -> Tensor:
    m = v = torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) - lr * decay * w
    return w


@pytest.mark.parametrize(("rule", "oracle"), [("sgdm", sgdm), ("lion", lion), ("madam", madam)])
def test_a_master_rule_is_its_formula(rule, oracle):
    weight = start()
    expected = oracle(weight.detach().double(), gradients(), RULES[rule].defaults["lr"])
    ours = stepped(RoundedOptimizer([weight], rule, format="E4M3", rounding=None), weight, gradients())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (8, 4, 3)])
def test_muon_is_torchs_muon_up_to_its_unit(shape):
    ours, theirs = start(shape), start(shape).detach().flatten(1).clone().requires_grad_()
    # torch iterates in bfloat16, which is what the tolerance is for.
    reference = torch.optim.Muon([theirs], lr=2e-3, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = RoundedOptimizer([ours], "muon", format="E4M3", rounding=None)
    for grad in gradients(shape):
        ours.grad, theirs.grad = grad.clone(), grad.flatten(1).clone()
        optimizer.step(), reference.step()
    torch.testing.assert_close(ours.detach().flatten(1), theirs.detach(), rtol=0.05, atol=2e-4)


def test_orthogonalized_matrices_are_nearly_so():
    values = torch.linalg.svdvals(orthogonalized(torch.randn(40, 24, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_takes_adams_step_for_vectors():
    weight = start((33,))
    ours = stepped(
        RoundedOptimizer([weight], "muon", lr=2e-3, momentum=0.9, beta2=0.999, format="E4M3", rounding=None),
        weight,
        gradients((33,)),
    )
    expected = adamw(start((33,)).detach().double(), gradients((33,)), 2e-3)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_madam_keeps_signs_and_zeros():
    weight = start()
    with torch.no_grad():
        weight[0] = 0
    before = weight.detach().clone()
    stepped(RoundedOptimizer([weight], "madam", lr=0.3, format=None, rounding=None), weight, gradients(count=30))
    assert torch.equal(weight.sign(), before.sign()) and not torch.equal(weight, before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_eco_puts_what_rounding_took_into_the_first_moment(rounding):
    weight = start()
    optimizer = RoundedAdamW([weight], lr=3e-3, format="E4M3", rounding=rounding, error_feedback=True)
    scale, w = float(weight.grid.scale), weight.detach().double()
    m = v = torch.zeros_like(w)
    for t, g in enumerate(gradients(), 1):
        ours = stepped(optimizer, weight, [g])
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        denominator = (v / (1 - 0.999**t)).sqrt() + 1e-8
        target = w - 3e-3 * (m / (1 - 0.9**t)) / denominator
        assert torch.equal(ours, quantize(ours, "E4M3", scale))
        m = m - (target - ours) * denominator * (1 - 0.9**t) * (0.1 / 0.9) / 3e-3
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"].double(), m, rtol=1e-3, atol=1e-5)
        w = ours


def test_the_fed_back_error_arrives_in_full():
    # After one rounding error and no further gradient, the weight must travel by exactly the error: it is repaid.
    torch.manual_seed(0)
    weights = {}
    for feedback in (True, False):
        weight = nn.Parameter(torch.full((4096,), 0.5))
        optimizer = RoundedAdamW(
            [weight], lr=2e-3, format="E3M4", rounding="stochastic", error_feedback=feedback, tensor_scale=1.0
        )
        weights[feedback] = stepped(optimizer, weight, [torch.full((4096,), 0.01)] * 40)
    exact = adamw(torch.full((4096,), 0.5, dtype=torch.float64), [torch.full((4096,), 0.01)] * 40, 2e-3)
    spread = {feedback: (w - exact).square().mean().sqrt() for feedback, w in weights.items()}
    assert spread[True] < 0.7 * spread[False]
    assert abs((weights[True] - exact).mean()) < 5 * spread[True] / 4096**0.5 + 1e-3


@pytest.fixture(scope="module")
def resumed_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """By arm and format: weights that went on here, and those that another process made from an odd step's state."""
    here, saved, folder = {}, {}, tmp_path_factory.mktemp("resume")
    for arm, format_name in product(ARMS, ("E4M3", "E7M0")):
        config = TrainConfig(format=format_name, optimizer=ARMS[arm])
        weight = start((8, 12))
        optimizer = arm_over(config, weight)
        stepped(optimizer, weight, gradients((8, 12), 3))
        saved[arm, format_name] = pickle.dumps((config, weight.detach().clone(), optimizer.state_dict()))
        stepped(optimizer, weight, gradients((8, 12), 4))
        here[arm, format_name] = weight.detach()
    (folder / "saved").write_bytes(pickle.dumps(saved))
    code = f"import pathlib, test_arms; test_arms.resume_all(pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    there = torch.load(folder / "resumed")
    return {key: (weight, there[key]) for key, weight in here.items()}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("format_name", ["E4M3", "E7M0"])
def test_resume_across_processes_is_bitwise(arm, format_name, resumed_elsewhere):
    here, there = resumed_elsewhere[arm, format_name]
    assert torch.equal(here, there)


def arm_over(config: TrainConfig, weight: nn.Parameter) -> GridAwareOptimizer:
    model = nn.ParameterList([weight])
    return build_optimizer(config, model, {weight: get_format(config.format)})


def resume_all(folder: Path) -> None:
    """Run by the other process: resumes each of the saved states."""
    torch.set_num_threads(1)
    saved = pickle.loads((folder / "saved").read_bytes())
    torch.save({key: resumed(state) for key, state in saved.items()}, folder / "resumed")


def resumed(saved: bytes) -> Tensor:
    """The weights after four more steps from a saved state."""
    config, values, state = pickle.loads(saved)
    weight = nn.Parameter(torch.zeros_like(values))
    optimizer = arm_over(config, weight)
    with torch.no_grad():
        weight.copy_(values)
    optimizer.load_state_dict(state)
    stepped(optimizer, weight, gradients((8, 12), 4))
    return weight.detach()


@pytest.mark.parametrize("arm", ARMS)
def test_a_learning_rate_scheduler_works(arm):
    weights = []
    for factor in (1.0, 0.0):
        weight = start()
        optimizer = arm_over(TrainConfig(format="BF16", optimizer=ARMS[arm]), weight)
        before = weight.detach().clone()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        for grad in gradients(count=3):
            weight.grad = grad
            optimizer.step()
            scheduler.step()
        weights.append((before, weight.detach()))
    assert not torch.equal(*weights[0])
    assert torch.equal(*weights[1])


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_skips_a_tensor_whose_gradient_is_not_finite(arm):
    weight = start()
    optimizer = arm_over(TrainConfig(format="E4M3", optimizer=ARMS[arm]), weight)
    stepped(optimizer, weight, gradients(count=2))
    before = weight.detach().clone()
    state = {name: value.clone() for name, value in optimizer.state[weight].items()}
    for bad in (float("nan"), float("inf")):
        grad = gradients(count=1)[0]
        grad[3, 3] = bad
        stepped(optimizer, weight, [grad])
        assert int(optimizer.skipped) == 1 and torch.equal(weight.detach(), before)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[weight].items())


@pytest.mark.parametrize("arm", ARMS)
def test_a_parameter_without_gradient_is_untouched(arm):
    weight = start()
    optimizer = arm_over(TrainConfig(format="E4M3", optimizer=ARMS[arm]), weight)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight.detach(), before) and not optimizer.counts


def test_counts_are_codes_under_one_scale():
    weight = start((64, 64))
    optimizer = RoundedAdamW([weight], lr=3e-3, format="E4M3", rounding="stochastic")
    before = code_index(weight.detach(), "E4M3", weight.grid.scale)
    stepped(optimizer, weight, gradients((64, 64), 1))
    moved = code_index(weight.detach(), "E4M3", weight.grid.scale) - before
    counts = optimizer.counts[weight]
    assert int(counts.flips) == int((moved != 0).sum())
    assert int(counts.travel) == int(moved.abs().sum())
    assert int(counts.position) == int(moved.sum())
    assert int(counts.gradient) == int((weight.grad.abs() > 1e-10).sum())


def test_counting_every_third_step_counts_the_same_there():
    rows = []
    for every in (1, 3):
        weight = start()
        optimizer = ManifoldAdamW([weight], lr=3e-3, format="E3M4")
        optimizer.count_every = every
        own = []
        for grad in gradients():
            stepped(optimizer, weight, [grad])
            own.append(optimizer.counted[0][1])
        rows.append(torch.stack(own))
    assert torch.equal(rows[0][::3], rows[1][::3])
    assert not rows[1][[1, 2, 4, 5]].any() and rows[0].any()


def test_a_grid_step_tells_flips_and_updates_where_the_rest_is_not_counted():
    results, weights = [], []
    for every in (1, 4):
        weight = start()
        optimizer = GridOptim([weight], lr=3e-3, format="E3M4")
        optimizer.count_every = every
        results.append([])
        for grad in gradients():
            weight.grad = grad
            flips, updates = optimizer.step()
            results[-1].append((flips, updates))
            assert optimizer.counts[weight].travel >= flips > 0 or every > 1
        weights.append(weight.detach())
    assert results[0] == results[1] and torch.equal(*weights)


def test_the_result_of_a_grid_step_is_fetched_when_looked_at():
    weight = start()
    result = None
    optimizer = GridOptim([weight], lr=3e-3, format="E4M3")
    weight.grad = gradients(count=1)[0]
    result = optimizer.step()
    flips, updates = result
    assert result == (flips, updates) and len(result) == 2 and result[0] == flips and isinstance(updates, int)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: RoundedOptimizer([p], "leon"), "rule='leon'"),
        (lambda p: RoundedOptimizer([p], "lion", momentum=1.0), "momentum=1.0"),
        (lambda p: RoundedAdamW([p], error_feedback=True), "error_feedback=True"),
        (lambda p: RoundedAdamW([p], rounding="nearest", tensor_scale=1e38), "tensor_scale=1e.38"),
        (lambda p: RoundedAdamW([p.to(torch.bfloat16)], format="FP16", rounding="nearest"), "cannot hold"),
        (lambda p: RoundedAdamW([p], lr="fast"), "lr='fast'"),
        (lambda p: GridOptim([p], rung_clip=0), "rung_clip=0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(start().detach())


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "lion", "lr": -1},
        {"kind": "adamw", "error_feedback": True},
        {"kind": "manifold", "quantized": False, "rounding": "nearest"},
    ],
)
def test_bad_configurations_are_refused(values):
    with pytest.raises(ValueError):
        TrainConfig(optimizer=values)
