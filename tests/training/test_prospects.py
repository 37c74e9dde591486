"""What other formats would make of a reference run, against numbers computed another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from altgrad.quantization import FORMATS, compute_scale, get_format, ulp
from altgrad.training import TrainConfig, Trainer
from altgrad.training.observers.prospects import BINADES, binades, flips_and_expected

LAYER = "transformer.h.0.mlp.c_fc"
CONFIG = TrainConfig.model_validate(
    {
        "model": {"layers": 1, "heads": 2, "width": 16, "block": 16},
        "data": {"batch": 2, "eval_batches": 1},
        "format": "BF16",
        "schedule": {"warmup": 8},
        "steps": 4,
        "log_interval": 4,
        "eval_interval": 4,
        "checkpoint_interval": 4,
    }
)
EIGHT_BIT = [name for name, fmt in FORMATS.items() if fmt.total_bits == 8]


class Watched(Trainer):
    """Keeps what one layer's last step looked like."""

    def _before_update(self):
        self.before = self.model.get_submodule(LAYER).weight.detach().clone()
        return super()._before_update()

    def _train_step(self, step, **rest):
        layer = self.model.get_submodule(LAYER)
        hooks = [layer.register_forward_pre_hook(self._came_in), layer.register_forward_hook(self._went_out)]
        values = super()._train_step(step, **rest)
        for hook in hooks:
            hook.remove()
        self.after = layer.weight.detach().clone()
        return values

    def _came_in(self, _, args):
        self.input = args[0].detach().clone()

    def _went_out(self, _, args, y):
        y.register_hook(lambda gradient: setattr(self, "gradient", gradient.clone()))


@pytest.fixture(scope="module")
def seen():
    trainer = Watched(CONFIG)
    trainer.run()
    return trainer, trainer.rows[-1]["layers"][LAYER]


def on_grid(x: np.ndarray, name: str) -> np.ndarray:
    """x at the nearest of the format's values under the scale of its own amax; ties are not of interest."""
    values = get_format(name).values.double().numpy()
    scale = np.float32(np.abs(x).max() / values.max())
    grid = values * scale
    return grid[np.abs(x.reshape(-1, 1) - grid).argmin(1)].reshape(x.shape)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_signal_to_noise_of_every_role(name, seen) -> None:
    trainer, layer = seen
    for role, x in (("weight", trainer.before), ("activation", trainer.input), ("gradient", trainer.gradient)):
        values = x.double().numpy()
        noise = values - on_grid(values, name)
        expected = 10 * np.log10((values**2).sum() / (noise**2).sum())
        assert layer[f"{role}_sqnr@{name}"] == pytest.approx(expected, rel=1e-4), role
        lost = ((values != 0) & (on_grid(values, name) == 0)).mean()
        assert layer[f"{role}_underflow@{name}"] == pytest.approx(lost, abs=1 / values.size), role


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_the_yield_is_that_of_the_full_rates_step(name, seen) -> None:
    trainer, layer = seen
    before = trainer.before.double().numpy()
    change = 2 * (trainer.after - trainer.before).double().numpy()  # step 4 of a warmup of 8
    start = on_grid(before, name)
    grid = get_format(name).values.double().numpy() * np.float32(np.abs(before).max() / get_format(name).max)
    moved = np.clip(start + change, grid.min(), grid.max())
    flips = (grid[np.abs(moved.reshape(-1, 1) - grid).argmin(1)].reshape(start.shape) != start).sum()
    assert layer[f"flip_yield@{name}"] > 0
    # The spacing at a value is the distance to the neighbour further from zero, the last binade's at its end.
    spacing = np.array([_spacing(grid, value) for value in start.ravel()])
    expected = np.minimum(1, np.abs(change).ravel() / spacing).sum()
    assert layer[f"flip_yield@{name}"] == pytest.approx(flips / expected, rel=2e-3)
    assert layer[f"flip_rate@{name}"] == pytest.approx(flips / before.size, rel=2e-3)


def _spacing(grid: np.ndarray, value: float) -> float:
    magnitudes = np.unique(np.abs(grid))
    place = int(np.abs(magnitudes - abs(value)).argmin())
    if place + 1 < len(magnitudes):
        return float(magnitudes[place + 1] - magnitudes[place])
    return float(magnitudes[-1] - magnitudes[-2])


def test_steps_below_half_a_spacing_are_swallowed() -> None:
    weight = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float32)
    fmt = get_format("E5M2")
    spacing = ulp(weight, fmt, compute_scale(weight, fmt))
    for share, flips in ((0.4, 0), (0.6, 3), (3.0, 3)):
        found, expected = flips_and_expected(weight, -share * spacing * weight.sign(), fmt)
        assert (int(found), float(expected)) == (flips, pytest.approx(3 * min(1.0, share)))
    assert flips_and_expected(weight, torch.zeros(3, dtype=torch.float32), fmt) == (0, 0)


def test_binades_count_every_weight_once() -> None:
    weight = torch.tensor([4.0, -3.0, 2.0, 1.9, 0.5, 0.0, 2.0**-40], dtype=torch.float32)
    shares = binades(weight)
    assert len(shares) == BINADES and shares.sum() == pytest.approx(5 / 7)
    assert [round(7 * float(share)) for share in shares[:4]] == [3, 1, 1, 0]


@pytest.mark.parametrize("name", ["E5M2", "FP32"])
def test_only_bf16_references_are_looked_at(name: str) -> None:
    trainer = Trainer(CONFIG.model_copy(update={"format": name}))
    trainer.run()
    assert not [name for name in trainer.rows[-1]["layers"][LAYER] if "@" in name]
