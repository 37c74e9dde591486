"""The sweep as a value: axes, replicates and rules, from which the list of trials follows.

A `SweepSpec` is a product of formats, policies, arms and their parameters, repeated over paired seeds: seed k
means the same initial weights and the same batches in every cell, so cells are compared by paired
differences. A spec that exists is valid as a whole: every trial in it has been built and checked.

Three things are not a plain product. The references (BF16 AdamW, and FP32 AdamW where FP32 is asked for) do
not depend on the policy; they stand first, so that every later result has something to be compared with.
`rung_clip` multiplies only the arms that have rungs. And combinations that cannot mean anything are left out
by a named rule and counted (`exclusions`), so that nothing disappears silently.

The members of a seed group (one cell and one set of parameters, all seeds) are adjacent: they run at about
the same time, which is what racing groups against each other needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from altgrad.quantization import POLICIES
from altgrad.sweep.space import expansion, populations, tune_space
from altgrad.sweep.space.axes import Range
from altgrad.sweep.space.declaration import Declaration
from altgrad.sweep.space.exclusions import Exclusion
from altgrad.sweep.space.pacing import evaluated_at
from altgrad.sweep.space.sampling import sampled
from altgrad.training.arm_configs import ARMS
from altgrad.training.catalogue import SIGNALS
from altgrad.training.config import TrainConfig
from altgrad.training.rules import RULES as UPDATES


class SweepSpec(Declaration):
    """A whole sweep; its defaults are the quick preset. Unknown keys are errors."""

    @model_validator(mode="after")
    def _settings_go_together(self) -> SweepSpec:
        check_together(self)
        return self

    @model_validator(mode="after")
    def _every_trial_is_valid(self) -> SweepSpec:
        # Seeds differ in nothing else: one of each stands for all.
        if not self.model_copy(update={"seeds": 1}).expand() and self.search == "grid":
            names = ", ".join(rule.name for rule in self.constraints)
            raise ValueError(f"constraints: nothing is left to run by {names}")
        return self

    @model_validator(mode="after")
    def _a_race_is_held(self) -> SweepSpec:
        if self.scheduler == "asha" and not self.race.rungs(self.base.steps, self.base.eval_interval):
            rung = self.race.first(self.base.steps, self.base.eval_interval)
            raise ValueError(
                f"scheduler='asha' with steps={self.base.steps} would compare nothing: the first rung, at step {rung} "
                f"(race.first_rung), is evaluated at step {evaluated_at(rung, self.base.eval_interval)} "
                f"(eval_interval={self.base.eval_interval}); more steps than that are expected"
            )
        return self

    def changed(self, **values: Any) -> SweepSpec:
        """The sweep with other values, of its own fields or of those that all trials share; checked anew."""
        return SweepSpec.model_validate(dict(self) | values)

    def with_data(self, **where: Any) -> SweepSpec:
        """The sweep with these fields of its data, which say where it lies."""
        data = self.base.data.model_copy(update=where)
        return self.model_copy(update={"base": self.base.model_copy(update={"data": data})})

    def expand(self) -> list[TrainConfig]:
        """Every trial that can be named beforehand, once: references first, then cells with their seeds adjacent.

        A search by Optuna chooses as it goes: only its references are here.
        """
        return expansion.expand(self) if self.search == "grid" else sampled(self)

    def trials(self, data_sha256: str) -> dict[str, TrainConfig]:
        """The trials by id, in the order in which they run."""
        if self.scheduler == "pbt":
            return populations.named(self, self.expand(), data_sha256)
        return {config.trial_id(data_sha256): config for config in self.expand()}

    def param_space(self) -> dict[str, Any]:
        """The sweep as a search space of Ray Tune, nested as a trial is: see `tune_space`."""
        return tune_space.param_space(self)

    def trial_of(self, config: Mapping[str, Any]) -> TrainConfig | None:
        """The trial of one configuration of `param_space`; None where a named rule leaves it out."""
        return tune_space.trial_of(self, config)

    def exclusions(self) -> list[Exclusion]:
        """What the product of a grid's axes would hold and `expand` leaves out, by rule."""
        return expansion.exclusions(self) if self.search == "grid" else []


def check_together(spec: SweepSpec) -> None:
    """ValueError where two of the sweep's settings exclude each other, or one means something in this program only."""
    POLICIES.check_own("policies", spec.policies)
    ARMS.check_own("optimizers", spec.optimizers)
    UPDATES.check_own("optimizers", (kind for name in spec.optimizers if (kind := ARMS[name].kind) in UPDATES))
    rules = [*spec.base.guards, *(rule for one in spec.base.interventions for rule in getattr(one, "rules", ()))]
    SIGNALS.check_own("guards", (rule.signal.partition("/")[0] for rule in rules))
    ranges = [path for path, axis in spec.axes.items() if isinstance(axis, Range)]
    if spec.search == "grid":
        if ranges:
            raise ValueError(
                f"axes: {ranges[0]}: a range can't be enumerated; with search='grid' a list is expected, "
                "ranges are for random and optuna"
            )
        if spec.num_samples is not None:
            raise ValueError(
                f"num_samples={spec.num_samples} belongs to search='random' or 'optuna'; a grid runs whole"
            )
    for old, path in (("lrs", "optimizer.lr"), ("rung_clip", "optimizer.rung_clip")):
        if getattr(spec, old) and path in spec.axes:
            raise ValueError(f"axes: {path}: {old} is the same axis; one of them, please")
    if spec.settled_lrs:
        _check_settled(spec)
    if spec.objectives != ("val_loss",) and spec.search != "optuna":
        raise ValueError(f"objectives={','.join(spec.objectives)} belongs to search='optuna'")
    if len(spec.objectives) > 1 and spec.scheduler == "asha":
        raise ValueError(f"scheduler='asha' with objectives={','.join(spec.objectives)}: a race compares one number")
    if "data.tokenizer" in spec.axes and spec.search != "grid" and "val_loss" in spec.objectives:
        raise ValueError("objectives: 'val_loss' can't compare tokenizers (nats per token); bits_per_byte can")
    if spec.scheduler == "pbt":
        _check_pbt(spec)


def _check_settled(spec: SweepSpec) -> None:
    if spec.search != "grid" or spec.scheduler != "none":
        raise ValueError("settled_lrs: each cell has one rate; with search='grid' and scheduler='none' only")
    other = "lrs" if spec.lrs else next((path for path in spec.axes if path.endswith(".lr")), None)
    if other is not None:
        raise ValueError(f"settled_lrs: {other} says the same; one of them, please")
    lacks = [point for point in expansion.whole(spec) if expansion.settled_lr(spec, point) is None]
    if lacks:
        named = ", ".join(f"{point.format} {point.arm} {point.policy}" for point in lacks[:3])
        raise ValueError(f"settled_lrs: no rate for {named}{f' and {len(lacks) - 3} more' if lacks[3:] else ''}")


def _check_pbt(spec: SweepSpec) -> None:
    if spec.search != "grid":
        raise ValueError(f"scheduler='pbt' with search={spec.search!r}: a population starts from a grid of rates")
    every = spec.exchange_every
    if every % spec.base.eval_interval or every >= spec.base.steps:
        raise ValueError(
            f"pbt.interval={every} is not allowed: a multiple of eval_interval={spec.base.eval_interval} below "
            f"steps={spec.base.steps} is expected"
        )
    if all(len(expansion.population_axes(spec, arm)) < 2 for arm in spec.optimizers):
        raise ValueError("scheduler='pbt': a population has 2 or more members; give lrs, or rung_clip, several values")
