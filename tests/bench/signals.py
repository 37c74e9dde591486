"""What each guard catches, and what it stops by mistake: `python tests/bench/signals.py`.

Runs healthy trainings (formats x arms x seeds that end within 0.1 nats of the BF16 reference) and trainings with a
planted fault, all with guards off, keeps every row, and then judges the same rows by the default guards and by the
original's rules. A guard never touches the training, so judging afterwards is judging at the time.

For each kind of run and each set of rules the table says how many runs were stopped, how many of the faults by the
rule and in the layer that they belong to, and at which share of the run (median over those stopped).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad.training import ARMS, TrainConfig, Trainer
from altgrad.training.guards import DEFAULT_GUARDS, NAMED_RULES, GuardPanel, GuardRule, Verdict
from altgrad.training.reference import ReferenceCurve

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import faults

HEALTHY_GAP = 0.1
PLANTED_AT = 0.25
"""Share of the run after which a fault is planted."""

RULES: dict[str, tuple[GuardRule, ...]] = {
    "default": DEFAULT_GUARDS,
    "stall > .5": (NAMED_RULES["literal_stall"],),
    "rank -30 %": (NAMED_RULES["literal_rank"],),
    "rank -15 % (critical)": (NAMED_RULES["literal_critical_rank"],),
    "rank ratio [.5, 2]": (NAMED_RULES["rank_below_reference"], NAMED_RULES["rank_above_reference"]),
}


@dataclass(frozen=True)
class Case:
    """One kind of fault: how to plant it, and which rule and layer should name it (None: any)."""

    name: str
    plant: Callable[[Trainer, int], None] | None = None
    changes: Mapping[str, Any] | None = None
    signal: str = ""
    layer: str | None = None


CASES = (
    Case("NaN in a weight", faults.nan_weight, signal="train_loss", layer=faults.MIDDLE),
    Case("NaN in a gradient", faults.nan_gradient, signal="grad_norm", layer=faults.MIDDLE),
    Case("NaN in the loss", faults.nan_loss, signal="train_loss"),
    Case("infinite activation", faults.inf_activation, signal="train_loss", layer=faults.MIDDLE),
    Case("frozen layer", faults.frozen_layer, signal="frozen", layer=faults.MIDDLE),
    Case("collapse of lm_head", faults.collapse, signal="spread_ratio/min", layer=faults.HEAD),
    Case("collapse of a c_proj", faults.collapse_branch, signal="spread_ratio/min", layer=faults.BRANCH),
    Case("learning rate x 100", changes={"lr": 100.0}, signal="spectral_ratio/max"),
    Case(
        "bad activation scale",
        partial(faults.bad_scale, role="activation"),
        {"policy": "uniform_act"},
        "activation_overflow/max",
        faults.MIDDLE,
    ),
    Case(
        "bad weight scale",
        partial(faults.bad_scale, role="weight"),
        {"arms": ("adamw", "manifold")},
        "weight_overflow/max",
        faults.MIDDLE,
    ),
    Case("E7M0 to nearest", changes={"format": "E7M0", "arms": ("adamw_nearest",)}, signal="flip_yield"),
)


@dataclass
class Run:
    """One training: what it was, its rows by log interval, and its end."""

    kind: str
    intervals: list[list[dict[str, Any]]]
    steps: int
    gap: float


def config(arm: str, format: str, seed: int, steps: int, **changes: Any) -> TrainConfig:
    optimizer = ARMS[arm].model_dump()
    optimizer["lr"] *= changes.pop("lr", 1.0)
    return TrainConfig(
        **(
            {
                "format": format,
                "optimizer": optimizer,
                "seed": seed,
                "steps": steps,
                "guards": (),
                "eval_interval": steps,
                "checkpoint_interval": steps,
            }
            | changes
        )
    )


def train(kind: str, own: TrainConfig, reference: Trainer | None, plant: Callable[[Trainer, int], None] | None) -> Run:
    trainer = Trainer(own, reference=None if reference is None else ReferenceCurve.of_rows(reference.rows))
    if plant is not None:
        plant(trainer, int(PLANTED_AT * own.steps) + 1)
    trainer.run()
    every = own.log_interval
    chunks = [trainer.rows[i : i + every] for i in range(0, len(trainer.rows), every)]
    best = trainer.outcome.val_loss
    gap = float("nan") if reference is None or best is None else best - reference.outcome.val_loss
    return Run(kind, chunks, own.steps, gap)


def reference_run(seed: int, steps: int, **changes: Any) -> Trainer:
    trainer = Trainer(config("adamw", "BF16", seed, steps, **changes))
    trainer.run()
    return trainer


def judge(run: Run, rules: Iterable[GuardRule]) -> Verdict | None:
    """The first verdict over the run's intervals."""
    panel = GuardPanel(rules)
    return next((verdict for rows in run.intervals if (verdict := panel.check(rows)) is not None), None)


def collect(
    formats: Sequence[str], arms: Sequence[str], seeds: int, steps: int, progress: Callable[[str], None], **shape: Any
) -> list[Run]:
    """All trainings, healthy ones first."""
    runs = []
    for seed in range(seeds):
        reference = reference_run(seed, steps, **shape)
        for format in formats:
            for arm in arms:
                run = train("healthy", config(arm, format, seed, steps, **shape), reference, None)
                progress(f"{format} {arm} seed {seed}: {run.gap:+.3f} nats from BF16")
                if run.gap > HEALTHY_GAP:
                    run.kind = "not healthy"
                runs.append(run)
        for case in CASES:
            changes = dict(case.changes or {})
            own_arms, own_format = changes.pop("arms", ("adamw", "grid", "manifold_sr")), changes.pop("format", "E4M3")
            for arm in own_arms:
                run = train(case.name, config(arm, own_format, seed, steps, **(shape | changes)), reference, case.plant)
                progress(f"{case.name}, {arm} seed {seed}: {run.gap:+.3f} nats from BF16")
                runs.append(run)
    return runs


def cell(runs: Sequence[Run], rules: Sequence[GuardRule], case: Case | None) -> str:
    """'stopped of all, right ones, median share of the run'."""
    verdicts = [(run, verdict) for run in runs if (verdict := judge(run, rules)) is not None]
    if not verdicts:
        return f"0 of {len(runs)}"
    share = statistics.median(verdict.step / run.steps for run, verdict in verdicts)
    text = f"{len(verdicts)} of {len(runs)} at {share:.0%}"
    if case is not None and rules is DEFAULT_GUARDS:
        right = sum(v.signal == case.signal and case.layer in (None, v.layer) for _, v in verdicts)
        text += f", {right} by the right rule and layer"
    return text


def table(runs: Sequence[Run]) -> str:
    """Markdown: a row per kind of run, a column per set of rules."""
    cases: dict[str, Case | None] = {"healthy": None} | {case.name: case for case in CASES}
    lines = ["| runs | " + " | ".join(RULES) + " |", "| --- |" + " --- |" * len(RULES)]
    for kind, case in cases.items():
        own = [run for run in runs if run.kind == kind]
        if own:
            lines.append(f"| {kind} | " + " | ".join(cell(own, rules, case) for rules in RULES.values()) + " |")
    healthy = [run for run in runs if run.kind == "healthy"]
    left_out = sum(run.kind == "not healthy" for run in runs)
    return "\n".join(lines) + (
        f"\n\n{len(healthy)} healthy runs; {left_out} more ended further than {HEALTHY_GAP} nats above BF16 and are "
        "not counted. A cell: runs stopped, and the median share of the run at which."
    )


def main() -> None:
    """Trains, judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="E2M5,E3M4,E4M3,E5M2")
    parser.add_argument("--arms", default="adamw,adamw_sr,manifold,manifold_sr,grid,eco")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=160)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = collect(
        asked.formats.split(","),
        asked.arms.split(","),
        asked.seeds,
        asked.steps,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(table(runs))


@pytest.mark.bench
def test_the_benchmark_runs_and_prints_its_table() -> None:
    shape = {"model": {"layers": 2, "heads": 2, "width": 16, "block": 16}, "data": {"batch": 2, "eval_batches": 1}}
    text = table(collect(["E4M3"], ["adamw"], 1, 40, lambda line: None, **shape))
    print(text)
    assert text.count("\n| ") >= 12


if __name__ == "__main__":
    main()
