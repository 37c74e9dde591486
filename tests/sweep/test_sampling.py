"""A search samples valid configurations only, none twice, knows its samples again, and leaves nothing running."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from altgrad.sweep.pace.growth import Growth
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.sampling import OptunaSearch
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import Outcome, OutcomeKind

SHA = "a" * 64
SPACE = {
    "formats": ("E5M2", "E3M4"),
    "optimizers": ("adamw", "grid", "manifold"),
    "seeds": 2,
    "axes": {
        "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "optimizer.rung_clip": {"low": 1, "high": 10},
        "optimizer.precondition": ["update", "gradient"],
        "data.batch": {"low": 2, "high": 8, "step": 2},
        "schedule.kind": ["constant", "wsd"],
        "schedule.decay_fraction": {"low": 0.1, "high": 0.5},
    },
    "constraints": [{"name": "slow", "when": {"optimizer.lr": {"low": 5e-3}, "format": "E3M4"}}],
}


def spec(search: str, **changes: object) -> SweepSpec:
    return SweepSpec.model_validate(SPACE | {"search": search} | changes)


def check_in_space(config: TrainConfig) -> None:
    assert 1e-4 <= config.optimizer.lr <= 1e-2 and not (config.format == "E3M4" and config.optimizer.lr >= 5e-3)
    assert config.data.batch in (2, 4, 6, 8)
    assert config.schedule.kind == "wsd" or config.schedule.decay_fraction == 0.2
    assert TrainConfig.model_validate(config.model_dump()) == config
    if config.optimizer.kind == "grid":
        assert 1 <= config.optimizer.rung_clip <= 10


def test_random_samples_are_valid_paired_known_again_and_go_on() -> None:
    trials = [trial for trial in spec("random", num_samples=30).expand() if not trial.is_reference]
    assert len(trials) == 30 * 2
    for first, second in zip(trials[::2], trials[1::2], strict=True):
        check_in_space(first)
        assert (first.seed, second.seed) == (0, 1) and first == second.model_copy(update={"seed": 0})
    more = spec("random", num_samples=40).expand()
    assert [trial for trial in more if not trial.is_reference][:60] == trials
    assert {trial.optimizer.lr for trial in spec("random", num_samples=30, search_seed=1).expand()} != {
        trial.optimizer.lr for trial in trials
    }
    assert {trial.optimizer.kind for trial in trials} == {"adamw", "grid", "manifold"}


def test_a_small_space_is_sampled_whole_and_no_more() -> None:
    axes = {"optimizer.lr": [1e-3, 2e-3, 3e-3], "data.batch": [2, 4]}
    trials = spec("random", axes=axes, num_samples=50, formats="E5M2", optimizers="grid").expand()
    assert Counter(trial.is_reference for trial in trials) == {False: 3 * 2 * 2, True: 2 * 2}


def end(ledger: Ledger, trial_id: str, config: TrainConfig, value: float | None, **other: float) -> None:
    """A trial's ending: None for a fault, else its validation loss; one that is no number is stopped by a guard."""
    if value is None:
        ledger.record_outcome(trial_id, Outcome(kind=OutcomeKind.BUG, step=0, message="planted"))
        return
    ledger.record_rows(trial_id, [{"step": config.steps, "val_loss": value, **other}])
    if math.isfinite(value):
        ledger.record_outcome(trial_id, Outcome(kind=OutcomeKind.DONE, step=config.steps, val_loss=value))
    else:
        ledger.record_outcome(trial_id, Outcome(kind=OutcomeKind.NONFINITE, step=50, signal="train_loss"))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def sample(
    search: OptunaSearch, ledger: Ledger, value: Callable[[int, TrainConfig], float | None], most: int = 1000
) -> list[dict[str, TrainConfig]]:
    """Proposes and ends up to `most` samples."""
    found: list[dict[str, TrainConfig]] = []
    while len(found) < most and (new := search.propose()) is not None:
        ledger.add_trials(new, SHA)
        for name, config in new.items():
            end(ledger, name, config, value(len(found), config))
            search.ended(name)
        found.append(new)
    return found


def test_sixty_samples_of_a_conditional_space_are_valid_and_no_nan_leaves_one_running(ledger: Ledger) -> None:
    def value(number: int, config: TrainConfig) -> float | None:
        if number % 10 == 3:
            return None
        return math.nan if number % 5 == 0 and config.seed == 1 else abs(math.log(config.optimizer.lr / 1e-3))

    search = OptunaSearch(spec("optuna", num_samples=60), SHA, ledger)
    found = sample(search, ledger, value)
    assert len(found) == 60 and all(len(group) == 2 for group in found)
    for group in found:
        check_in_space(next(iter(group.values())))
    assert len({name for group in found for name in group}) == 120, "no trial twice"
    assert {trial.state for trial in search.study.trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    complete = [trial.value for trial in search.study.trials if trial.state is TrialState.COMPLETE]
    assert len(complete) == 54 and complete.count(1e3) == 12 and search.study.best_value < 0.5


def test_a_restart_knows_every_sample_again_tells_what_ended_and_goes_on(ledger: Ledger) -> None:
    asked = spec("optuna", num_samples=12)
    first = OptunaSearch(asked, SHA, ledger)
    sample(first, ledger, lambda number, config: float(number), most=6)
    open_ = first.propose()
    assert open_ is not None
    ledger.add_trials(open_, SHA)

    again = OptunaSearch(asked, SHA, ledger)
    assert again.trials == first.trials and again.planned == 5 * 2
    assert Counter(t.state for t in again.study.trials) == {TrialState.COMPLETE: 6, TrialState.RUNNING: 1}
    assert [t.values for t in again.study.trials[:6]] == [[float(i)] for i in range(6)]
    for name, config in open_.items():
        end(ledger, name, config, 1.0)
        again.ended(name)
    assert len(sample(again, ledger, lambda number, config: 2.0)) == 5
    assert OptunaSearch(asked, SHA, ledger).propose() is None
    more = OptunaSearch(spec("optuna", num_samples=14, seeds=3), SHA, ledger)
    assert len(more.trials) == 12 * 3 and more.planned == 2 * 3
    assert Counter(t.state for t in more.study.trials) == {TrialState.RUNNING: 12}, "each has a seed to run"
    more.close()
    assert not any(trial.state is TrialState.RUNNING for trial in more.study.trials)
    other = OptunaSearch(spec("optuna", formats="E5M2"), SHA, ledger)
    assert other.trials == {}, "another space is another search"


def test_two_objectives_are_told_together_and_an_unmeasured_one_fails(ledger: Ledger) -> None:
    asked = spec("optuna", objectives="val_loss,flip_yield", num_samples=3)
    search = OptunaSearch(asked, SHA, ledger)
    for number, other in enumerate(({"flip_yield": 0.5}, {}, {"flip_yield": math.nan})):
        new = search.propose()
        assert new is not None
        ledger.add_trials(new, SHA)
        for name, config in new.items():
            end(ledger, name, config, 2.0 + config.seed, **other)
            search.ended(name)
        state = search.study.trials[-1]
        assert state.values == [[2.5, 0.5], None, [2.5, 0.0]][number]
    assert [str(direction.name) for direction in search.study.directions] == ["MINIMIZE", "MAXIMIZE"]


def test_a_finite_space_ends_when_it_is_exhausted_and_settings_have_references(ledger: Ledger) -> None:
    axes = {"optimizer.lr": [1e-3, 2e-3], "data.batch": [2, 4]}
    asked = spec("optuna", axes=axes, formats="E5M2", optimizers="grid", num_samples=20)
    search = OptunaSearch(asked, SHA, ledger)
    found = sample(search, ledger, lambda number, config: 2.0)
    assert len(found) == 4 and search.planned == 0
    assert Counter(trial.is_reference for trial in search.trials.values()) == {False: 4 * 2, True: 2 * 2}


def test_what_a_grid_has_run_in_the_same_folder_is_told_and_not_run_again(ledger: Ledger) -> None:
    axes = {"optimizer.lr": [1e-3, 2e-3]}
    grid = SweepSpec.model_validate(SPACE | {"axes": axes, "formats": "E5M2", "optimizers": "grid"}).trials(SHA)
    ledger.add_trials(grid, SHA)
    for name, config in grid.items():
        end(ledger, name, config, config.optimizer.lr)
    search = OptunaSearch(spec("optuna", axes=axes, formats="E5M2", optimizers="grid"), SHA, ledger)
    growth = Growth(search, ledger, grid, lambda new: ledger.add_trials(new, SHA))
    assert growth.more() == {}
    assert {t.value for t in search.study.trials if t.state is TrialState.COMPLETE} == {1e-3, 2e-3}
