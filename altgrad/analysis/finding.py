"""The finding: three questions, an answer to each, and how surely it is known.

Which 8-bit formats train; which benefits most from geometry-aware steps beyond what the step rule gives anyway; why
the others fail. Of each answer the decided part stands first, then what these seeds leave open and what it would take
to decide it. Nothing is called decided but what the tests of `contrasts` and `verdicts` decide. Where BF16 was not run,
or did not learn, there is no measure, and the answers say only that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from altgrad.analysis.cells import MAIN_POLICY, REFERENCE_ARM, UNITS, Cell
from altgrad.analysis.contrasts import Contrast
from altgrad.analysis.failures import failure_answer
from altgrad.analysis.inference import ALPHA
from altgrad.analysis.study import Study
from altgrad.analysis.verdicts import FormatVerdict, Verdict, open_stop_rate
from altgrad.analysis.wording import counted, listed, percent, plain_number, share, signed, size

TRAINS = "Which 8-bit formats train?"
BENEFITS = "Which benefits most from geometry-aware steps, beyond what the step rule gives anyway?"
FAILS = "Why do the others fail?"
MOST_NAMED = 4
"""Of pairs that may be the best; the table has them all."""


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
        texts = (_training_answer(study, scope), _geometry_answer(study), failure_answer(study))
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
        f"{'; ' if scope else ''}{scope}; {counted(study.seeds, 'seed')})"
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
            f"{listed(names)} {'trains' if len(names) == 1 else 'train'} (decided); the lowest bound is "
            f"{best.cell.format} with {best.cell.arm}, {_excess(best)}; {counted(best.cell.n, 'clean seed')} leave a "
            f"stop rate of up to {share(open_stop_rate(best.cell.n))} open"
        )
    if fails := [item for item in study.formats if item.word == "fails"]:
        names = [name for item in fails for name in item.formats]
        parts.append(f"{listed(names)} {'fails' if len(names) == 1 else 'fail'} in every arm (decided)")
    if open_ := [item for item in study.formats if item.word == "open"]:
        parts.append("not decided: " + "; ".join(map(_open_format, open_)))
    if nothing := [name for item in study.formats if item.word == "no result" for name in item.formats]:
        pruned = {arm.cell.format for item in study.formats for arm in item.arms if arm.cell.pruned}
        why = " (all of their runs were pruned or lost)" if pruned & set(nothing) else ""
        parts.append(f"without result: {listed(nothing)}{why}")
    return f"{measure}: {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def _open_format(item: FormatVerdict) -> str:
    arm = item.best
    names = listed(item.formats)
    if arm.cell.stops:
        return f"{names} ({arm.cell.arm}, its best arm, stopped in {len(arm.cell.stops)} of {arm.cell.n} seeds)"
    if math.isnan(arm.excess):
        return f"{names} ({counted(arm.cell.n, 'seed')}{', no shared learning rate' if arm.cell.exploratory else ''})"
    return f"{names} (its best arm, {arm.cell.arm}, {_excess(arm)}; {_needed(arm.seeds_needed)})"


def _excess(arm: Verdict) -> str:
    if math.isinf(arm.high):
        return percent(arm.excess)
    return f"{percent(arm.excess)} [{percent(arm.low)}, {percent(arm.high)}]"


def _needed(seeds: int | None) -> str:
    return (
        "more than 60 seeds would be needed"
        if seeds is None
        else f"about {counted(seeds, 'more seed')} would decide it"
    )


def _geometry_answer(study: Study) -> str:
    pairs = [item for item in study.beyond if item.kind == "beyond BF16" and item.cell.policy == study.policy]
    tested = [item for item in pairs if item.status in ("measured", "identical")]
    parts = [*_rescues(study)]
    if not tested:
        parts.append(_why_no_interaction(study, pairs))
        return " ".join(parts)
    parts.append(_leader_text(study, tested))
    parts += _decided_texts(study, tested)
    parts.append(_open_text(study, tested))
    return " ".join(part for part in parts if part)


def _leader_text(study: Study, tested: Sequence[Contrast]) -> str:
    (first, *twins), *others = study.best or [[max(tested, key=lambda item: item.mean)]]
    if study.best and not others and len(tested) > len(twins) + 1:
        if first.decided and first.mean > 0:
            return f"{_pair([first, *twins])} benefits most (decided): {_beyond(study, first)}."
        return (
            f"The largest difference from BF16's gain is that of {_pair([first, *twins])} (decided): "
            f"{_beyond(study, first)}."
        )
    if not others:
        return f"{_pair([first, *twins])} alone was measured: {_beyond(study, first)}."
    named = [_pair(group) for group in study.best[:MOST_NAMED]]
    more = len(study.best) - len(named)
    tail = f" or {counted(more, 'other')}" if more else ""
    among = listed(named, "or") if not more else ", ".join(named) + tail
    return f"Which one is not decided: it may be {among}; the largest estimate is {_beyond(study, first)}."


def _decided_texts(study: Study, tested: Sequence[Contrast]) -> list[str]:
    more = [item for item in tested if item.decided and item.mean > 0]
    less = [item for item in tested if item.decided and item.mean < 0]
    texts = []
    is_said = len(study.best) == 1 and study.best[0][0] in more
    if more and not (is_said and len(more) == len(study.best[0])):
        texts.append(f"Decided to gain more than in BF16: {_effects(more)}.")
    if not more:
        texts.append(
            f"{'Neither' if len(tested) == 2 else 'None'} of the {len(tested)} format–arm pairs is decided to gain "
            "more than in BF16."
            if len(tested) > 1
            else "It is not decided to gain more than in BF16."
        )
    if less:
        texts.append(f"Decided to gain less than in BF16: {_effects(less)}.")
    if equal := [item for item in tested if not item.decided and item.within(study.equal_limit(item))]:
        limit = max(study.equal_limit(item) for item in equal)
        texts.append(f"Equal to BF16's gain within {size(limit)} {study.unit}: {listed(map(_name, equal))}.")
    beyond_fp32 = [
        item
        for item in study.beyond
        if item.kind == "beyond FP32" and item.cell.policy == study.policy and item.status == "measured"
    ]
    if decided := [item for item in beyond_fp32 if item.decided]:
        texts.append(f"Against the same steps over float32 weights (decided): {_effects(decided)}.")
    elif beyond_fp32:
        texts.append("Against the same steps over float32 weights nothing is decided.")
    if disagreeing := [item for item in tested if item.disagrees]:
        texts.append(
            f"The distribution-free test disagrees on {listed(map(_name, disagreeing))} "
            f"(p = {', '.join(f'{item.p_free:.2g}' for item in disagreeing)})."
        )
    if skewed := [item for item in tested if item.decided and item.mean * item.median <= 0]:
        texts.append(f"Few seeds carry the mean of {listed(map(_name, skewed))}: the typical seed shows the opposite.")
    return texts


def _open_text(study: Study, tested: Sequence[Contrast]) -> str:
    """What these seeds could show, and what would decide the largest open difference."""
    open_ = [item for item in tested if item.status == "measured" and not item.decided]
    if not open_:
        return ""
    seeds = min(item.n for item in open_)
    finite = sorted(item.detectable for item in open_ if math.isfinite(item.detectable))
    if not finite:
        return f"{counted(seeds, 'seed')} cannot show any difference."
    middle = finite[len(finite) // 2]
    text = f"{counted(seeds, 'seed')} can show differences from about {size(middle)} {study.unit} (power 80 %)"
    leader = max(open_, key=lambda item: abs(item.mean))
    needed = leader.seeds_needed
    return f"{text}; for {_name(leader)} ({signed(leader.mean)}) {_needed(needed)}."


def _rescues(study: Study) -> list[str]:
    """Of each gain with stopped seeds: who stops less, whether that is decided, and whether the survivor trains."""
    texts = []
    for item in study.gains:
        if item.status != "stopped" or item.cell.policy != study.policy or item.cell not in study.judged:
            continue
        own, plain = item.cell, item.other
        counts = (
            f"{own.format}: {own.arm} stopped in {len(own.stops)} of {own.n} seeds, {plain.arm} in "
            f"{len(plain.stops)} of {plain.n}"
        )
        if len(own.stops) / own.n < len(plain.stops) / plain.n and item.decided:
            verdict = study.verdicts.get(own.key)
            if verdict is not None and verdict.word == "trains":
                texts.append(f"{own.arm} rescues {own.format}, decided (p = {item.p_stop:.2g}; {counts}).")
            else:
                is_failing = verdict is not None and verdict.word == "fails"
                end = f"{own.arm} fails to train there" if is_failing else f"that {own.arm} trains there is not"
                texts.append(f"{counts}: decided (p = {item.p_stop:.2g}), but {end}.")
        else:
            word = "decided" if item.decided else "not decided"
            texts.append(f"{counts}: {word} (p = {item.p_stop:.2g}).")
    return texts


def _why_no_interaction(study: Study, pairs: Sequence[Contrast]) -> str:
    geometry = [cell for cell in study.judged if cell.geometry]
    if not geometry:
        return "Not measured: no geometry-aware arm was run in an 8-bit format."
    if not any(item.cell.policy == study.policy and item.cell in study.judged for item in study.gains):
        plain = listed(dict.fromkeys(cell.plain for cell in geometry), "or")
        return (
            f"Not measured: the plain arm of the same residence was not run ({plain}), and against any other the gain "
            "would hold what the residence costs."
        )
    if not pairs:
        return "Not measured: the same arms were not run in BF16, so the step rule's own gain is not known."
    counts: dict[str, int] = {}
    for item in pairs:
        counts[item.status] = counts.get(item.status, 0) + 1
    words = {
        "stopped": "with stopped seeds",
        "one seed": "with one seed",
        "exploratory": "without a shared learning rate",
        "no result": "without result",
    }
    found = [f"{count} {words[status]}" for status, count in counts.items() if status in words]
    return f"Not decided: of {counted(len(pairs), 'format–arm pair')} {listed(found)}."


def _beyond(study: Study, item: Contrast) -> str:
    in_bf16 = study.gain_in("BF16", item.cell)
    beside = f" beyond its gain of {signed(in_bf16.mean)} in BF16" if in_bf16 is not None else " beyond BF16"
    verdict = study.verdicts.get(item.cell.key)
    fails = "; it fails to train there all the same" if verdict is not None and verdict.word == "fails" else ""
    return f"{signed(item.mean)} {study.unit} {_interval(item)}{beside}{fails}"


def _effects(items: Sequence[Contrast]) -> str:
    ordered = sorted(items, key=lambda item: -abs(item.mean))
    shown = [f"{_name(item)} {signed(item.mean)} {_interval(item)}" for item in ordered[:MOST_NAMED]]
    more = len(ordered) - len(shown)
    return ", ".join(shown) + (f" and {counted(more, 'other')}" if more else "")


def _interval(item: Contrast) -> str:
    return "(identical in every seed)" if item.status == "identical" else f"[{signed(item.low)}, {signed(item.high)}]"


def _name(item: Contrast) -> str:
    return f"{item.cell.format} {item.cell.arm}"


def _pair(group: Sequence[Contrast]) -> str:
    return f"{' = '.join(dict.fromkeys(item.cell.format for item in group))} with {group[0].cell.arm}"


def _notes(study: Study, results: int, trials: int, unevaluated: int) -> Iterable[str]:
    if results < trials:
        yield f"Incomplete: {results} of {trials} trials have a result."
    if unevaluated:
        who = "1 trial was" if unevaluated == 1 else f"{unevaluated} trials were"
        yield (
            f"{who} trained past the steps asked for without an evaluation there, so nothing is known of them at this "
            "length: ask for the length they were trained to, or start afresh."
        )
    if study.reference is not None and (lost := (*study.reference.missing, *study.reference.stops)):
        yield f"BF16 AdamW has no loss at seed {listed(map(str, sorted(lost)))}: nothing is compared there."
    cut = [cell for cell in study.cells if not cell.exploratory and cell.settings > len(cell.rates)]
    if cut:
        rates = listed(f"{rate:g}" for rate in cut[0].rates)
        yield (
            f"Learning-rate grids differ; arms are compared over the rates that all have ({rates}): "
            f"{listed(dict.fromkeys(f'{cell.arm} ran {cell.settings}' for cell in cut))}."
        )
    if loose := list(dict.fromkeys(cell.arm for cell in study.cells if cell.exploratory)):
        yield (
            f"{listed(loose)}: settings that no other cell shares, chosen freely; exploratory, and nothing of them is "
            "decided."
        )
    if study.is_sound and study.cells:
        yield f"Decided: false in at most {share(ALPHA)} of sweeps for each question (see the report's last part)."


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
    parts = ["Not known: no BF16 AdamW reference has finished, so no format can be said to train or to fail."]
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
