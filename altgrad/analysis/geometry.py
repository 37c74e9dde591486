"""The second answer: which format benefits most from geometry-aware steps, beyond what the step rule gives anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence

from altgrad.analysis.cells import REFERENCE_FORMAT, Cell
from altgrad.analysis.contrasts import Contrast
from altgrad.analysis.study import Study, candidates
from altgrad.analysis.wording import counted, listed, needed, of_seeds, several, signed, size

MOST_REASONS = 4
"""Why pairs are not compared, of which the answer names those with the most pairs; a sweep half run has dozens."""


def geometry_answer(study: Study) -> str:
    """Rescues, the pair that leads or those that may, what is decided, what is open, what stands outside."""
    tested = candidates(study.beyond, study.policy)
    parts = [*_rescues(study)]
    if tested:
        parts += [_leader_text(study, tested), *_decided_texts(study, tested), _open_text(tested)]
    elif not any(cell.geometry for cell in study.judged):
        parts.append("Not measured: no geometry-aware arm was run in an 8-bit format.")
    parts.append(_untested_text(study, tested))
    return " ".join(part for part in parts if part)


def _leader_text(study: Study, tested: Sequence[Contrast]) -> str:
    first, *others = study.best
    compared = len({(item.cell.arm, item.mean) for item in tested})
    if study.leads:
        return f"Of {compared} pairs compared {_pair(first)} benefits most (decided): {_beyond(study, first[0])}."
    if compared == 1:
        decided = "decided to gain more than in BF16" if first[0].decided and first[0].mean > 0 else ""
        return f"Only {_pair(first)} could be compared{': ' if decided else ''}{decided}: {_beyond(study, first[0])}."
    if not others:
        return f"The largest estimate is that of {_pair(first)}: {_beyond(study, first[0])}."
    among = several([_pair(group) for group in study.best], "or")
    estimate = f"the largest estimate is that of {_name(first[0])}, {_beyond(study, first[0])}"
    return f"Which one is not decided: it may be {among}; {estimate}."


def _untested_text(study: Study, tested: Sequence[Contrast]) -> str:
    """The pairs that stand outside the comparison, by reason: what is not said of them must not be read as said."""
    known = {item.cell.key for item in tested}
    reasons: dict[str, list[str]] = {}
    for cell in study.judged:
        if cell.geometry and cell.key not in known:
            reasons.setdefault(_why_untested(study, cell), []).append(f"{cell.format} {cell.arm}")
    if not reasons:
        return ""
    shown = sorted(reasons, key=lambda why: -len(reasons[why]))[:MOST_REASONS]
    texts = [f"{several(reasons[why])} ({why})" for why in reasons if why in shown]
    if rest := sum(len(names) for why, names in reasons.items() if why not in shown):
        texts.append(f"{counted(rest, 'more pair')} for other reasons")
    return f"Not compared: {'; '.join(texts)}."


def _why_untested(study: Study, cell: Cell) -> str:
    gain = study.gain_of(cell)
    if gain is None:
        return f"its plain arm, {cell.plain}, was not run: any other lives elsewhere"
    item = next((item for item in study.beyond if item.kind == "beyond BF16" and item.cell is cell), None)
    if item is None:
        return "the arm was not run in BF16, so the step rule's own gain is not known"
    if item.status == "exploratory":
        return "no shared learning rate"
    if item.status == "stopped":
        where = [other for other, _ in item.terms if other.stops]
        return f"stopped runs of {listed(f'{other.format} {other.arm}' for other in where)}"
    if item.status == "shifted":
        where = [other for other, _ in item.terms if other.shifted]
        return f"runs of {listed(f'{other.format} {other.arm}' for other in where)} needed a shift of formats"
    if item.status in ("measured", "identical") and not cell.learned:
        return "has not learned"
    if item.status == "one seed":
        return "one seed"
    lacking = [other for other, _ in item.terms if not other.losses or not other.has_result]
    return f"no result of {listed(f'{other.format} {other.arm}' for other in lacking)}" if lacking else "no common seed"


def _decided_texts(study: Study, tested: Sequence[Contrast]) -> list[str]:
    more = [item for item in tested if item.decided and item.mean > 0]
    less = [item for item in tested if item.decided and item.mean < 0]
    texts = []
    said = {item.cell.key for item in (study.best[0] if study.leads or len(tested) == 1 else ())}
    if rest := [item for item in more if item.cell.key not in said]:
        texts.append(f"{'Also d' if said else 'D'}ecided to gain more than in BF16: {_effects(rest)}.")
    if not more:
        texts.append(
            f"{'Neither' if len(tested) == 2 else 'None'} of the {len(tested)} format–arm pairs is decided to gain "
            "more than in BF16."
            if len(tested) > 1
            else "It is not decided to gain more than in BF16."
        )
    if less:
        texts.append(f"Decided to gain less than in BF16: {_effects(less)}.")
    if same := [item for item in tested if item.status == "identical"]:
        texts.append(f"As in BF16 in every seed: {several([_name(item) for item in same])}.")
    near = [item for item in tested if item.status == "measured" and not item.decided]
    if equal := [item for item in near if item.within(study.equal_limit(item))]:
        limit = max(study.equal_limit(item) for item in equal)
        texts.append(
            f"Equal to BF16's gain within {size(limit)} {study.unit}: {several([_name(item) for item in equal])}."
        )
    controls = [item for item in study.beyond if item.kind == "beyond FP32" and item.cell.policy == study.policy]
    beyond_fp32 = [item for item in controls if item.status in ("measured", "identical")]
    if len(beyond_fp32) < len(controls):
        texts.append(
            f"Against the same steps over float32 weights {len(controls) - len(beyond_fp32)} of {len(controls)} could "
            "not be compared (stopped, shifted, lost or unshared runs)."
        )
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


def _open_text(tested: Sequence[Contrast]) -> str:
    """What these seeds could show, and what would decide the largest open difference."""
    open_ = [item for item in tested if item.status == "measured" and not item.is_apart]
    finite = sorted(item.detectable for item in open_ if math.isfinite(item.detectable))
    if not finite:
        return ""
    middle = finite[len(finite) // 2]
    seeds = counted(min(item.n for item in open_), "seed")
    text = f"{seeds} can show differences from BF16's gain of about {size(middle)} {open_[0].cell.unit} (power 80 %)"
    leader = max(open_, key=lambda item: abs(item.mean))
    return f"{text}; if {signed(leader.mean)} is true of {_name(leader)}, {needed(leader.seeds_needed)}."


def _rescues(study: Study) -> list[str]:
    """Of each gain with stopped seeds: who stops less, whether that is decided, and whether the survivor trains."""
    texts = []
    for item in study.gains:
        if item.status != "stopped" or item.cell.policy != study.policy or item.cell not in study.judged:
            continue
        own, plain = item.cell, item.other
        counts = f"{own.format}: {own.arm} stopped in {of_seeds(len(own.stops), own.n)}, "
        counts += f"{plain.arm} in {len(plain.stops)} of {plain.n}"
        less = len(own.stops) / own.n < len(plain.stops) / plain.n
        if not item.decided:
            texts.append(f"{counts}: not decided (p = {item.p_stop:.2g}).")
            continue
        p = f"(p = {item.p_stop:.2g})"
        verdict, in_bf16 = study.verdicts.get(own.key), study.gain_in(REFERENCE_FORMAT, own)
        if not less:
            word = "stops more" if len(own.stops) > len(plain.stops) else "ends worse"
            texts.append(f"{counts}: {own.arm} {word}, decided {p}.")
        elif in_bf16 is not None and (in_bf16.cell.stops or in_bf16.other.stops):
            texts.append(f"{counts}: decided {p}, but runs stop in BF16 too, so that the format is not the reason.")
        elif verdict is not None and verdict.word == "trains":
            texts.append(f"{own.arm} rescues {own.format}, decided {p[:-1]}; {counts}).")
        else:
            is_failing = verdict is not None and verdict.word == "fails"
            end = f"{own.arm} fails to train there" if is_failing else f"that {own.arm} trains there is not"
            texts.append(f"{counts}: decided {p}, but {end}.")
    return texts


def _beyond(study: Study, item: Contrast) -> str:
    in_bf16 = study.gain_in(REFERENCE_FORMAT, item.cell)
    beside = f" beyond its gain of {signed(in_bf16.mean)} in BF16" if in_bf16 is not None else " beyond BF16"
    verdict = study.verdicts.get(item.cell.key)
    fails = "; it fails to train there all the same" if verdict is not None and verdict.word == "fails" else ""
    return f"{signed(item.mean)} {study.unit} {_interval(item)}{beside}{fails}"


def _effects(items: Sequence[Contrast]) -> str:
    ordered = sorted(items, key=lambda item: -abs(item.mean))
    return several([f"{_name(item)} {signed(item.mean)} {_interval(item)}" for item in ordered])


def _interval(item: Contrast) -> str:
    return "(identical in every seed)" if item.status == "identical" else f"[{signed(item.low)}, {signed(item.high)}]"


def _name(item: Contrast) -> str:
    return f"{item.cell.format} {item.cell.arm}"


def _pair(group: Sequence[Contrast]) -> str:
    return f"{' = '.join(dict.fromkeys(item.cell.format for item in group))} with {group[0].cell.arm}"
