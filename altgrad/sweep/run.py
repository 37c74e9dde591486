"""From a spec to a ledger that lacks nothing: check, own the folder, find what is left, run it.

Everything that can be wrong is found before Ray starts and before the folder is touched. Then the ledger
takes in what earlier drivers left, and only what it still lacks goes to Ray. If that is nothing, Ray is not
even imported, so asking again for a finished sweep costs seconds. Interrupting at any moment, politely or
with kill -9, loses at most the steps since the last checkpoints: the same command goes on from there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altgrad.quantization import check_policy
from altgrad.sweep.engine.environment import check_environment, set_ray_environment
from altgrad.sweep.options import RunOptions
from altgrad.sweep.pace.growth import Growth
from altgrad.sweep.pace.pace import Pace
from altgrad.sweep.pace.pooled import PooledRace
from altgrad.sweep.pace.population import Population
from altgrad.sweep.pace.racing import Race
from altgrad.sweep.record.budget import Meter
from altgrad.sweep.record.folder import check_folder, check_ledger, manifest, owned
from altgrad.sweep.record.ledger import Ledger, is_settled
from altgrad.sweep.record.progress import Progress, ending_name
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.record.references import references
from altgrad.sweep.space.sampling import OptunaSearch, examples
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import TrainConfig
from altgrad.training.data import NAMED, Corpus, Documents
from altgrad.training.devices import gpu_count
from altgrad.training.guards import check_layers
from altgrad.training.outcome import RESULT_KINDS, Outcome, OutcomeKind
from altgrad.training.record import write_json
from altgrad.training.tasks import build_task


@dataclass(frozen=True)
class SweepResult:
    """What stands in the ledger after a run, over the trials of the spec."""

    out: Path
    trials: int
    ran: int
    left: int
    endings: Counter[str]
    broken: str | None
    """what ended the sweep early, where something did"""
    over_budget: str | None = None
    """the cap that was reached, in words"""
    outdated: int = 0
    """trials of an older numerics version in the same ledger, which nothing here counts"""


def preflight(spec: SweepSpec) -> Corpus | Documents:
    """The data, once they are known to serve the model. Raises ValueError."""
    # Seeds differ in nothing that the data must serve: one of each stands for all.
    one = spec.model_copy(update={"seeds": 1})
    trials = [*one.expand(), *(examples(one) if spec.search == "optuna" else ())]
    for trial in trials:
        if TrainConfig.model_validate_json(trial.model_dump_json()) != trial:
            raise ValueError(f"{type(trial.optimizer).__name__} of this program does not reach a sweep's workers whole")
    settings: dict[Any, list[TrainConfig]] = {}
    for trial in trials:
        settings.setdefault((trial.model, trial.data), []).append(trial)
    tasks = [build_task(own[0]) for own in settings.values()]
    for task, own in zip(tasks, settings.values(), strict=True):
        task.check()
        recipes = {trial.precision for trial in own if trial.recipe.rules}
        names_layers = any("/" in rule.signal for rule in spec.base.guards)
        if names_layers or recipes:
            model = task.build()
            check_layers(spec.base.guards, model)
            for recipe in recipes:
                try:
                    check_policy(model, recipe)
                except ValueError as error:
                    raise ValueError(f"recipe.rules: {error}") from None
    return tasks[0].data


def run_sweep(spec: SweepSpec, options: RunOptions) -> SweepResult:
    """Runs what the ledger in `options.out` lacks of the spec.

    Raises ValueError for unusable data and FolderError for an unusable folder, before anything is
    changed; ConnectionError where no Ray cluster answers at the address, SpecError where the sweep can't
    run on it. A trial's own failure raises nothing: it is an outcome.
    """
    if options.address == "local":
        options = options.settled(gpu_count())
    options.check(spec)
    corpus = preflight(spec)
    check_folder(options.out, fresh=options.fresh)
    anchored = spec.with_data(
        source=anchor(spec.base.data.source), revision=corpus.provenance.get("revision", spec.base.data.revision)
    )
    trials = anchored.trials(corpus.sha256)
    if spec.search == "optuna" or _is_any_left(trials, options):
        check_environment(options.address)
        set_ray_environment()
        if options.address != "local":
            from altgrad.sweep.engine.driver import reach

            options, notes = reach(options)
            for note in notes:
                print(note, flush=True)
    with owned(options.out, fresh=options.fresh) as out, Ledger(out / "ledger.sqlite") as ledger:
        ledger.suit_file_system()
        search = OptunaSearch(anchored, corpus.sha256, ledger) if spec.search == "optuna" else None
        provenance = {
            "spec": spec.model_dump(mode="json"),
            **manifest(),
            "data": {
                "source": spec.base.data.source,
                "sha256": corpus.sha256,
                "description": corpus.describe(),
                "notes": corpus.notes,
                **({"hub": dict(corpus.provenance)} if corpus.provenance else {}),
            },
        }

        def admit(new: Mapping[str, TrainConfig]) -> None:
            trials.update(new)
            write_json(out / "sweep.json", provenance | {"trials": list(trials)})
            ledger.add_trials(new, corpus.sha256)

        admit(trials if search is None else trials | search.trials)

        def drops(trial_id: str, outcome: Outcome) -> bool:
            config = trials.get(trial_id)
            return options.keep_checkpoints == "none" and config is not None and is_settled(outcome, config)

        recorder = Recorder(ledger, out / "trials", drops=drops)
        recorder.ingest(ledger.trials())
        left = ledger.remaining(trials)
        growth = None if search is None else Growth(search, ledger, trials, admit)
        if growth is not None and not left:
            left = growth.more()
        before = len(trials) - len(left)
        meter = Meter(options.budget, ledger, options.gpus * options.workers_per_trial)
        broken = None
        if left and not meter.exceeded:
            broken = _drive(anchored, options, trials, left, recorder, corpus.text_sha256, growth, meter)
        unfinished = ledger.remaining(trials)
        over_budget = meter.exceeded if unfinished else None
        if over_budget:
            _end_by_budget(ledger, unfinished, over_budget)
        outcomes = ledger.outcomes()
        return SweepResult(
            out,
            len(trials),
            len(trials) - before,
            len(unfinished),
            Counter(ending_name(outcomes[trial_id]) if trial_id in outcomes else "unfinished" for trial_id in trials),
            broken,
            over_budget,
            len(ledger.outdated()),
        )


def _end_by_budget(ledger: Ledger, unfinished: Mapping[str, TrainConfig], reason: str) -> None:
    known, counts = ledger.outcomes(), ledger.row_counts()
    for trial_id in unfinished:
        if trial_id not in known or known[trial_id].kind is not OutcomeKind.BUG:
            ledger.record_outcome(trial_id, Outcome(OutcomeKind.BUDGET, counts.get(trial_id, 0), message=reason))


def anchor(source: str) -> str:
    """The data source as workers can find it: an absolute path or glob, where it names files."""
    path = Path(source)
    is_files = source not in NAMED and (path.exists() or any(mark in source for mark in "*?["))
    return str(path.absolute()) if is_files else source


def _is_any_left(trials: Mapping[str, TrainConfig], options: RunOptions) -> bool:
    """Whether Ray will be needed, as far as can be seen without touching the folder."""
    path = options.out / "ledger.sqlite"
    if options.fresh or not check_ledger(path, math.inf):
        return True
    with Ledger(path) as ledger:
        return bool(ledger.remaining(trials))


def _drive(
    spec: SweepSpec,
    options: RunOptions,
    trials: Mapping[str, TrainConfig],
    left: dict[str, TrainConfig],
    recorder: Recorder,
    text_sha256: str,
    growth: Growth | None,
    meter: Meter,
) -> str | None:
    pace = _pace(spec, trials, recorder)
    set_ray_environment()
    with Progress(left, len(trials), to_come=0 if growth is None else growth.planned) as progress:
        from altgrad.sweep.engine.driver import drive

        try:
            return drive(
                left,
                recorder,
                progress,
                pace,
                against=references(trials),
                options=options,
                text_sha256=text_sha256,
                growth=growth,
                meter=meter,
            )
        finally:
            if growth is not None:
                growth.close()


def _pace(spec: SweepSpec, trials: Mapping[str, TrainConfig], recorder: Recorder) -> Pace:
    """What paces the trials, as it stands after what the ledger already holds."""
    if spec.scheduler == "none":
        return Pace()
    if spec.scheduler == "pbt":
        return Population(trials, spec, recorder.ledger, recorder.folder)
    race: Pace
    if spec.search == "optuna":
        race = PooledRace(spec.race, spec.base.steps, spec.base.eval_interval)
        race.admit(trials)
    else:
        race = Race(trials, spec.race, pooled=spec.search == "random")
    outcomes = recorder.ledger.outcomes()
    for trial_id in trials:
        for step, loss in recorder.ledger.scores(trial_id):
            race.observe(trial_id, step, loss)
    for trial_id in trials:
        outcome = outcomes.get(trial_id)
        if outcome is not None and outcome.kind in RESULT_KINDS:
            race.ended(trial_id, outcome.kind, outcome.step)
    return race
