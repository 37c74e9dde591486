"""Search: configurations sampled from the axes, at random or by what Optuna learns from the results.

A sample is a format, a policy and an arm, then a value for every axis that this choice leaves: define by run, so a
parameter exists only where its arm does. It runs with all the sweep's seeds, and counts as their mean. What a rule or a
constraint leaves out, what is no valid configuration, and what has been sampled before is drawn again.

Random samples are a function of the seed and their number: the same command knows them again, and asking for more
keeps those there are. Optuna's depend on what has ended before; so each is entered in the ledger when it is chosen, and
a study is rebuilt from there: every sample is asked for again with its parameters and, where its trials have ended,
told again. No study is kept elsewhere.

With `scheduler='asha'` a sample may be pruned; Optuna is then told the value it had, as one of a pruned trial.

References run in every setting sampled, where the axes of the setting are lists; where one is a range, no setting
would come twice, and references run in the sweep's own setting only.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from altgrad.sweep.pace.objectives import OBJECTIVES, value_of
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space import expansion
from altgrad.sweep.space.axes import CONDITIONS, Range, is_of_recipe, is_of_setting, is_whole
from altgrad.sweep.space.declaration import Declaration
from altgrad.sweep.space.exclusions import Combination, in_place_of
from altgrad.sweep.space.expansion import Point
from altgrad.training.config import UNQUANTIZED, TrainConfig
from altgrad.training.outcome import OutcomeKind

DEFAULT_SAMPLES = 20
TRIES = 200
"""Draws for one new sample; a space in which none is found is taken for exhausted."""
LED_TRIES = 20
"""Draws left to Optuna before draws at random take their place."""

Choose = Callable[[str, Sequence[Any] | Range], Any]
"""Picks a value of the axis of this name."""


def sample_count(spec: Declaration) -> int:
    """How many samples are asked for."""
    return spec.num_samples or DEFAULT_SAMPLES


def draw(spec: Declaration, choose: Choose) -> Point:
    """One point of the space, whether or not it is left out."""
    formats = [name for name in spec.formats if name != UNQUANTIZED] or list(spec.formats)
    combination = in_place_of(
        Combination(
            choose("format", formats),
            choose("policy", spec.policies),
            choose("optimizer", spec.optimizers),
            expansion.lead(spec),
        ),
        spec.policies,
    )
    setting: dict[str, Any] = {}
    of_setting = [path for path in spec.axes if is_of_setting(path)]
    # What decides whether another is read is drawn before it.
    for path in sorted(of_setting, key=lambda path: path in CONDITIONS):
        if expansion.is_read(spec, setting, path):
            setting[path] = choose(path, spec.axes[path])
    of_recipe: dict[str, Any] = {}
    for path in sorted(filter(is_of_recipe, spec.axes), key=lambda path: path in CONDITIONS):
        if expansion.is_read(spec, of_recipe, path):
            of_recipe[path] = choose(path, spec.axes[path])
    combination = combination._replace(recipe=expansion.recipe_of(spec, of_recipe))
    own = expansion.arm_axes(spec, combination.arm)
    arm = combination.arm
    parameters = {
        field: choose(f"{arm}.{field}" if f"{arm}.{field}" in spec.axes else f"optimizer.{field}", axis)
        for field, axis in own.items()
    }
    return Point(combination, setting, parameters)


def refusal(spec: Declaration, point: Point) -> str | None:
    """Why the point can't be a sample, or None."""
    rule = expansion.excluded(spec, point)
    if rule is not None:
        return rule
    try:
        point.config(spec, 0)
    except ValueError as error:
        return str(error)
    return None


def identity(spec: Declaration, point: Point) -> str:
    """Equal for points that are the same training."""
    return point.config(spec, 0).trial_id("")


def random_points(spec: Declaration) -> Iterator[Point]:
    """The samples in their order, none twice; fewer than asked for where the space has no more."""
    seen: set[str] = set()
    attempt = failures = 0
    while len(seen) < sample_count(spec) and failures < TRIES:
        point = draw(spec, _choose_at_random(random.Random(f"{spec.search_seed}:{attempt}")))
        attempt, failures = attempt + 1, failures + 1
        if refusal(spec, point) is None and (name := identity(spec, point)) not in seen:
            seen.add(name)
            failures = 0
            yield point


def sampled(spec: Declaration) -> list[TrainConfig]:
    """The trials of a search that can be named beforehand: all of a random one, Optuna's references.

    ValueError where no valid configuration is found.
    """
    if spec.search == "random":
        found = list(random_points(spec))
    else:
        found = [point for _, point in zip(range(1), random_points(spec), strict=False)]
    if not found:
        tried = refusal(spec, draw(spec, _choose_at_random(random.Random(f"{spec.search_seed}:0"))))
        raise ValueError(f"{TRIES} draws gave no valid configuration; the first: {tried}")
    if spec.search == "optuna":
        return expansion.trials_of(spec, list(expansion.references(spec, [{}]))) if not varies_setting(spec) else []
    settings = expansion.settings_of(found) if varies_setting(spec) else [{}]
    return expansion.trials_of(spec, [*expansion.references(spec, settings), *found])


def examples(spec: Declaration) -> list[TrainConfig]:
    """Trials as a search by Optuna may choose them, to be looked at beforehand."""
    found = [point for _, point in zip(range(DEFAULT_SAMPLES), random_points(spec), strict=False)]
    return expansion.trials_of(spec.model_copy(update={"seeds": 1}), found)


def varies_setting(spec: Declaration) -> bool:
    """Whether samples have settings of their own that come again, so that each deserves a reference."""
    axes = [axis for path, axis in spec.axes.items() if is_of_setting(path)]
    return bool(axes) and not any(isinstance(axis, Range) for axis in axes)


def search_id(spec: Declaration) -> str:
    """Names the space and what is looked for in it; more samples, seeds or steps belong to the same search."""
    kept = {
        name: value
        for name, value in (spec.model_dump(mode="json") | spec.base.model_dump(mode="json")).items()
        if name
        in (
            "task",
            "formats",
            "optimizers",
            "policies",
            "lrs",
            "rung_clip",
            "axes",
            "constraints",
            "search",
            "objectives",
            "search_seed",
            "model",
            "data",
            "schedule",
            "clip_grad_norm",
            "interventions",
        )
    }
    if not spec.base.recipe.is_plain:
        kept["recipe"] = spec.base.recipe.model_dump(mode="json")
    kept["data"] = {name: value for name, value in kept["data"].items() if name not in ("source", "revision")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


class OptunaSearch:
    """A study over the sweep's space, its memory in the ledger.

    `propose` hands out one new sample's trials at a time, `ended` is called when one of them has ended. `trials` are
    all that have been handed out, by id, in this and earlier runs.
    """

    def __init__(self, spec: Declaration, data_sha256: str, ledger: Ledger) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._spec, self._sha256, self._ledger = spec, data_sha256, ledger
        self._name = f"{search_id(spec)}-{data_sha256[:12]}"
        sampler = optuna.samplers.TPESampler(seed=spec.search_seed, multivariate=True, constant_liar=True)
        directions = [OBJECTIVES[name].direction for name in spec.objectives]
        self.study = optuna.create_study(directions=directions, sampler=sampler)
        self.trials: dict[str, TrainConfig] = {}
        self._open: dict[int, tuple[Any, dict[str, TrainConfig]]] = {}
        """sample -> Optuna's trial, ours that are to end"""
        self._seen: dict[str, int] = {}
        self._count = 0
        self._is_exhausted = False
        for params in ledger.samples(self._name):
            self._replay(params)

    def propose(self) -> dict[str, TrainConfig] | None:
        """The trials of a new sample, recorded; None where enough were sampled, or the space has no more."""
        if self._count >= sample_count(self._spec) or self._is_exhausted:
            return None
        for _ in range(LED_TRIES):
            trial, point = self._ask()
            if self._is_new(point):
                return self._chosen(trial, point)
            if refusal(self._spec, point) is not None:
                self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._tell_again(trial, self._seen[identity(self._spec, point)])
        # What it learned keeps leading to what is left out or known: look elsewhere.
        for attempt in range(TRIES):
            params, point = self._elsewhere(attempt)
            if self._is_new(point):
                self.study.enqueue_trial(params)
                return self._chosen(*self._ask())
        self._is_exhausted = True
        return None

    @property
    def planned(self) -> int:
        """Trials still to be proposed, as far as is known."""
        return 0 if self._is_exhausted else max(0, sample_count(self._spec) - self._count) * self._spec.seeds

    def ended(self, trial_id: str) -> None:
        """One of the trials has come to an ending that is in the ledger; its sample is told when all have."""
        for number, (_, own) in list(self._open.items()):
            if trial_id in own:
                self._tell(number)

    def close(self) -> None:
        """Nothing stays open: what has not ended is told as failed. The ledger knows it for the next run."""
        for trial, _ in self._open.values():
            self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        self._open.clear()

    def _replay(self, params: Mapping[str, Any]) -> None:
        self.study.enqueue_trial(dict(params))
        trial, point = self._ask()
        self._admit(trial, point)
        number = self._count - 1
        if not self._ledger.remaining(self._open[number][1]):
            self._tell(number)

    def _ask(self) -> tuple[Any, Point]:
        trial = self.study.ask()

        def choose(name: str, axis: Sequence[Any] | Range) -> Any:
            if not isinstance(axis, Range):
                return axis[trial.suggest_categorical(name, list(range(len(axis))))]
            if is_whole(name):
                step = {} if axis.log else {"step": int(axis.step or 1)}
                return trial.suggest_int(name, math.ceil(axis.low), math.floor(axis.high), log=axis.log, **step)
            return trial.suggest_float(name, axis.low, axis.high, log=axis.log, step=axis.step)

        return trial, draw(self._spec, choose)

    def _is_new(self, point: Point) -> bool:
        return refusal(self._spec, point) is None and identity(self._spec, point) not in self._seen

    def _chosen(self, trial: Any, point: Point) -> dict[str, TrainConfig]:
        """Enters the sample; its trials, and those of a reference that nobody had needed before."""
        known = set(self.trials)
        self._admit(trial, point)
        self._ledger.add_sample(self._name, self._count - 1, dict(trial.params), self._own(point))
        return {name: config for name, config in self.trials.items() if name not in known}

    def _elsewhere(self, attempt: int) -> tuple[dict[str, Any], Point]:
        """A point drawn at random, with its parameters for the study."""
        chosen: dict[str, Any] = {}
        generator = random.Random(f"{self._spec.search_seed}:{self._count}:{attempt}")

        def choose(name: str, axis: Sequence[Any] | Range) -> Any:
            if isinstance(axis, Range):
                chosen[name] = _from_range(name, axis, generator)
                return chosen[name]
            chosen[name] = generator.randrange(len(axis))
            return axis[chosen[name]]

        point = draw(self._spec, choose)
        return chosen, point

    def _own(self, point: Point) -> list[str]:
        return [config.trial_id(self._sha256) for config in expansion.trials_of(self._spec, [point])]

    def _admit(self, trial: Any, point: Point) -> None:
        spec = self._spec
        beside = list(expansion.references(spec, [point.setting])) if varies_setting(spec) else []
        for config in expansion.trials_of(spec, [*beside, point]):
            self.trials.setdefault(config.trial_id(self._sha256), config)
        own = {name: self.trials[name] for name in self._own(point)}
        self._open[self._count] = trial, own
        self._seen[identity(spec, point)] = trial.number
        self._count += 1

    def _tell(self, number: int) -> None:
        trial, own = self._open[number]
        outcomes = self._ledger.outcomes_of(list(own))
        if set(own) - set(outcomes):
            return
        del self._open[number]
        state = self._optuna.trial.TrialState
        values = [self._mean(own, name) for name in self._spec.objectives]
        told = [value for value in values if value is not None]
        if len(told) < len(values):
            self.study.tell(trial, state=state.FAIL)
        elif any(outcome.kind is OutcomeKind.PRUNED for outcome in outcomes.values()):
            trial.report(told[0], max(outcome.step for outcome in outcomes.values()))
            self.study.tell(trial, state=state.PRUNED)
        else:
            self.study.tell(trial, told)

    def _mean(self, own: Mapping[str, TrainConfig], objective: str) -> float | None:
        """Over the seeds; the worst where one seed failed, None where one has no value.

        Seeds of a pruned sample that were never started say nothing.
        """
        pruned = [
            name
            for name, outcome in self._ledger.outcomes_of(list(own)).items()
            if outcome.kind is OutcomeKind.PRUNED and outcome.step == 0
        ]
        values = [value_of(self._ledger, name, config, objective) for name, config in own.items() if name not in pruned]
        found = [value for value in values if value is not None]
        if len(found) < len(values) or not found:
            return None
        worst = OBJECTIVES[objective].worst
        return worst if worst in found else math.fsum(found) / len(found)

    def _tell_again(self, trial: Any, number: int) -> None:
        """A configuration that was sampled before is worth what it was, as far as that is known."""
        before = self.study.trials[number]
        if before.state is self._optuna.trial.TrialState.COMPLETE:
            self.study.tell(trial, before.values)
        else:
            self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def _choose_at_random(generator: random.Random) -> Choose:
    def choose(name: str, axis: Sequence[Any] | Range) -> Any:
        return _from_range(name, axis, generator) if isinstance(axis, Range) else generator.choice(axis)

    return choose


def _from_range(name: str, axis: Range, generator: random.Random) -> Any:
    low, high = axis.low, axis.high
    if axis.step is not None:
        value = low + axis.step * generator.randint(0, int((high - low) / axis.step))
    elif axis.log:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return min(math.floor(high), max(math.ceil(low), round(value))) if is_whole(name) else min(high, max(low, value))
