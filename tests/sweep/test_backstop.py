"""Inside Ray Tune, planted faults end by name: by the worker with its checkpoint, or by the scheduler without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from planting import planted_path
from ray.cluster_utils import Cluster

from altgrad.sweep.options import RunOptions
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.run import run_sweep
from altgrad.sweep.space.spec import SweepSpec

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


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Ray whose workers plant a fault in every E4M3 trial, by its seed."""
    path = planted_path(tmp_path_factory.mktemp("planted"), PLANT, FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 200_000_000})
    yield started.address
    started.shutdown()


SMALL = {
    "steps": 100,
    "eval_interval": 100,
    "checkpoint_interval": 100,
    "data": {"batch": 4, "eval_batches": 1},
    "model": {"layers": 2, "heads": 2, "width": 32, "block": 64},
}
EXPECTED = {0: "nonfinite", 1: "rank_collapse", 2: "stalled"}
LAYERS = {1: "lm_head", 2: "transformer.h.1.mlp.c_fc"}


@pytest.mark.slow
@pytest.mark.parametrize("worker_guards", [True, False], ids=["worker", "scheduler"])
def test_planted_faults_end_by_name_inside_ray(planted: str, tmp_path: Path, worker_guards: bool) -> None:
    spec = SweepSpec.model_validate({"formats": "E4M3,E7M0", "optimizers": "adamw,adamw_nearest", "seeds": 3} | SMALL)
    result = run_sweep(spec, RunOptions(out=tmp_path / "sweep", worker_guards=worker_guards, address=planted))
    assert result.left == 0
    with Ledger(result.out / "ledger.sqlite") as ledger:
        trials, outcomes = ledger.trials(), ledger.outcomes()
    for trial_id, trial in trials.items():
        outcome = outcomes[trial_id]
        kind = EXPECTED[trial["seed"]] if trial["format"] == "E4M3" else "done"
        if (trial["format"], trial["arm"]) == ("E7M0", "adamw_nearest"):
            kind = "stalled"
        assert outcome.kind == kind, (trial, outcome)
        assert ("stopped by the scheduler" in outcome.message) == (kind != "done" and not worker_guards)
        if kind != "done":
            has_checkpoint = (result.out / "trials" / trial_id / "checkpoint" / "state.pt").exists()
            assert has_checkpoint == worker_guards
            assert outcome.step < 100
        if trial["format"] == "E4M3" and trial["arm"] == "adamw" and trial["seed"] in LAYERS:
            assert outcome.layer == LAYERS[trial["seed"]]


@pytest.mark.slow
def test_planted_faults_end_by_name_under_ray_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scheduler; that workers of Ray Train keep guards themselves is seen in test_train_executor."""
    monkeypatch.setenv("PYTHONPATH", planted_path(tmp_path, PLANT, FAULTS))
    spec = SweepSpec.model_validate({"formats": "E4M3", "optimizers": "adamw", "seeds": 3} | SMALL)
    result = run_sweep(spec, RunOptions(out=tmp_path / "sweep", worker_guards=False, executor="train"))
    assert result.left == 0
    with Ledger(result.out / "ledger.sqlite") as ledger:
        trials, outcomes = ledger.trials(), ledger.outcomes()
    for trial_id, trial in trials.items():
        outcome, seed = outcomes[trial_id], trial["seed"]
        assert outcome.kind == (EXPECTED[seed] if trial["format"] == "E4M3" else "done"), (trial, outcome)
        if trial["format"] == "E4M3":
            assert "stopped by the scheduler" in outcome.message
            assert not (result.out / "trials" / trial_id / "checkpoint" / "state.pt").exists()
            assert seed not in LAYERS or outcome.layer == LAYERS[seed]
