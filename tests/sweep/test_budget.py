"""Caps on what a sweep may spend: refused when they cap nothing, metered over restarts, and lifted again."""

from pathlib import Path

import pytest

from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.budget import Budget, Meter
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.spend import Spend
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.spec import SweepSpec


@pytest.mark.parametrize(
    ("budget", "gpus", "message"),
    [
        (Budget(hours=0.0), 0, "--max-hours: 0 is not allowed"),
        (Budget(usd=0.0, usd_per_gpu_hour=2.0), 1, "--max-usd: 0 is not allowed"),
        (Budget(gpu_hours=3.0), 0, "without --gpus-per-trial"),
        (Budget(usd=3.0), 1, "without --usd-per-gpu-hour"),
    ],
)
def test_caps_that_cap_nothing_are_refused(budget: Budget, gpus: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget.check(gpus)


def test_spending_adds_up_over_runs_that_were_killed(tmp_path: Path) -> None:
    now = [1000.0]
    budget = Budget(gpu_hours=2.0, usd=5.0, usd_per_gpu_hour=2.0)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = Meter(budget, ledger, 0.5, lambda: now[0])
        now[0] += 1800
        first.tick(3)
        assert first.spent == Spend(0.5, 0.75, 1.5) and first.exceeded is None
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        second = Meter(budget, ledger, 0.5, lambda: now[0])
        assert second.spent == Spend(0.5, 0.75, 1.5)
        now[0] += 3600
        second.tick(2)
        assert second.spent == Spend(1.5, 1.75, 3.5) and second.exceeded is None
        now[0] += 1800
        second.tick(1)
        assert second.exceeded == "2 of 2 GPU-hours (--max-gpu-hours) are spent"


@pytest.mark.slow
def test_a_sweep_ends_as_budget_survives_a_restart_and_goes_on_when_the_cap_is_lifted(
    tmp_path: Path, running_ray: str
) -> None:
    spec = SweepSpec.model_validate(
        {
            "name": "small",
            "formats": "BF16",
            "optimizers": "adamw",
            "seeds": 3,
            "steps": 400,
            "guards": "off",
            "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
            "data": {"batch": 2, "eval_batches": 1},
            "log_interval": 10,
            "eval_interval": 50,
            "checkpoint_interval": 10,
        }
    )
    out = tmp_path / "sweep"
    tight = RunOptions(out=out, max_concurrent=1, budget=Budget(hours=4 / 3600), address=running_ray)
    ended = run_sweep(spec, tight)
    assert ended.left and ended.over_budget is not None and ended.endings["budget"] == ended.left
    again = run_sweep(spec, tight)
    assert again.left == ended.left and again.over_budget is not None
    with Ledger(out / "ledger.sqlite") as ledger:
        assert ledger.spent().hours >= 4 / 3600
    lifted = run_sweep(spec, RunOptions(out=out, budget=Budget(hours=1.0), address=running_ray))
    assert lifted.left == 0 and lifted.endings == {"done": 3} and lifted.over_budget is None
    with Ledger(out / "ledger.sqlite") as ledger:
        assert set(ledger.row_counts().values()) == {400}
