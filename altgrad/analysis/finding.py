"""The finding: three questions, an answer to each, and how surely it is known.

Which 8-bit formats train; which benefits most from geometry-aware steps beyond what the step rule gives anyway; why
the others fail. Of each answer the decided part stands first, then what these seeds leave open and what it would take
to decide it. Nothing is called decided but what the tests of `contrasts` and `verdicts` decide. Where BF16 was not run,
or did not learn, there is no measure, and the answers say only that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from altgrad.analysis.cells import MAIN_POLICY, REFERENCE_ARM, REFERENCE_FORMAT, UNITS, Cell
from altgrad.analysis.failures import failure_answer
from altgrad.analysis.geometry import geometry_answer
from altgrad.analysis.inference import ALPHA
from altgrad.analysis.shifts import left_out_text, rescue_text
from altgrad.analysis.study import Study
from altgrad.analysis.verdicts import FormatVerdict, Verdict, open_stop_rate
from altgrad.analysis.wording import counted, listed, needed, of_seeds, percent, plain_number, several, share

TRAINS = "Which 8-bit formats train?"
BENEFITS = "Which benefits most from geometry-aware steps, beyond what the step rule gives anyway?"
FAILS = "Which fail, and why?"


@dataclass(frozen=True)
class Answer:
    """A question and what the sweep says to it."""

    question: str
    text: str

    def __str__(self) -> str:
        return f"• {self.question} {self.text}"


@dataclass(frozen=True)
class Finding:
    """Three answers, what has to be known beside them, how many of the trials have a result, the report's `path`."""

    answers: tuple[Answer, ...]
    notes: tuple[str, ...]
    results: int
    trials: int
    path: Path | None = None

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.answers, *self.notes)))


def find(study: Study, results: int, trials: int, *, unevaluated: int = 0, scope: str = "") -> Finding:
    """The finding of a study of which `results` of `trials` trials have a result.

    `unevaluated` of the others were trained through the last step asked for, but not evaluated at it. `scope`: what
    was trained on what, for how long.
    """
    if study.is_sound:
        texts = (_training_answer(study, scope), geometry_answer(study), failure_answer(study))
    else:
        reason = _unlearned(study.reference) if study.reference else _without_reference(study)
        texts = (reason, *(("Not known: there is no measure of any format.",) * 2))
    answers = tuple(Answer(*pair) for pair in zip((TRAINS, BENEFITS, FAILS), texts, strict=True))
    return Finding(answers, tuple(_notes(study, results, trials, unevaluated)), results, trials)


def _training_answer(study: Study, scope: str) -> str:
    assert study.reference is not None
    measure = (
        f"Within {share(study.margin)} of BF16 AdamW's {study.measure} "
        f"({plain_number(_mean(study.reference.losses.values()))} {study.unit}"
        f"{'; ' if scope else ''}{scope}; {counted(study.pairs, 'seed')})"
    )
    if study.policy != MAIN_POLICY:
        measure += f" under policy {study.policy}"
    if not study.formats:
        others = [
            f"{cell.format} {cell.arm} ends at {plain_number(_mean(cell.losses.values()))}"
            for cell in study.cells
            if cell is not study.reference and cell.family == REFERENCE_ARM and cell.losses and not cell.stops
        ]
        return f"{measure}: no 8-bit format was run{'; ' if others else ''}{'; '.join(others)}."
    parts = []
    if trains := [item for item in study.formats if item.word == "trains"]:
        names = [name for item in trains for name in item.formats]
        best = min((item.best for item in trains), key=lambda arm: arm.high)
        parts.append(
            f"{listed(names)} {'trains' if len(names) == 1 else 'train'} (decided), most safely "
            f"{best.cell.format} with {best.cell.arm}, {_excess(best)}; {counted(best.cell.n, 'clean seed')} of an arm "
            f"leave it a stop rate of up to {share(open_stop_rate(best.cell.n))}"
        )
    if fails := [item for item in study.formats if item.word == "fails"]:
        names = [name for item in fails for name in item.formats]
        parts.append(f"{listed(names)} {'fails' if len(names) == 1 else 'fail'} in every arm (decided)")
    if open_ := [item for item in study.formats if item.word == "open"]:
        parts.append("not decided: " + "; ".join(map(_open_format, open_)))
    without = [item for item in study.formats if item.word == "no result"]
    rescued = [item for item in without if any(arm.cell.shifted for arm in item.arms)]
    if rescued:
        parts.append(f"without result of their own: {'; '.join(map(_rescued_format, rescued))}")
    empty = [arm.cell for item in without if item not in rescued for arm in item.arms]
    if nothing := [name for item in without if item not in rescued for name in item.formats]:
        whole = not any(cell.n for cell in empty)
        why = "all runs were pruned or lost" if whole else "seeds of every arm were pruned"
        parts.append(f"without result: {listed(nothing)} ({why})")
    return f"{measure}: {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def _rescued_format(item: FormatVerdict) -> str:
    arms = [f"{arm.cell.arm} {rescue_text(arm.cell)}" for arm in item.arms if arm.cell.shifted]
    return f"{listed(item.formats)} ({'; '.join(arms)})"


def _open_format(item: FormatVerdict) -> str:
    arm, names = item.best, listed(item.formats)
    if item.lacking:
        lacking = listed(verdict.cell.arm for verdict in item.lacking)
        return f"{names} (every arm that ended fails, {lacking} {_has(len(item.lacking))} no result)"
    if arm.cell.exploratory:
        return f"{names} (no shared learning rate)"
    if arm.cell.shifted:
        return f"{names} ({arm.cell.arm}, its best arm, {rescue_text(arm.cell)})"
    if arm.cell.stops:
        return f"{names} ({arm.cell.arm}, its best arm, stopped in {of_seeds(len(arm.cell.stops), arm.cell.n)})"
    if math.isnan(arm.excess):
        return f"{names} ({counted(arm.cell.n, 'seed')})"
    if not arm.cell.learned:
        return f"{names} (its best arm, {arm.cell.arm}, {_excess(arm)}, has not learned)"
    return f"{names} (its best arm, {arm.cell.arm}, {_excess(arm)}; {needed(arm.seeds_needed)})"


def _has(number: int) -> str:
    return "has" if number == 1 else "have"


def _excess(arm: Verdict) -> str:
    if math.isinf(arm.high):
        return percent(arm.excess)
    return f"{percent(arm.excess)} [{percent(arm.low)}, {percent(arm.high)}]"


def _notes(study: Study, results: int, trials: int, unevaluated: int) -> Iterable[str]:
    if results < trials:
        yield f"Incomplete: {results} of {trials} trials have a result."
    if unevaluated:
        who = "1 trial was" if unevaluated == 1 else f"{unevaluated} trials were"
        yield (
            f"{who} trained past the steps asked for without an evaluation there, so nothing is known of them at this "
            "length: ask for the length they were trained to, or start afresh."
        )
    if left_out := left_out_text(study):
        yield left_out
    reference = study.reference
    if reference is not None and (lost := (*reference.missing, *reference.stops, *reference.shifted)):
        yield f"BF16 AdamW has no loss at seed {listed(map(str, sorted(lost)))}: nothing is compared there."
    cut: dict[str, list[str]] = {}
    for cell in study.cells:
        if not cell.exploratory and cell.settings > len(cell.rates):
            cut.setdefault(", ".join(f"{rate:g}" for rate in cell.rates), []).append(f"{cell.arm} ran {cell.settings}")
    for rates, names in cut.items():
        yield (
            f"Learning-rate grids differ; arms are compared over the rates that all have ({rates}): "
            f"{listed(dict.fromkeys(names))}."
        )
    counts = {cell.arm: len(cell.rates) for cell in study.cells if not cell.exploratory}
    if len(set(counts.values())) > 1:
        numbers = listed(f"{arm} {number}" for arm, number in counts.items())
        yield (
            f"Arms were chosen from unequal numbers of learning rates ({numbers}): gains hold the advantage of the "
            "larger number; differences from BF16 do not, for it had the same."
        )
    whole = [cell for cell in study.cells if cell.n]
    edge = [cell for cell in whole if len(cell.rates) > 1 and cell.lr in (min(cell.rates), max(cell.rates))]
    if edge:
        yield (
            f"Each arm stands at its own best learning rate; in {len(edge)} of {len(whole)} cells that is the "
            "least or the greatest of the grid, so that a wider one might change them."
        )
    if loose := [f"{cell.format} {cell.arm}" for cell in study.cells if cell.exploratory]:
        yield (
            f"Exploratory, for no other cell of the arm shares their settings: {several(loose)}. Nothing of them is "
            "decided."
        )
    if others := sorted({cell.policy for cell in study.cells if cell.is_judged} - {study.policy}):
        words = [f"{policy}: {_policy_text(study, policy)}" for policy in others]
        yield f"The answers are for policy {study.policy}; the tables hold {'; '.join(words)}."
    if study.is_sound and study.cells:
        yield f"Decided: false in at most {share(ALPHA)} of sweeps for each question (see the report's last part)."


def _policy_text(study: Study, policy: str) -> str:
    """How many arms of another policy train, fail or are not decided."""
    own = [item.word for key, item in study.verdicts.items() if key[2] == policy]
    words = {"trains": "train", "fails": "fail", "open": "are not decided", "no result": "have no result"}
    return ", ".join(f"{own.count(word)} {text}" for word, text in words.items() if word in own) or "no verdict"


def _unlearned(reference: Cell) -> str:
    count = sum(not reference.seed_learned(seed) for seed in reference.losses)
    seeds = "" if count == len(reference.losses) else f" in {count} of {len(reference.losses)} seeds"
    course = course_text(reference)
    return f"Nothing can be said of any format: the reference, BF16 AdamW, did not learn{seeds} ({course})."


def course_text(cell: Cell) -> str:
    """From where to where the finished seeds went, means of those whose first step is known, nats."""
    end = f"ends at {plain_number(_mean(cell.losses.values()))} {cell.unit}"
    starts = [start for seed, start in cell.starts.items() if seed in cell.losses and not math.isnan(start)]
    begin = "first step" if cell.unit == UNITS["lm"] else "commonest labels"
    return f"{end}, {begin} {plain_number(_mean(starts))}" if starts else f"{end}, its first step is not recorded"


def _without_reference(study: Study) -> str:
    reference = next((c for c in study.cells if (c.format, c.family) == (REFERENCE_FORMAT, REFERENCE_ARM)), None)
    why = f" by itself ({rescue_text(reference)})" if reference is not None and reference.shifted else ""
    parts = [f"Not known: no BF16 AdamW reference has finished{why}, so no format can be said to train or to fail."]
    cells = study.judged or study.cells
    if finished := [cell for cell in cells if cell.losses and not cell.stops]:
        best = min(finished, key=lambda cell: cell.rank)
        parts.append(f"The lowest {study.measure} is {best.mean:.3f} {best.unit}, {best.format} with {best.arm}.")
    if stopped := [cell for cell in cells if cell.stops and not cell.losses]:
        parts.append(f"Stopped in every seed: {listed(f'{cell.format} {cell.arm}' for cell in stopped)}.")
    return " ".join(parts)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
