"""The finding: what the sweep says, in a sentence or two, and how sure that is.

Three questions are answered in the order in which a reader asks them: which 8-bit formats train (within 10 %
of BF16's loss, or a classifier's error, in their best arm), which fail and by which signal, and which format
gains most from geometry-aware steps. The second line is the certainty. It separates what the seeds decide (gross
failures, at 2 seeds) from what they can't (close pairs: with n seeds an exact test cannot give a p below 2 / 2^n), and
says when trials are missing. Where BF16 itself was not run, or did not learn, there is no measure and the
finding says only that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from altgrad.analysis.cells import (
    ALPHA,
    MAIN_POLICY,
    MARGIN,
    REFERENCE_ARM,
    UNITS,
    Cell,
    Comparison,
    Study,
    is_eight_bit,
)
from altgrad.analysis.stats import p_floor, paired, signed


@dataclass(frozen=True)
class Finding:
    """The finding, how sure it is, how many of the trials have a result, and the report's `path`."""

    headline: str
    certainty: str
    results: int
    trials: int
    path: Path | None = None

    def __str__(self) -> str:
        return f"{self.headline}\n{self.certainty}"


@dataclass(frozen=True)
class _FormatVerdict:
    format: str
    verdict: str
    decided: bool
    best: Cell


def find(study: Study, results: int, trials: int, unevaluated: int = 0) -> Finding:
    """The finding of a study of which `results` of `trials` trials have a result.

    `unevaluated` of the others were trained through the last step asked for, but not evaluated at it.
    """
    missing = _missing_text(results, trials, unevaluated)
    policy = main_policy(study.cells)
    cells = [cell for cell in study.cells if cell.policy == policy and is_eight_bit(cell.format)]
    if not study.is_sound:
        headline = _unlearned(study.reference) if study.reference else _without_reference(study, cells)
        certainty = " ".join([*missing, _why_nothing_is_decided(study, cells, bool(missing))])
        return Finding(headline, certainty, results, trials)
    verdicts = _format_verdicts(study, cells)
    gain = best_gain(study, policy)
    parts = [
        _training_part(study, cells, verdicts),
        _failing_part(study, verdicts),
        _failing_arms_part(study, cells, verdicts),
        _gain_part(gain, study, policy),
    ]
    if policy != MAIN_POLICY:
        parts[0] = f"Under policy {policy}: {parts[0]}"
    headline = " ".join(part for part in parts if part)
    decided = _certainty(study, verdicts, gain) if cells else [_why_nothing_is_decided(study, cells, bool(missing))]
    return Finding(headline, " ".join([*missing, *decided]), results, trials)


def main_policy(cells: Sequence[Cell]) -> str:
    """The policy that the finding speaks of: uniform where it was run, else the first by name."""
    policies = sorted({cell.policy for cell in cells if is_eight_bit(cell.format)})
    return MAIN_POLICY if MAIN_POLICY in policies or not policies else policies[0]


def best_gain(study: Study, policy: str) -> Comparison | None:
    """The largest gain of a geometry-aware arm over AdamW in 8 bits: a rescue, else the least difference."""
    found = [item for item in _gains(study, policy) if item.kind in ("measured", "rescued")]
    if not found:
        return None
    return min(found, key=_order)


def twins(study: Study, gain: Comparison) -> list[str]:
    """The formats in which the same arm gains exactly the same: E0M7 and E1M6 are one grid up to a scale."""
    return [
        item.cell.format
        for item in _gains(study, gain.cell.policy)
        if item.cell.arm == gain.cell.arm
        and item.kind == gain.kind
        and (item is gain or (item.paired and dict(item.differences) == dict(gain.differences)))
    ]


def is_largest_decided(study: Study, gain: Comparison) -> bool:
    """Whether the gain differs from the best of every other format, pair by pair; False where there is no
    other.

    A rescue is the largest if it is the only one.
    """
    others: dict[str, Comparison] = {}
    same = twins(study, gain)
    for item in _gains(study, gain.cell.policy):
        name = item.cell.format
        if name in same or item.kind not in ("measured", "rescued"):
            continue
        if name not in others or _order(item) < _order(others[name]):
            others[name] = item
    if gain.kind == "rescued":
        return all(rival.kind != "rescued" for rival in others.values())
    return bool(others) and all(_smaller(gain, rival, len(others)) for rival in others.values())


def _gains(study: Study, policy: str) -> list[Comparison]:
    return [
        item
        for item in study.geometry
        if item.other.arm == REFERENCE_ARM
        and item.cell.policy == policy
        and is_eight_bit(item.cell.format)
        and item.cell.learned
    ]


def _order(item: Comparison) -> tuple[bool, float]:
    return item.kind != "rescued", item.paired.mean if item.paired else item.cell.mean


def interval_text(item: Comparison) -> str:
    """The mean difference and its 95 % interval, nats; one seed has no interval."""
    assert item.paired is not None
    if item.paired.n < 2:
        return f"{signed(item.paired.mean)} {item.cell.unit} (1 seed)"
    return f"{signed(item.paired.mean)} {item.cell.unit} [{signed(item.paired.low)}, {signed(item.paired.high)}]"


def stop_text(cell: Cell) -> str:
    """Why the cell's seeds were stopped, by their commonest signal and layer."""
    signal, layer = cell.main_stop()
    return signal + (f" in {layer}" if layer else "")


def _smaller(gain: Comparison, rival: Comparison, rivals: int) -> bool:
    common = sorted(set(gain.differences) & set(rival.differences))
    if not common:
        return False
    pair = paired([gain.differences[seed] - rival.differences[seed] for seed in common])
    return pair.mean < 0 and pair.p * rivals <= ALPHA


def _format_verdicts(study: Study, cells: Sequence[Cell]) -> list[_FormatVerdict]:
    found = []
    for name in dict.fromkeys(cell.format for cell in cells):
        arms = [cell for cell in cells if cell.format == name and cell.n]
        if not arms:
            continue
        judged = [(study.judgement(cell), cell) for cell in sorted(arms, key=lambda cell: cell.rank)]
        trains = [(judgement.decided, cell) for judgement, cell in judged if judgement.verdict == "trains"]
        best = judged[0][1]
        if trains:
            found.append(_FormatVerdict(name, "trains", any(decided for decided, _ in trains), trains[0][1]))
        elif all(judgement.verdict == "fails" for judgement, _ in judged):
            found.append(_FormatVerdict(name, "fails", all(item.decided for item, _ in judged), best))
        else:
            found.append(_FormatVerdict(name, "unclear", False, best))
    return found


def _training_part(study: Study, cells: Sequence[Cell], verdicts: Sequence[_FormatVerdict]) -> str:
    assert study.reference is not None
    if not verdicts:
        others = [
            f", {cell.format} at {_nats(cell.losses.values())}"
            for cell in study.cells
            if cell is not study.reference and cell.arm == REFERENCE_ARM and cell.losses and not cell.stops
        ]
        return (
            f"No 8-bit format {'has a result' if cells else 'was run'}; BF16 ends at {_reference_loss(study)} "
            f"{study.unit}{''.join(others)}."
        )
    trains = [item for item in verdicts if item.verdict == "trains"]
    within = f"within {MARGIN:.0%} of BF16's {study.measure} ({_reference_loss(study)} {study.unit})"
    if not trains:
        return (
            f"None of the {_count(len(verdicts))} 8-bit formats trains {within}."
            if len(verdicts) > 1
            else f"{verdicts[0].format}, the only 8-bit format run, does not train {within}."
        )
    best = min(trains, key=lambda item: item.best.rank)
    names = _listed(item.format for item in trains)
    verb = "trains" if len(trains) == 1 else "train"
    subject = (
        f"{_all(len(verdicts))} 8-bit formats train {within}"
        if len(trains) == len(verdicts) > 1
        else f"{names} {verb} {within}"
    )
    comparison = study.comparison(best.best)
    # A classifier is chosen on other documents than its distance is measured on.
    chosen, at = ("on validation documents", " on test documents") if best.best.chosen_by else ("measured", "")
    distance = f": {interval_text(comparison)} from BF16{at}" if comparison and comparison.paired else ""
    leader = f"best {chosen} {f'is {best.format} ' if len(trains) > 1 else ''}with {best.best.arm}"
    return f"{subject}; {leader}{distance}."


def _failing_part(study: Study, verdicts: Sequence[_FormatVerdict]) -> str:
    pieces = []
    for item in verdicts:
        if item.verdict == "unclear":
            pieces.append(f"{item.format} is unclear ({_seeds_text(item.best)})")
        elif item.verdict == "fails" and item.best.losses:
            reason = _failure_text(study, item.best)
            pieces.append(f"{item.format} fails ({item.best.arm}, its best arm, {reason})")
        elif item.verdict == "fails":
            pieces.append(f"{item.format} fails in every arm ({_failure_text(study, item.best)})")
    return "; ".join(pieces) + "." if pieces else ""


def _failing_arms_part(study: Study, cells: Sequence[Cell], verdicts: Sequence[_FormatVerdict]) -> str:
    """Arms that fail in formats that train with another arm, and how."""
    trains = {item.format for item in verdicts if item.verdict == "trains"}
    failing: dict[str, list[str]] = {}
    for cell in cells:
        if cell.format in trains and study.judgement(cell).verdict == "fails":
            failing.setdefault(cell.arm, []).append(f"{cell.format} ({_failure_text(study, cell)})")
    return "; ".join(f"{arm} fails in {_listed(names)}" for arm, names in failing.items()) + "." if failing else ""


def _failure_text(study: Study, cell: Cell) -> str:
    """Why a failing cell fails: what stopped it, that it did not learn, or how far above BF16 it ends."""
    if not cell.losses:
        return f"stopped by {stop_text(cell)}"
    if not any(map(cell.seed_learned, cell.losses)):
        return f"did not learn: {_course_text(cell)}"
    return f"ends {study.judgement(cell).excess:.0%} above BF16"


def _gain_part(gain: Comparison | None, study: Study, policy: str) -> str:
    if gain is None:
        return ""
    if gain.kind == "rescued":
        rescued = [item for item in _gains(study, policy) if item.kind == "rescued"]
        names = _listed(dict.fromkeys(item.cell.format for item in rescued))
        arms = _listed(dict.fromkeys(item.cell.arm for item in rescued))
        verb = "finishes" if len({item.cell.arm for item in rescued}) == 1 else "finish"
        return (
            f"Geometry-aware steps gain most in {names}, where AdamW is stopped by "
            f"{stop_text(gain.other)} and {arms} {verb}."
        )
    assert gain.paired is not None
    name = f"{_listed(twins(study, gain))} with {gain.cell.arm}"
    if gain.paired.mean >= 0:
        return (
            f"Geometry-aware steps gain nothing over AdamW in any 8-bit format (at best {name}: {interval_text(gain)})."
        )
    control = [
        item.paired.mean
        for item in study.geometry
        if item.paired
        and item.cell.format == "BF16"
        and (item.cell.arm, item.other.arm) == (gain.cell.arm, REFERENCE_ARM)
    ]
    beside = f"; the same arm in BF16: {signed(control[0])}" if control else ""
    return f"The largest gain of geometry-aware steps over AdamW is {name}: {interval_text(gain)}{beside}."


def _missing_text(results: int, trials: int, unevaluated: int) -> list[str]:
    parts = [] if results == trials else [f"Incomplete: {results} of {trials} trials have a result."]
    if unevaluated:
        who = "1 trial was" if unevaluated == 1 else f"{unevaluated} trials were"
        parts.append(
            f"{who} trained past the steps asked for without an evaluation there, so nothing is known of "
            "them at this length: ask for the length they were trained to, or start afresh."
        )
    return parts


def _why_nothing_is_decided(study: Study, cells: Sequence[Cell], is_incomplete: bool) -> str:
    if study.reference is not None and not study.is_sound:
        return "Nothing is decided: without a reference that learned there is no measure of any format."
    if not cells and not is_incomplete:
        return "All trials have a result, but there was nothing to decide: that takes an 8-bit format beside BF16."
    if study.reference is not None:
        return "Nothing is decided: no 8-bit format was run."
    return "Nothing is decided: there is no BF16 AdamW reference to compare with."


def _certainty(study: Study, verdicts: Sequence[_FormatVerdict], gain: Comparison | None) -> list[str]:
    parts = []
    seeds = min((cell.n for cell in study.cells if cell.n), default=0)
    count = f"{seeds} seed{'s' if seeds != 1 else ''}"
    decided = [
        f"{_listed(names)} {verdict if len(names) == 1 else verdict[:-1]}"
        for verdict in ("trains", "fails")
        if (names := [item.format for item in verdicts if item.decided and item.verdict == verdict])
    ]
    if decided:
        parts.append(f"Decided ({count}): {_listed(decided)}.")
    if open_ := [item.format for item in verdicts if not item.decided]:
        verb = "trains" if len(open_) == 1 else "train"
        parts.append(f"Not decided ({count}): whether {_listed(open_)} {verb}.")
    if gain is not None:
        parts.append(_gain_certainty(study, gain))
    if seeds and p_floor(seeds) > ALPHA:
        parts.append(f"Close pairs are not decided ({count}: p cannot go below {p_floor(seeds):.2g}).")
    return parts or ["Nothing is decided: no 8-bit format has a result."]


def _gain_certainty(study: Study, gain: Comparison) -> str:
    names = _listed(twins(study, gain))
    if not gain.decided:
        reason = "" if gain.paired is None else f" (adjusted p {gain.p_adjusted:.2g})"
        return f"Whether geometry changes the {study.measure} in {names} is not decided{reason}."
    largest = "" if is_largest_decided(study, gain) else "; that no other format gains as much is not"
    return f"The difference that geometry makes in {names} is decided{largest}."


def _unlearned(reference: Cell) -> str:
    count = sum(not reference.seed_learned(seed) for seed in reference.losses)
    seeds = "" if count == len(reference.losses) else f" in {count} of {len(reference.losses)} seeds"
    return (
        f"The reference, BF16 AdamW, did not learn{seeds} ({_course_text(reference)}), so nothing can be said "
        "of any format."
    )


def _course_text(cell: Cell) -> str:
    """From where to where the finished seeds went, means of those whose first step is known, nats."""
    end = f"ends at {_nats(cell.losses.values())} {cell.unit}"
    starts = [start for seed, start in cell.starts.items() if seed in cell.losses and not math.isnan(start)]
    begin = "first step" if cell.unit == UNITS["lm"] else "commonest labels"
    return f"{end}, {begin} {_nats(starts)}" if starts else f"{end}, its first step is not recorded"


def _without_reference(study: Study, cells: Sequence[Cell]) -> str:
    if not cells and (others := [cell for cell in study.cells if cell.losses and not cell.stops]):
        best = min(others, key=lambda cell: cell.rank)
        return (
            f"No 8-bit format and no BF16 AdamW reference was run; {best.format} with {best.arm} ends at "
            f"{_nats(best.losses.values())} {best.unit}."
        )
    finished = [cell for cell in cells if cell.losses and not cell.stops]
    stopped = [cell for cell in cells if cell.stops and not cell.losses]
    parts = ["No BF16 AdamW reference has finished, so no format can be said to train or to fail."]
    if finished:
        best = min(finished, key=lambda cell: cell.rank)
        parts.append(f"The lowest 8-bit {study.measure} is {best.mean:.3f} {best.unit}, {best.format} with {best.arm}.")
    if stopped:
        parts.append(f"Stopped in every seed: {_listed(f'{cell.format} {cell.arm}' for cell in stopped)}.")
    return " ".join(parts)


def _reference_loss(study: Study) -> str:
    assert study.reference is not None
    return _nats(study.reference.losses.values())


def _nats(losses: Iterable[float]) -> str:
    values = list(losses)
    mean = math.fsum(values) / len(values)
    return f"{mean:.3f}" if abs(mean) < 1000 else f"{mean:.2g}"


def _seeds_text(cell: Cell) -> str:
    stopped = f"{len(cell.stops)} of {cell.n} seeds stopped"
    return f"{cell.arm}: {stopped if cell.stops else 'seeds disagree'}"


def _all(number: int) -> str:
    return "Both" if number == 2 else f"All {_count(number)}"


def _count(number: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
    return words[number] if number < len(words) else str(number)


def _listed(names: Iterable[str]) -> str:
    items = list(names)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
