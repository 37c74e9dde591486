"""The drill: NaN, stall and rank collapse, planted inside Ray, end their trials early under every executor and pace.

Who looks is the worker, which leaves a checkpoint, or the scheduler behind it, which comes one check later.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planting import planted_path
from ray.cluster_utils import Cluster

from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.layer_table import read_layers
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome

FAULTS = Path(__file__).parents[1] / "training"
PLANT = """
import faults

def plant(module):
    base = module.Trainer
    def planted(config, **rest):
        trainer = base(config, **rest)
        if config.format == "E4M3":
            fault = {0: faults.nan_weight, 1: faults.collapse, 2: faults.frozen_layer}[config.seed]
            fault(trainer, 24)
        return trainer
    module.Trainer = planted
"""
STEPS = 100
SMALL: dict[str, Any] = {
    "formats": "E4M3",
    "optimizers": "adamw",
    "seeds": 3,
    "steps": STEPS,
    "eval_interval": 50,
    "checkpoint_interval": 50,
    "data": {"batch": 4, "eval_batches": 1},
    "model": {"layers": 2, "heads": 2, "width": 32, "block": 64},
}
RATES = {"lrs": "1e-3,2e-3"}
EVIDENCE = {
    0: ("nonfinite", "train_loss", "transformer.h.1.mlp.c_fc"),
    1: ("rank_collapse", "spread_ratio/min", "lm_head"),
    2: ("stalled", "frozen", "transformer.h.1.mlp.c_fc"),
}
"""Seed to what its fault ends as, by which signal, in which layer."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Ray whose workers plant a fault in every E4M3 trial, by its seed."""
    path = planted_path(tmp_path_factory.mktemp("planted"), PLANT, FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        head = {"num_cpus": 2, "object_store_memory": 200_000_000, "include_dashboard": True, "dashboard_port": 0}
        started = Cluster(initialize_head=True, head_node_args=head)
    yield started.address
    started.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "worker_guards", "pace"),
    [
        ("actor", True, {"formats": "E4M3,E7M0", "optimizers": "adamw,adamw_nearest"}),
        ("actor", False, {}),
        ("actor", False, {"scheduler": "asha"} | RATES),
        ("actor", True, {"scheduler": "pbt", "pbt": {"interval": 50}} | RATES),
        ("train", True, {}),
        ("train", False, {}),
        ("train", False, {"scheduler": "asha"} | RATES),
    ],
    ids=["actor-worker", "actor-scheduler", "actor-asha", "actor-pbt", "train-worker", "train-scheduler", "train-asha"],
)
def test_each_signal_ends_its_trial_early_with_its_evidence_in_the_ledger(
    planted: str, tmp_path: Path, executor: Any, worker_guards: bool, pace: dict[str, Any]
) -> None:
    spec = SweepSpec.model_validate(SMALL | pace)
    options = RunOptions(out=tmp_path / "sweep", worker_guards=worker_guards, address=planted, executor=executor)
    result = run_sweep(spec, options)
    assert result.left == 0
    with Ledger(result.out / "ledger.sqlite") as ledger:
        trials, outcomes = ledger.trials(), ledger.outcomes()
        for trial_id, trial in trials.items():
            outcome, folder = outcomes[trial_id], result.out / "trials" / trial_id
            steps = len(ledger.signal(trial_id, "train_loss"))
            assert outcome.step <= steps < outcome.step + 20, (
                "by a worker within the interval, by the scheduler one later"
            )
            if (trial["format"], trial["arm"]) == ("E7M0", "adamw_nearest"):
                assert outcome.kind == "stalled", "of itself, without a planted fault"
            elif trial["format"] != "E4M3":
                assert (outcome.kind, outcome.step) == ("done", STEPS), (trial, outcome)
                continue
            elif trial["arm"] == "adamw":
                kind, signal, layer = EVIDENCE[trial["seed"]]
                assert (outcome.kind, outcome.signal, outcome.layer) == (kind, signal, layer), (trial, outcome)
                assert outcome.first_seen is not None and 24 <= outcome.first_seen <= outcome.step < STEPS
                check_evidence(outcome, folder, ledger.signal(trial_id, "train_loss"))
            else:
                assert outcome.kind == EVIDENCE[trial["seed"]][0], (trial, outcome)
            assert ("stopped by the scheduler" in outcome.message) == (not worker_guards)
            assert (folder / "checkpoint" / "state.pt").exists() == (worker_guards or steps >= 50)


def check_evidence(outcome: Outcome, folder: Path, losses: list[tuple[int, float]]) -> None:
    """The value that ended the trial stands in its record, and is beyond the limit that the ending names."""
    assert outcome.value is not None
    if outcome.signal == "train_loss":
        assert math.isnan(outcome.value) and next(step for step, loss in losses if math.isnan(loss)) == 24
        return
    assert outcome.limit is not None
    name = str(outcome.signal).partition("/")[0]
    rows = [
        row for row in read_layers(folder).to_pylist() if (row["layer"], row["step"]) == (outcome.layer, outcome.step)
    ]
    assert [row["value"] for row in rows if row["signal"] == name] == [outcome.value]
    assert outcome.value < outcome.limit if outcome.kind == "rank_collapse" else outcome.value > outcome.limit
