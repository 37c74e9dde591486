"""When trials are compared while they run: the settings of races and of populations, as a spec holds them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

from altgrad.training.arm_configs import Frozen

Positive = Annotated[FiniteFloat, Field(gt=0)]


class RaceConfig(Frozen):
    """When groups of one cell are compared, and how many go on."""

    first_rung: int | None = Field(
        None,
        ge=1,
        description="steps before the first comparison; null: steps / (reduction + 1), at least one eval_interval",
    )
    reduction: int = Field(2, ge=2, description="a rung lets one group in this many go on; rungs lie this factor apart")
    seeds: int = Field(1, ge=1, description="seeds of each group that race; the others start when it has won")

    def first(self, steps: int, eval_interval: int) -> int:
        """The first rung of a run of `steps`: as asked, or derived."""
        return self.first_rung or max(eval_interval, -(-steps // (self.reduction + 1)))

    def rungs(self, steps: int, eval_interval: int) -> list[int]:
        """The rungs (steps) whose first evaluation comes before the last step, where stopping still saves."""
        found, rung = [], self.first(steps, eval_interval)
        while evaluated_at(rung, eval_interval) < steps:
            found.append(rung)
            rung *= self.reduction
        return found


class PbtConfig(Frozen):
    """Population-based training; see `altgrad.sweep.pace.population`."""

    interval: int | None = Field(
        None,
        ge=1,
        description=(
            "steps from one exchange to the next, a multiple of eval_interval; null: about a fifth of the steps"
        ),
    )
    quantile: float = Field(
        0.25,
        gt=0,
        le=0.5,
        description="share of a population that takes over from as many of the best, one member at least",
    )
    factors: tuple[Positive, ...] = Field(
        (0.8, 1.25), min_length=1, description=("one of them multiplies a value that is taken over")
    )

    def every(self, steps: int, eval_interval: int) -> int:
        """Steps between exchanges: as asked, or derived; a multiple of eval_interval."""
        return self.interval or max(1, round(steps / 5 / eval_interval)) * eval_interval


def evaluated_at(rung: int, eval_interval: int) -> int:
    """The first step at or behind the rung that is evaluated."""
    return -(-rung // eval_interval) * eval_interval
