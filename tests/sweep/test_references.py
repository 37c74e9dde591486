"""Every trial is held against the BF16 run of its own setting, and starts when that has ended."""

import json
from pathlib import Path

from ray.tune.search import Searcher

from altgrad.sweep.engine.executors import read_reference
from altgrad.sweep.pace.queue import TrialQueue
from altgrad.sweep.record.references import references
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.outcome import Outcome, OutcomeKind
from altgrad.training.record import write_json

SPEC = SweepSpec(formats=("FP32", "E5M2"), optimizers=("adamw", "grid_literal"), lrs=(1e-3, 4e-3), seeds=2)
TRIALS = SPEC.trials("0" * 64)


def test_the_reference_has_the_seed_and_the_nearest_learning_rate() -> None:
    found = references(TRIALS)
    for trial_id, config in TRIALS.items():
        assert (trial_id in found) == (not config.is_reference)
        if trial_id in found:
            reference = TRIALS[found[trial_id]]
            assert (reference.format, reference.arm, reference.seed) == ("BF16", "adamw", config.seed)
            lr = 4e-3 if config.arm == "grid_literal" else config.optimizer.lr
            assert reference.optimizer.lr == lr


def test_without_a_bf16_run_there_is_no_reference() -> None:
    alone = {trial_id: config for trial_id, config in TRIALS.items() if config.format != "BF16"}
    assert references(alone) == {}


def test_the_queue_keeps_its_order_and_holds_back_what_waits() -> None:
    requests = {name: {"trial_id": name} for name in "abcd"}
    queue = TrialQueue(requests, {"c": "a", "d": "z"})
    assert [queue.suggest(f"t{i}") for i in range(3)] == [{"trial": requests[name]} for name in "abd"]
    assert queue.suggest("t3") is None
    queue.on_trial_complete("t1")
    assert queue.suggest("t3") is None
    queue.on_trial_complete("t0", error=True)
    assert queue.suggest("t3") == {"trial": requests["c"]}
    assert queue.suggest("t4") is None, "one that runs may come back to go on"
    for name in ("t2", "t3"):
        queue.on_trial_complete(name)
    assert queue.suggest("t4") == Searcher.FINISHED


def test_only_a_reference_that_ran_to_its_end_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    row = {"step": 5, "train_loss": 2.0, "layers": {"a": {"stable_rank": 2.0, "spectral_norm": 1.0}}}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert read_reference(tmp_path, "r") is None and read_reference(tmp_path, "") is None
    write_json(folder / "outcome.json", Outcome(OutcomeKind.NONFINITE, 5).to_dict())
    assert read_reference(tmp_path, "r") is None
    write_json(folder / "outcome.json", Outcome(OutcomeKind.DONE, 5).to_dict())
    curve = read_reference(tmp_path, "r")
    assert curve is not None and (curve.loss(5), curve.loss(6)) == (2.0, None)
    numbers = curve.ranks(5, "a")
    assert numbers is not None and tuple(numbers) == (2.0, 1.0) and curve.ranks(5, "b") is None


def test_of_several_at_one_rate_it_is_the_one_with_the_trials_own_values() -> None:
    spec = SweepSpec.model_validate(
        {
            "formats": "E5M2",
            "optimizers": "adamw,grid",
            "seeds": 1,
            "axes": {"optimizer.beta2": [0.9, 0.99], "optimizer.weight_decay": [0.0, 0.1]},
        }
    )
    trials = spec.trials("a" * 64)
    found = references(trials)
    assert len(found) == 8
    for trial, reference in found.items():
        ours, theirs = trials[trial].optimizer, trials[reference].optimizer
        assert (ours.beta2, ours.weight_decay) == (theirs.beta2, theirs.weight_decay)
