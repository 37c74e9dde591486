"""A plan counts what a hand count finds, and measures before it promises."""

from itertools import product
from pathlib import Path

import pytest

from altgrad.cli import main
from altgrad.sweep.options import RunOptions
from altgrad.sweep.plan import Cost, estimate
from altgrad.sweep.space.declaration import ALL_FORMATS
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import TrainConfig

CLIPS, SEEDS = (1.0, 3.0, 10.0), 6
POLICIES = ("uniform", "uniform_act", "uniform_full", "attention_bf16", "mlp_bf16", "head_bf16", "classic")


def by_hand() -> set[tuple[str, str, str, float | None]]:
    """(format, arm, policy, rung_clip) of every cell, without the spec's own rules."""
    cells = set()
    for name, arm, policy in product(ALL_FORMATS, ARMS, POLICIES):
        if policy == "classic" and name != "E0M7":
            continue  # it names its own formats: once, under the first
        if name == "BF16" and policy not in ("uniform", "classic"):
            continue  # all layers are BF16 already
        if arm == "manifold_fp32" and policy in ("uniform_act", "uniform_full"):
            continue  # no layer rounds anything, and the weights' spacings are those of uniform
        cells |= {(name, arm, policy, clip) for clip in (CLIPS if arm.startswith("grid") else (None,))}
    return cells | {("BF16", "adamw", "uniform", None)}


def test_the_plan_of_everything_counts_what_a_hand_count_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unmeasured: None
) -> None:
    spec = SweepSpec.model_validate(
        {"formats": "all", "optimizers": "all", "policies": ",".join(POLICIES), "rung_clip": CLIPS, "seeds": SEEDS}
    )
    expected = by_hand()
    found = {(c.format, c.arm, c.policy, getattr(c.optimizer, "rung_clip", None)) for c in spec.expand()}
    assert found == expected and len(spec.expand()) == len(expected) * SEEDS
    assert (
        main(
            [
                "plan",
                "--formats",
                "all",
                "--optimizers",
                "all",
                "--policies",
                ",".join(POLICIES),
                "--rung-clip",
                "1,3,10",
                "--seeds",
                "6",
                "--out",
                str(tmp_path / "none"),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert f"{len(expected) * SEEDS} trials of 100 steps" in text and not (tmp_path / "none").exists()
    everything = len(ALL_FORMATS) * len(POLICIES) * (len(ARMS) + 2 * (len(CLIPS) - 1)) * SEEDS
    excluded = sum(int(line.split()[2]) for line in text.splitlines() if line.startswith("left out:"))
    assert everything - excluded == len(expected) * SEEDS


def test_slots_share_the_trials_and_gpus_are_priced(unmeasured: None) -> None:
    trials = {str(i): TrainConfig(seed=i, steps=100) for i in range(4)}
    one = estimate(trials, 1, 1, RunOptions(Path(), gpus_per_trial=0.5))
    two = estimate(trials, 2, 2, RunOptions(Path(), gpus_per_trial=0.5))
    each = Cost(1, 2, 3).of(trials["0"])
    assert each == pytest.approx(1 + 200 + 2 * 3, abs=0.5)
    assert one.wall_seconds - two.wall_seconds == pytest.approx(2 * each)
    assert one.gpu_seconds == two.gpu_seconds == pytest.approx(4 * each / 2)


def test_a_probe_measures_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "plan",
                "--formats",
                "BF16",
                "--optimizers",
                "adamw",
                "--seeds",
                "1",
                "--steps",
                "20",
                "--out",
                str(tmp_path / "none"),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "estimate: " in text and "1 cost classes, measured by 20 steps each" in text
    assert not (tmp_path / "none").exists()
