"""What early stopping saves, and what it gets wrong: `python tests/bench/early_stopping.py OUT`.

OUT is the folder of a finished sweep with an axis of learning rates, run without guards and without a race: the full
grid. Training is deterministic and neither guards nor races touch it, so what they would have done is replayed on the
recorded rows, by the sweep's own classes: trials start in the sweep's order on a number of slots, report at every
log interval, and are stopped by the verdicts that those classes give. Beside them stands plain asynchronous
successive halving over the pool of all trials, which is what one gets without thinking.

For each policy the table says which share of the grid's steps it trains; whether it finds the grid's best cell; in how
many cells (format x arm) it finds the grid's best learning rate, of those where the grid decides it (95 % interval of
the best's paired differences to the second best without 0) and of the others; and for how many of the formats in
which the grid decides between manifold and standard AdamW (best rates, the same interval) it finds the same sign.
A group counts where all its seeds reached the end; a cell without one has no best rate, which counts as missed unless
every one of the grid's is a failure too (ends FAILED nats or more above BF16): there a stop is the finding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from altgrad.sweep.options import RunOptions
from altgrad.sweep.pace.racing import SCORE, Race
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.references import references
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.pacing import RaceConfig
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import TrainConfig
from altgrad.training.guards import DEFAULT_GUARDS, GuardPanel
from altgrad.training.record import read_rows

FAILED = 0.1
"""Nats above BF16 at its best rate from which on a cell has failed, whatever its rate."""


@dataclass
class Pool:
    """Asynchronous successive halving over all trials alike (arXiv 1810.05934, the stopping form)."""

    rungs: Sequence[int]
    reduction: int
    seen: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    passed: dict[str, int] = field(default_factory=dict)

    def stops(self, trial_id: str, step: int, loss: float | None) -> bool:
        """Whether the trial is cut at this step; one loss is taken per trial and rung."""
        rung = max((rung for rung in self.rungs if rung <= step), default=None)
        if rung is None or loss is None or self.passed.get(trial_id) == rung:
            return False
        self.passed[trial_id] = rung
        self.seen[rung].append(loss if math.isfinite(loss) else math.inf)
        return loss > sorted(self.seen[rung])[math.ceil(len(self.seen[rung]) / self.reduction) - 1]


@dataclass
class Policy:
    """What may stop a trial."""

    name: str
    guards: bool = False
    race: bool = False
    pooled: bool = False


POLICIES = (
    Policy("full grid"),
    Policy("guards alone", guards=True),
    Policy("ASHA within cells alone", race=True),
    Policy("guards and ASHA within cells", guards=True, race=True),
    Policy("pooled ASHA", pooled=True),
)


@dataclass
class Grid:
    """The recorded sweep: configurations in their order, and each one's rows by log interval."""

    trials: dict[str, TrainConfig]
    intervals: dict[str, list[list[dict[str, Any]]]]
    race: RaceConfig

    @property
    def rungs(self) -> list[int]:
        longest = max(self.trials.values(), key=lambda config: config.steps)
        return self.race.rungs(longest.steps, longest.eval_interval)


def read_grid(out: Path) -> Grid:
    ids = json.loads((out / "sweep.json").read_text())["trials"]
    with Ledger(out / "ledger.sqlite") as ledger:
        left = [trial_id for trial_id in ids if trial_id not in ledger.outcomes()]
    if left:
        raise SystemExit(f"{out}: {len(left)} of {len(ids)} trials have not ended; the full grid is needed")
    trials, intervals = {}, {}
    for trial_id in ids:
        folder = out / "trials" / trial_id
        trials[trial_id] = TrainConfig.model_validate(json.loads((folder / "config.json").read_text())["config"])
        rows, every = read_rows(folder / "metrics.jsonl")[0], trials[trial_id].log_interval
        intervals[trial_id] = [rows[i : i + every] for i in range(0, len(rows), every)]
    return Grid(trials, intervals, RaceConfig())


def replay(grid: Grid, policy: Policy, slots: int) -> dict[str, int]:
    """Steps that each trial trains under the policy."""
    against = references(grid.trials)
    race = Race(grid.trials, grid.race) if policy.race else None
    pool = Pool(grid.rungs, grid.race.reduction)
    panels = {trial_id: GuardPanel(DEFAULT_GUARDS if policy.guards else ()) for trial_id in grid.trials}
    waiting, running, steps = list(grid.trials), list[str](), dict[str, int]()
    done = dict.fromkeys(grid.trials, 0)
    while waiting or running:
        for trial_id in list(waiting):
            stopped = race.verdict(trial_id) if race is not None else None
            is_held = race is not None and race.is_waiting(trial_id)
            if stopped is not None:
                waiting.remove(trial_id)
                steps[trial_id] = int(grid.intervals[trial_id][done[trial_id] - 1][-1]["step"]) if done[trial_id] else 0
            elif len(running) < slots and not is_held and against.get(trial_id) not in {*waiting, *running}:
                waiting.remove(trial_id)
                running.append(trial_id)
        for trial_id in list(running):
            chunks = grid.intervals[trial_id]
            rows = chunks[done[trial_id]]
            done[trial_id] += 1
            step, score = int(rows[-1]["step"]), rows[-1].get(SCORE)
            verdict = panels[trial_id].check(rows)
            is_over = verdict is not None or done[trial_id] == len(chunks)
            if race is not None:
                if score is not None:
                    race.observe(trial_id, step, float(score))
                if verdict is not None:
                    race.ended(trial_id, verdict.kind, step)  # type: ignore[arg-type]
                elif is_over:
                    race.ended(trial_id, "done", step)  # type: ignore[arg-type]
            if is_over or (policy.pooled and pool.stops(trial_id, step, score)):
                steps[trial_id] = step
                running.remove(trial_id)
            elif race is not None and (race.is_waiting(trial_id) or race.verdict(trial_id) is not None):
                running.remove(trial_id)
                waiting.insert(0, trial_id)
    return steps


@dataclass
class Finding:
    """What the trials that reached the end say."""

    groups: dict[tuple[str, str], dict[float, dict[int, float]]]
    """(format, arm) to learning rate to seed to final loss, of whole groups"""

    def rate(self, cell: tuple[str, str]) -> float | None:
        """The cell's best learning rate."""
        rates = self.groups.get(cell, {})
        return min(rates, key=lambda lr: statistics.fmean(rates[lr].values())) if rates else None

    def loss(self, cell: tuple[str, str]) -> float:
        rate = self.rate(cell)
        return math.inf if rate is None else statistics.fmean(self.groups[cell][rate].values())

    def best_cell(self) -> tuple[str, str]:
        return min(self.groups, key=self.loss)

    def margins(self, cell: tuple[str, str]) -> list[float]:
        """Second best minus best learning rate of a cell, by seed; empty where there is no second."""
        rates = self.groups[cell]
        order = sorted(rates, key=lambda lr: statistics.fmean(rates[lr].values()))
        return [rates[order[1]][seed] - loss for seed, loss in rates[order[0]].items()] if len(order) > 1 else []

    def differences(self, format: str) -> list[float]:
        """Manifold minus standard, by seed, each at its best rate; empty where either is missing."""
        cells = [(format, arm) for arm in ("manifold", "adamw")]
        rates = [self.rate(cell) for cell in cells]
        if None in rates:
            return []
        ours, theirs = (self.groups[cell][rate] for cell, rate in zip(cells, rates, strict=True) if rate is not None)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def finding(grid: Grid, steps: Mapping[str, int]) -> Finding:
    whole: dict[tuple[str, str], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    seeds = {config.seed for config in grid.trials.values()}
    for trial_id, config in grid.trials.items():
        loss = grid.intervals[trial_id][-1][-1].get(SCORE)
        if steps[trial_id] >= config.steps and loss is not None and math.isfinite(loss):
            whole[config.format, config.arm][config.optimizer.lr][config.seed] = loss
    return Finding(
        {
            cell: kept
            for cell, rates in whole.items()
            if (kept := {lr: found for lr, found in rates.items() if set(found) == seeds})
        }
    )


def decided(differences: Sequence[float]) -> int:
    """The sign of the mean where its 95 % interval leaves 0 out, else 0."""
    if len(differences) < 2:
        return 0
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    half = stats.t.ppf(0.975, len(differences) - 1) * spread / math.sqrt(len(differences))
    return 0 if abs(mean) <= half else int(math.copysign(1, mean))


def compare(grid: Grid, full: Finding, own: Finding, steps: Mapping[str, int]) -> list[str]:
    """The cells of a policy's line."""
    total = sum(len(chunks[-1]) and chunks[-1][-1]["step"] for chunks in grid.intervals.values())
    baseline = min(full.loss(("BF16", "adamw")), full.loss(("FP32", "adamw")))
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for cell in full.groups:
        is_failure = own.rate(cell) is None and full.loss(cell) > baseline + FAILED
        hits[decided(full.margins(cell)) != 0].append(is_failure or own.rate(cell) == full.rate(cell))
    formats = sorted({config.format for config in grid.trials.values() if not config.is_reference})
    signs = {name: sign for name in formats if (sign := decided(full.differences(name)))}
    kept = sum(bool(d := own.differences(name)) and statistics.fmean(d) * sign > 0 for name, sign in signs.items())
    return [
        f"{sum(steps.values()) / total:.0%}",
        "yes" if own.best_cell() == full.best_cell() else f"no: {' '.join(own.best_cell())}",
        *(f"{sum(found)} of {len(found)}" for found in hits.values()),
        f"{kept} of {len(signs)}",
    ]


def table(grid: Grid, slots: Sequence[int]) -> str:
    head = (
        "policy",
        "trials at once",
        "steps",
        "best cell",
        "best rate where the grid decides",
        "best rate elsewhere",
        "sign of manifold - standard",
    )
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    full = finding(grid, {trial_id: config.steps for trial_id, config in grid.trials.items()})
    for at_once in slots:
        for policy in POLICIES:
            steps = replay(grid, policy, at_once)
            cells = compare(grid, full, finding(grid, steps), steps)
            lines.append("| " + " | ".join((policy.name, str(at_once), *cells)) + " |")
    best = full.best_cell()
    return "\n".join(lines) + (
        f"\n\n{len(grid.trials)} trials, {len(full.groups)} cells, rungs at {', '.join(map(str, grid.rungs))} steps. "
        f"The grid's best cell is {' '.join(best)} at a learning rate of {full.rate(best):g} ({full.loss(best):.3f} "
        f"nats)."
    )


def main() -> None:
    """Replays and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slots", default="2,12")
    asked = parser.parse_args()
    print(table(read_grid(asked.out), [int(slots) for slots in asked.slots.split(",")]))


@pytest.mark.bench
def test_the_benchmark_runs_and_prints_its_table(tmp_path: Path) -> None:
    spec = SweepSpec.model_validate(
        {
            "formats": "E5M2",
            "optimizers": "adamw,manifold",
            "lrs": "1e-3,4e-3,1.6e-2",
            "seeds": 2,
            "steps": 40,
            "guards": "off",
            "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
            "eval_interval": 10,
            "checkpoint_interval": 20,
            "data": {"batch": 2, "eval_batches": 1},
        }
    )
    result = run_sweep(spec, RunOptions(out=tmp_path / "grid"))
    text = table(read_grid(result.out), [2])
    print(text)
    assert "| full grid | 2 | 100% | yes |" in text


if __name__ == "__main__":
    main()
