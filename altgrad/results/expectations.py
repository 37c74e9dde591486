"""The original's expectations, which it planned to test and never ran, each with a verdict in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from altgrad.analysis.cells import Cell
from altgrad.analysis.inference import holm, t_interval
from altgrad.analysis.study import Study
from altgrad.analysis.tables import Table, excess_text
from altgrad.analysis.twins import noise_of
from altgrad.analysis.wording import signed
from altgrad.results.evidence import Evidence
from altgrad.results.forecasts import Forecast
from altgrad.results.geometry import ARMS, Judged
from altgrad.results.training import verdicts_of

COSINE = 0.9
FEW, MANY = ("E6M1", "E7M0"), ("E2M5", "E3M4")
"""Formats of few and of many mantissa bits whose spacing varies."""
ALIKE = 0.005
"""Nats within which two formats' losses count as the same."""
DISTINCT = ("E3M4", "E0M7", "E7M0")
"""The original's further formats, E1M6 being E0M7's grid."""
NOT_RUN = "not run"


@dataclass(frozen=True)
class Expectation:
    """What was expected, the word on it, and what it rests on."""

    claim: str
    word: str
    evidence: str


def table(found: Sequence[Expectation]) -> Table:
    """A line per expectation."""
    return Table(
        ("expectation", "verdict", "in numbers"), [(one.claim, f"**{one.word}**", one.evidence) for one in found]
    )


def expectations(parts: Mapping[str, Evidence], pairs: Sequence[Judged]) -> list[Expectation]:
    """In the plan's order."""
    main, original = parts.get("main"), parts.get("original")
    return [
        _baseline(original),
        _e5m2(original),
        _differ(main, parts.get("twins")),
        _e7m0(parts.get("long")),
        _a_b(None if main is None else main.study, parts["long"].study if "long" in parts else None),
        _few_mantissa_bits(pairs),
    ]


def _baseline(part: Evidence | None) -> Expectation:
    claim = "BF16's loss falls over 2 000 steps without NaN"
    cell = _cell(part, "BF16", "adamw", "uniform")
    if part is None or cell is None:
        return Expectation(claim, NOT_RUN, "")
    rows = part.rows[part.rows["trial_id"].isin(cell.trial_ids)].dropna(subset=["val_loss"])
    half, whole = part.sweep.selected.trials["steps"].max() // 2, part.sweep.selected.trials["steps"].max()
    at = {step: rows[rows["step"] == step].set_index("trial_id")["val_loss"] for step in (half, whole)}
    falls = bool((at[whole] < at[half].reindex(at[whole].index)).all()) and not cell.stops and len(at[whole]) == cell.n
    middle, last = at[half].mean(), at[whole].mean()
    text = f"{middle:.3f} nats at step {half}, {last:.3f} at {whole}; {len(cell.stops)} of {cell.n} runs not finite"
    return Expectation(claim, "holds" if falls else "refuted", text)


def _e5m2(part: Evidence | None) -> Expectation:
    claim = "E5M2 ends within 10 % of BF16, gradient cosine above .9"
    cell = _cell(part, "E5M2", "adamw", "uniform")
    verdict = None if part is None or cell is None else part.study.verdicts.get(cell.key)
    if part is None or cell is None or verdict is None:
        return Expectation(claim, NOT_RUN, "")
    steps = part.trials["steps"].max()
    rows = part.rows[part.rows["trial_id"].isin(cell.trial_ids) & (part.rows["step"] > steps / 2)]
    cosines = rows.groupby("trial_id")["gradient_cosine"].mean()
    least = float(cosines.min()) if len(cosines) else math.nan
    is_close = least > COSINE
    word = "holds" if verdict.word == "trains" and is_close else "open"
    if verdict.word == "fails" or not is_close:
        word = "refuted"
    text = f"excess {excess_text(verdict)} ({verdict.word}); cosine {cosines.mean():.3f}, least seed {least:.3f}"
    return Expectation(claim, word, text)


def _differ(main: Evidence | None, twins: Evidence | None) -> Expectation:
    claim = "E3M4, E1M6, E0M7, E7M0 differ; E0M7 and E1M6 must not"
    cells = {name: _cell(main, name, "adamw", "uniform") for name in DISTINCT}
    if twins is None or main is None or any(cell is None for cell in cells.values()):
        return Expectation(claim, NOT_RUN, "")
    texts, p_values, intervals = [], [], []
    for first, second in (("E3M4", "E0M7"), ("E3M4", "E7M0"), ("E0M7", "E7M0")):
        a, b = cells[first], cells[second]
        assert a is not None and b is not None
        shared = sorted(a.losses.keys() & b.losses.keys())
        values = [a.losses[seed] - b.losses[seed] for seed in shared]
        p_values.append(float(stats.ttest_1samp(values, 0).pvalue) if len(values) > 1 else math.nan)
        intervals.append(t_interval(values))
        texts.append(f"{first} − {second} {signed(float(np.mean(values)))}")
    corrected = holm(p_values)
    pairs, worst = _twins(main, twins)
    same = worst == 0.0
    word = "holds" if max(corrected) <= 0.05 and same and pairs else "open"
    if not same or any(low > -ALIKE and high < ALIKE for low, high in intervals):
        word = "refuted"
    listed = ", ".join(f"{text} (p = {p:.2g})" for text, p in zip(texts, corrected, strict=True))
    end = "equal to the last bit" if same else f"off by up to {worst:.1g} nats"
    return Expectation(claim, word, f"{listed}; {pairs} pairs of E0M7 and E1M6 runs {end}")


def _twins(main: Evidence, twins: Evidence) -> tuple[int, float]:
    """How many runs of E1M6 have their like in E0M7, and their largest difference beyond float32's noise, nats."""
    ours = {(cell.arm, cell.policy): cell for cell in main.study.cells if cell.format == "E0M7"}
    pairs, worst = 0, 0.0
    for cell in (cell for cell in twins.study.cells if cell.format == "E1M6"):
        other = ours.get((cell.arm, cell.policy))
        for seed in cell.losses if other is not None else ():
            assert other is not None
            if seed in other.losses:
                pairs += 1
                distance = abs(cell.losses[seed] - other.losses[seed])
                worst = max(worst, distance if distance > noise_of((cell.losses[seed], other.losses[seed])) else 0.0)
            elif seed in other.stops:
                worst = math.inf
    return pairs, worst


def _e7m0(part: Evidence | None) -> Expectation:
    claim = "E7M0 fails (`uniform_full`, 1 000 steps)"
    found = [] if part is None else [one for one in verdicts_of(part.study, "uniform_full") if "E7M0" in one.formats]
    if not found:
        return Expectation(claim, NOT_RUN, "")
    arms = ", ".join(f"{arm.cell.arm} {excess_text(arm)} ({arm.word})" for arm in found[0].arms)
    return Expectation(claim, {"trains": "refuted", "fails": "holds"}.get(found[0].word, "open"), arms)


def _a_b(study: Study | None, longer: Study | None) -> Expectation:
    claim = "manifold-aware against standard (A/B), E5M2"
    texts, words = [], []
    for one, steps in ((study, 400), (longer, 1000)):
        item = (
            None
            if one is None
            else next((gain for gain in one.gains if gain.cell.key == ("E5M2", "manifold", "uniform")), None)
        )
        if item is not None and item.n:
            words.append(("gains" if item.mean > 0 else "loses") if item.decided else "open")
            texts.append(f"{signed(item.mean)} [{signed(item.low)}, {signed(item.high)}] at {steps} steps")
    if not words:
        return Expectation(claim, NOT_RUN, "")
    return Expectation(claim, words[0] if len(set(words)) == 1 else " then ".join(words), "; ".join(texts))


def _few_mantissa_bits(pairs: Sequence[Judged]) -> Expectation:
    claim = '"low mantissa benefits most"'
    texts, words = [], []
    tests = [(arm, policy) for policy in ("uniform", "uniform_full") for arm in ARMS]
    for arm, policy in tests:
        own = {
            one.item.cell.format: one.item.differences
            for one in pairs
            if (one.item.cell.arm, one.item.cell.policy) == (arm, policy)
        }
        if not all(own.get(name) for name in (*FEW, *MANY)):
            continue  # one was stopped, and has no differences
        seeds = sorted(set.intersection(*(set(own[name]) for name in (*FEW, *MANY))))
        values = [np.mean([own[name][k] for name in FEW]) - np.mean([own[name][k] for name in MANY]) for k in seeds]
        if len(values) < 2:
            continue
        low, high = t_interval(np.array(values), 1 - 0.05 / len(tests))
        words.append("more" if low > 0 else "less" if high < 0 else "open")
        texts.append(f"{arm}, {policy} {signed(float(np.mean(values)))} [{signed(low)}, {signed(high)}]")
    if not words:
        return Expectation(claim, NOT_RUN, "")
    words_of_few = {one.word for one in pairs if one.item.cell.format in FEW}
    word = "open"
    if "more" in words and "less" not in words and "more" in words_of_few:
        word = "confirmed"
    elif "less" in words and "more" not in words and "less" in words_of_few:
        word = "refuted"
    return Expectation(claim, word, f"E6M1 and E7M0 minus E2M5 and E3M4, nats: {'; '.join(texts)}")


def ours(pairs: Sequence[Judged], found: Sequence[Forecast], guards: str, races: str) -> list[Expectation]:
    """What we expected, in the plan's order; `guards` and `races` are words that stand elsewhere."""
    own = [one for one in pairs if one.item.cell.arm == "manifold" and not one.is_same_step]
    ends = [one.word for one in own if one.item.cell.format == "E7M0"]
    is_more = any(one.word == "more" for one in own)
    word = "holds" if not is_more and len(ends) == 2 and set(ends) == {"less"} else "open"
    if is_more or {"more", "equal"} & set(ends):
        word = "refuted"
    all_arms = [one.word for one in found if one.arms == "all"]
    forecast = all_arms[0] if len(all_arms) == 2 and len(set(all_arms)) == 1 else "open" if all_arms else NOT_RUN
    return [
        Expectation(
            "no format gains more than BF16 from manifold, and E7M0 gains less",
            word if own else NOT_RUN,
            ", ".join(f"{one.item.cell.format} {one.item.cell.policy} {one.word}" for one in own),
        ),
        Expectation(
            "flip yield by 15 % of the run predicts the final loss better than the loss itself",
            forecast,
            "; ".join(
                f"{one.policy} {one.by_yield - one.by_loss:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
                for one in found
                if one.arms == "all"
            ),
        ),
        Expectation("guards save without harm", guards, "next chapter"),
        Expectation("races within a cell keep the settled rate", races, "next chapter"),
    ]


def _cell(part: Evidence | None, format: str, arm: str, policy: str) -> Cell | None:
    if part is None:
        return None
    return next((cell for cell in part.study.cells if cell.key == (format, arm, policy)), None)
