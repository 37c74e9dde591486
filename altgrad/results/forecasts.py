"""What could be known early: flip yield as a forecast, the original's alarms, guards and races replayed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest, rankdata

from altgrad.analysis.cells import Cell, is_narrow
from altgrad.analysis.inference import t_interval
from altgrad.analysis.records import FAILED, FINISHED
from altgrad.analysis.tables import DASH, Table
from altgrad.analysis.wording import counted
from altgrad.results.evidence import Evidence
from altgrad.sweep.pace.racing import Race
from altgrad.sweep.space.pacing import RaceConfig
from altgrad.training.arm_configs import ARMS
from altgrad.training.config import TrainConfig
from altgrad.training.outcome import OutcomeKind

EARLY = 0.15
"""Share of the steps after which a run's end is forecast."""
WINDOW = 10
"""Last steps of that share whose training loss is averaged."""
RESAMPLES = 2000
FAILING = 0.10
"""Above BF16 of its seed from which on a run counts as bad."""
USEFUL = 0.8
"""Sensitivity and specificity that an alarm needs."""
LEAST_RUNS = 10
"""Bad runs, and others, from which on an alarm is judged."""
CUT = 0.1
"""Share of the decided cells whose settled rate a race may cut."""
HARMLESS, HARMFUL = 0.10, 0.05
"""Shares of wrong stops: surely below the first guards do no harm, surely above the second they do."""
ALARMS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "stall ratio above .5": (("stall_ratio", 0.5),),
    "rank drop above .3 (.15 in lm_head and c_proj)": (("rank_drop", 0.3), ("critical_rank_drop", 0.15)),
}


def eight_bit_runs(part: Evidence) -> pd.DataFrame:
    """The runs in 8 bits with a result, with `excess` over BF16 AdamW of the seed (inf: stopped)."""
    trials = part.trials
    reference = trials[(trials["format"] == "BF16") & (trials["optimizer"] == "adamw")]
    base = dict(zip(reference["seed"], reference["val_loss"], strict=True))
    own = trials[trials["quantized"] & trials["format"].map(is_narrow) & trials["state"].isin((FINISHED, FAILED))]
    ends = own["val_loss"].where(own["state"] == FINISHED, math.inf)
    return own.assign(excess=ends / own["seed"].map(base) - 1)


@dataclass(frozen=True)
class Forecast:
    """Rank correlations with the final loss, and their difference with its interval."""

    policy: str
    arms: str
    runs: int
    by_yield: float
    by_loss: float
    low: float
    high: float

    @property
    def word(self) -> str:
        return "confirmed" if self.low > 0 else "refuted" if self.high < 0 else "open"


def forecasts(part: Evidence, seed: int = 0) -> list[Forecast]:
    """For each policy over all arms, and over those whose weights are on the grid."""
    runs = eight_bit_runs(part)
    # A stopped run ranks last.
    runs = runs.assign(end=runs["val_loss"].where(runs["state"] == FINISHED, math.inf)).merge(
        early(part), on="trial_id"
    )
    found = []
    for policy in sorted(runs["policy"].unique()):
        own = runs[runs["policy"] == policy].dropna(subset=["early_yield", "early_loss"])
        on_grid = own[own["optimizer"].map(is_on_grid).astype(bool)]
        for arms, table in (("all", own), ("on the grid", on_grid)):
            if len(table) >= 10 and table["seed"].nunique() >= 3:
                found.append(_forecast(table, policy, arms, seed))
    return found


def is_on_grid(arm: str) -> bool:
    """Whether the arm's weights live on the format's grid."""
    return arm in ARMS and ARMS[arm].is_on_grid


def early(part: Evidence) -> pd.DataFrame:
    """Per trial the mean flip yield up to EARLY of the steps, and the mean training loss of the last WINDOW of them."""
    steps = part.trials.set_index("trial_id")["steps"]
    rows = part.rows[["trial_id", "step", "train_loss", "flip_yield"]]
    until = rows["trial_id"].map(steps) * EARLY
    first = rows[rows["step"] <= until]
    window = first[first["step"] > until[first.index] - WINDOW]
    return pd.DataFrame(
        {
            "early_yield": first.groupby("trial_id")["flip_yield"].mean(),
            "early_loss": window.groupby("trial_id")["train_loss"].mean(),
        }
    ).reset_index()


def _forecast(table: pd.DataFrame, policy: str, arms: str, seed: int) -> Forecast:
    values = table[["early_yield", "early_loss", "end"]].to_numpy() * np.array([-1.0, 1.0, 1.0])
    seeds = table["seed"].to_numpy()
    groups = [np.flatnonzero(seeds == each) for each in np.unique(seeds)]
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([groups[k] for k in generator.integers(len(groups), size=len(groups))])
        by_yield, by_loss = _correlations(values[drawn])
        differences.append(by_yield - by_loss)
    low, high = np.percentile(differences, [2.5, 97.5])
    return Forecast(policy, arms, len(table), *_correlations(values), float(low), float(high))


def _correlations(values: np.ndarray) -> tuple[float, float]:
    ranks = rankdata(values, axis=0)
    found = np.corrcoef(ranks.T)
    return float(found[0, 2]), float(found[1, 2])


def forecast_table(found: Sequence[Forecast]) -> Table:
    columns = ("policy", "arms", "runs", "minus flip yield", "training loss", "difference", "95 % interval", "claim")
    lines = [
        (
            one.policy,
            one.arms,
            str(one.runs),
            f"{one.by_yield:+.2f}",
            f"{one.by_loss:+.2f}",
            f"{one.by_yield - one.by_loss:+.2f}",
            f"[{one.low:+.2f}, {one.high:+.2f}]",
            f"**{one.word}**",
        )
        for one in found
    ]
    return Table(columns, lines, frozenset({2, 3, 4, 5, 6}))


def exact(hits: int, of: int) -> tuple[float, float]:
    """The exact 95 % interval of a share (Clopper and Pearson)."""
    interval = binomtest(hits, of).proportion_ci(0.95)
    return float(interval.low), float(interval.high)


def _share(hits: int, of: int) -> str:
    if not of:
        return DASH
    low, high = exact(hits, of)
    return f"{hits / of:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Alarm:
    """How often an alarm rang in runs that ended badly and in those that did not."""

    name: str
    bad: int
    rang_bad: int
    good: int
    rang_good: int

    @property
    def word(self) -> str:
        if min(self.bad, self.good) < LEAST_RUNS:
            return "not measured"
        bounds = [exact(self.rang_bad, self.bad), exact(self.good - self.rang_good, self.good)]
        if min(low for low, _ in bounds) > USEFUL:
            return "useful"
        return "refuted" if min(high for _, high in bounds) < USEFUL else "open"


def alarms(part: Evidence) -> list[Alarm]:
    """Each of ALARMS over the runs in 8 bits, at any check."""
    runs = eight_bit_runs(part)
    is_bad = runs["excess"] > FAILING
    found = []
    for name, limits in ALARMS.items():
        rang = np.zeros(len(runs), dtype=bool)
        for signal, limit in limits:
            worst = part.rows.groupby("trial_id")[signal].max()
            rang |= (runs["trial_id"].map(worst) > limit).to_numpy()
        bad = is_bad.to_numpy()
        found.append(Alarm(name, int(bad.sum()), int((rang & bad).sum()), int((~bad).sum()), int((rang & ~bad).sum())))
    return found


def alarm_table(found: Sequence[Alarm]) -> Table:
    columns = ("alarm", "bad runs", "it rang in", "other runs", "it rang in", "sensitivity", "specificity", "verdict")
    lines = [
        (
            one.name,
            str(one.bad),
            str(one.rang_bad),
            str(one.good),
            str(one.rang_good),
            _share(one.rang_bad, one.bad),
            _share(one.good - one.rang_good, one.good),
            f"**{one.word}**",
        )
        for one in found
    ]
    return Table(columns, lines, frozenset(range(1, 7)))


def guard_table(guarded: Evidence, unguarded: Evidence | None) -> Table:
    """Per signal: runs that guards stopped, steps they saved, and stops of runs that would have ended well."""
    columns = (
        "signal",
        "runs stopped",
        "steps saved, of all asked for",
        "trained on without guards",
        "wrong",
        "share",
        "no harm",
    )
    stopped = guarded.trials[guarded.trials["state"] == FAILED]
    asked = guarded.trials["steps"].sum()
    ends = _ends(guarded, unguarded)
    lines = []
    for signal, own in [*stopped.groupby("signal"), *([("all", stopped)] if len(stopped) else [])]:
        known = [ends[name] for name in own["trial_id"] if name in ends]
        wrong = sum(excess <= FAILING for excess in known)
        saved = (own["steps"] - own["step"]).sum() / asked
        lines.append(
            (
                str(signal),
                str(len(own)),
                f"{100 * saved:.1f} %",
                str(len(known)),
                str(wrong),
                _share(wrong, len(known)),
                f"**{_harm(wrong, len(known))}**",
            )
        )
    return Table(columns, lines, frozenset({1, 2, 3, 4, 5}))


def guard_word(guarded: Evidence, unguarded: Evidence | None) -> str:
    """Whether guards save without harm, over all their stops."""
    stopped = guarded.trials[guarded.trials["state"] == FAILED]["trial_id"]
    known = [excess for name, excess in _ends(guarded, unguarded).items() if name in set(stopped)]
    return _harm(sum(excess <= FAILING for excess in known), len(known))


def _harm(wrong: int, known: int) -> str:
    if not known:
        return "not measured"
    low, high = exact(wrong, known)
    return "holds" if high < HARMLESS else "refuted" if low > HARMFUL else "open"


def _ends(guarded: Evidence, unguarded: Evidence | None) -> dict[str, float]:
    """Of stopped runs that were trained on: the excess over BF16 of the seed at the end."""
    if unguarded is None:
        return {}
    runs = eight_bit_runs(unguarded)
    return dict(zip(runs["trial_id"], runs["excess"], strict=True))


@dataclass(frozen=True)
class Raced:
    """A race of a sweep's rates: cells, those whose settled rate came through, the share of the steps that it takes.

    Of the cells `decided` are those in which the settled rate is better than the next by a paired t interval.
    """

    cells: int
    kept: int
    decided: int
    kept_decided: int
    steps: float

    @property
    def word(self) -> str:
        if not self.decided:
            return "not measured"
        return "holds" if self.decided - self.kept_decided <= CUT * self.decided else "refuted"


def race(part: Evidence) -> Raced:
    """The rates of a sweep raced within cells, by the service's own class, on the evaluations that it recorded."""
    trials = part.trials[part.trials["state"].isin((FINISHED, FAILED))].set_index("trial_id")
    configs = {str(name): TrainConfig.model_validate_json(text) for name, text in trials["config"].items()}
    racing = Race(configs, RaceConfig())
    for name, kind, step in trials.loc[trials["state"] == FAILED, ["outcome", "step"]].itertuples():
        racing.ended(name, OutcomeKind(kind), int(step))
    evaluated = part.rows[part.rows["val_loss"].notna() & part.rows["trial_id"].isin(trials.index)]
    for name, step, loss in evaluated.sort_values("step")[["trial_id", "step", "val_loss"]].itertuples(index=False):
        racing.observe(name, int(step), float(loss))
    alone = {name: int(step) for name, step in trials["step"].items()}
    raced = {name: racing.stopped[name].step if name in racing.stopped else step for name, step in alone.items()}
    cells = [cell for cell in part.study.cells if cell.settings > 1 and (cell.format, cell.arm) != ("BF16", "adamw")]
    kept = [not any(name in racing.stopped for name in cell.trial_ids) for cell in cells]
    decided = [_is_best(cell) for cell in cells]
    return Raced(
        len(cells),
        sum(kept),
        sum(decided),
        sum(both for both, is_decided in zip(kept, decided, strict=True) if is_decided),
        sum(raced.values()) / max(1, sum(alone.values())),
    )


def _is_best(cell: Cell) -> bool:
    """Whether the cell's setting ends lower than the next best, by a paired 95 % t interval over its seeds."""
    rivals = sorted((other for other in cell.tried if other.lr != cell.lr and other.losses), key=lambda one: one.rank)
    if not rivals:
        return False
    shared = sorted(cell.losses.keys() & rivals[0].losses.keys())
    if rivals[0].stops or len(shared) < 2:
        return bool(rivals[0].stops) and not cell.stops
    return t_interval([rivals[0].losses[seed] - cell.losses[seed] for seed in shared])[0] > 0


def race_text(found: Raced) -> str:
    """What the race takes, and what it gets wrong."""
    return (
        f"Races within a cell train {100 * found.steps:.0f} % of the steps and keep the settled rate in {found.kept} "
        f"of {counted(found.cells, 'cell')}, in {found.kept_decided} of the {found.decided} in which it is decided to "
        f"be best: **{found.word}**."
    )
