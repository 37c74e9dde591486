"""Which formats benefit from geometry-aware updates beyond what the step rule gives in BF16: a word for each pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from altgrad.analysis.cells import Cell, Key, format_order
from altgrad.analysis.contrasts import PRIMARY_FREE, Contrast
from altgrad.analysis.figures import drawn
from altgrad.analysis.grids import chosen
from altgrad.analysis.inference import ALPHA, t_interval
from altgrad.analysis.palette import FAINT, INK, SOFT, line_of
from altgrad.analysis.study import Study, best_of
from altgrad.analysis.tables import DASH, Table
from altgrad.analysis.twins import twin_map
from altgrad.analysis.wording import listed, signed, size

ARMS = ("manifold", "manifold_sr", "grid")
SAME_STEP = frozenset({("E0M7", "manifold"), ("E0M7", "manifold_sr")})
"""E0M7 has one spacing: there these arms step as the plain ones, and interact by construction, by minus BF16's gain."""
Word = Literal["more", "less", "equal", "open"]
Again = Literal["confirmed", "contradicted", "not decided", ""]
AtOneRate = Mapping[Key, tuple[float, float, float]]
"""By format, arm and policy: the mean interaction at one rate per arm in every format, and its 95 % t interval."""


@dataclass(frozen=True)
class Judged:
    """A format and arm under a policy: `item` is its gain beyond BF16's, `longer` the same over more steps.

    `why` says what the word rests on where it is no interval: stops, ties, tests that disagree, seeds that lack.
    `limit`: within what it counts as equal; `gain`: what the arm gains in BF16, nats.
    """

    item: Contrast
    word: Word
    why: str
    limit: float
    gain: float
    longer: Contrast | None = None
    longer_word: Word | None = None
    at_one_rate: tuple[float, float, float] | None = None

    @property
    def again(self) -> Again:
        """Whether the longer runs say the same."""
        if self.longer_word is None:
            return ""
        if "open" in (self.word, self.longer_word):
            return "not decided"
        if self.word == self.longer_word:
            return "confirmed"
        return "contradicted" if {self.word, self.longer_word} == {"more", "less"} else "not decided"

    @property
    def is_same_step(self) -> bool:
        """Whether the arm's step is the plain one in this format."""
        return (self.item.cell.format, self.item.cell.arm) in SAME_STEP

    @property
    def turns(self) -> bool:
        """Whether it has the other sign at one rate per arm, beyond that interval."""
        if self.at_one_rate is None:
            return False
        _, low, high = self.at_one_rate
        return (low > 0 and self.item.mean < 0) or (high < 0 and self.item.mean > 0)

    @property
    def name(self) -> str:
        return f"{self.item.cell.format} {self.item.cell.arm}"


def judged_pairs(study: Study, longer: Study | None = None, at_one_rate: AtOneRate | None = None) -> list[Judged]:
    """Every format × ARMS × policy, in the order of formats."""
    later: Mapping[Key, Contrast] = {item.cell.key: item for item in _beyond(longer)} if longer is not None else {}
    found = []
    for item in _beyond(study):
        word, why = _word(study, item)
        again = later.get(item.cell.key)
        in_bf16 = study.gain_in("BF16", item.cell)
        found.append(
            Judged(
                item,
                word,
                why,
                study.equal_limit(item),
                math.nan if in_bf16 is None else in_bf16.mean,
                again,
                None if again is None or longer is None else _word(longer, again)[0],
                (at_one_rate or {}).get(item.cell.key),
            )
        )
    order = {arm: place for place, arm in enumerate(ARMS)}
    return sorted(found, key=lambda one: (one.item.cell.policy, order[one.item.cell.arm], _format(one)))


def _format(one: Judged) -> tuple[int, int, str]:
    return format_order(one.item.cell.format)


def _beyond(study: Study) -> list[Contrast]:
    return [item for item in study.beyond if item.kind == "beyond BF16" and item.cell.arm in ARMS]


def _word(study: Study, item: Contrast) -> tuple[Word, str]:
    if item.status == "identical":
        return "equal", "identical in every seed"
    if item.status == "stopped":
        return _word_of_stops(study, item)
    if item.status != "measured":
        return "open", item.status
    # A lost seed must not lose the second test: it counts from the plan's ten seeds on, also where one is missing.
    is_free = study.pairs < PRIMARY_FREE or item.p_free <= ALPHA
    has_learned = item.cell.learned or item.other.learned
    if item.is_apart and is_free and item.median * item.mean > 0 and has_learned:
        return ("more" if item.mean > 0 else "less"), ""
    if item.within(study.equal_limit(item)):
        return "equal", "the tests disagree on a difference" if item.disagrees else ""
    if item.is_apart:
        return "open", "has not learned" if not has_learned else "the tests disagree" if not is_free else "median turns"
    seeds = item.seeds_needed
    return "open", "more than 60 seeds more" if seeds is None else f"{seeds} seeds more"


def _word_of_stops(study: Study, item: Contrast) -> tuple[Word, str]:
    """By the exact test of the stops, which speaks of the format only where BF16's runs had none."""
    gain = study.gain_of(item.cell)
    own, plain = item.cell, item.other
    counts = f"stopped: {own.arm} {len(own.stops)} of {own.n}, {plain.arm} {len(plain.stops)} of {plain.n}"
    in_bf16 = [cell for cell, _ in item.terms if cell.format != own.format]
    if gain is None or not gain.decided or any(cell.stops for cell in in_bf16):
        return "open", counts
    return ("more" if len(own.stops) < len(plain.stops) else "less"), counts


def at_one_rate(rates: Study) -> AtOneRate:
    """From a sweep over rates: each arm in every format at the rate that is best for it in BF16."""
    by_rate: dict[tuple[Key, float], Cell] = {
        (cell.key, tried.lr): tried for cell in rates.cells for tried in (cell.tried or (cell,))
    }
    best = {cell.arm: chosen(cell.tried, None).lr for cell in rates.cells if cell.format == "BF16" and cell.tried}
    found = {}
    for item in _beyond(rates):
        cells = [(by_rate.get((cell.key, best.get(cell.arm, math.nan))), weight) for cell, weight in item.terms]
        terms = [(cell, weight) for cell, weight in cells if cell is not None and cell.losses]
        if len(terms) < len(cells):
            continue
        seeds = sorted(set.intersection(*(set(cell.losses) for cell, _ in terms)))
        values = [math.fsum(weight * cell.losses[seed] for cell, weight in terms) for seed in seeds]
        if len(values) > 1:
            found[item.cell.key] = (math.fsum(values) / len(values), *t_interval(values))
    return found


def most(study: Study, policy: str) -> str:
    """The pairs that may gain most beyond BF16, or that none gains more than in BF16."""
    groups, leads = best_of(study.beyond, policy, twin_map(study.cells))
    if not groups:
        return f"{policy}: nothing could be compared."
    names = [f"{group[0].cell.format} {group[0].cell.arm}" for group in groups]
    if not any(_word(study, group[0])[0] == "more" for group in groups):
        return f"{policy}: none is decided to gain more than in BF16 (least harmed may be: {listed(names, 'or')})."
    return f"{policy}: {names[0]} gains most (decided)." if leads else f"{policy}: it may be {listed(names, 'or')}."


def table(pairs: Sequence[Judged], policy: str) -> Table:
    """The pairs of one policy: interaction, interval, both tests, word, what longer runs say."""
    columns = (
        "arm",
        "format",
        "gain in BF16",
        "interaction",
        "simultaneous interval",
        "median",
        "p, sign flips",
        "equal within",
        "seeds",
        "at one rate, 3 seeds",
        "word",
        "at 1 000 steps",
        "word there",
    )
    lines = []
    for one in (one for one in pairs if one.item.cell.policy == policy):
        item = one.item
        lines.append(
            (
                item.cell.arm,
                shown(item.cell.format, policy),
                signed(one.gain) if math.isfinite(one.gain) else DASH,
                signed(item.mean) if math.isfinite(item.mean) else DASH,
                _interval(item),
                signed(item.median) if math.isfinite(item.median) else DASH,
                f"{item.p_free:.3f}" if math.isfinite(item.p_free) else DASH,
                f"± {size(one.limit)}",
                str(item.n),
                DASH if one.at_one_rate is None else signed(one.at_one_rate[0]) + ("" if not one.turns else " (turns)"),
                _said(one),
                DASH if one.longer is None else f"{signed(one.longer.mean)} {_interval(one.longer)}",
                one.longer_word or DASH,
            )
        )
    return Table(columns, lines, frozenset({2, 3, 4, 5, 6, 7, 8, 9}), "arm")


def _said(one: Judged) -> str:
    is_decided = one.word in ("more", "less")
    notes = [one.why] if one.why else []
    if one.is_same_step:
        notes.append("by construction")
    elif is_decided and one.turns:
        notes.append("at its own rate")
    return (f"**{one.word}**" if is_decided else one.word) + (f" ({'; '.join(notes)})" if notes else "")


def shown(format: str, policy: str) -> str:
    """The format's name; of E4M3 with 8-bit gradients, both formats'."""
    return "E4M3 / E5M2" if (format, policy) == ("E4M3", "uniform_full") else format


def _interval(item: Contrast) -> str:
    return f"[{signed(item.low)}, {signed(item.high)}]" if math.isfinite(item.half) else DASH


def sentence(pairs: Sequence[Judged]) -> str:
    """The answer in one sentence: how many benefit more or less, are equal, are open."""
    free = [one for one in pairs if not one.is_same_step]
    parts = []
    for word, text in (
        ("more", "gain more than in BF16"),
        ("less", "gain less"),
        ("equal", "gain as much, within the margin"),
        ("open", "are open"),
    ):
        if own := [one for one in free if one.word == word]:
            parts.append(f"{len(own)} {text}")
    return (
        f"Of {len(free)} pairs of format and arm, over both policies, without E0M7 under manifold steps, "
        f"{listed(parts)}."
    )


def named(pairs: Sequence[Judged], word: Word) -> str:
    """The pairs of a word, by arm: 'manifold: E0M7, E7M0; grid: E7M0'."""
    by_arm: dict[str, list[str]] = {}
    for one in pairs:
        if one.word == word and not one.is_same_step:
            by_arm.setdefault(one.item.cell.arm, []).append(one.item.cell.format)
    return "; ".join(f"{arm}: {', '.join(dict.fromkeys(formats))}" for arm, formats in by_arm.items())


def forest(pairs: Sequence[Judged], policies: Sequence[str], path: Path) -> bool:
    """Interactions with their intervals: a panel per arm and policy, a line per format; hollow: longer runs."""
    measured = [one for one in pairs if math.isfinite(one.item.half)]
    arms = [arm for arm in ARMS if any(one.item.cell.arm == arm for one in measured)]
    if not measured:
        return False
    names = sorted({one.item.cell.format for one in measured}, key=format_order)
    with drawn(path, 1.2 + len(policies) * (0.5 + 0.34 * len(names))) as figure:
        grid = figure.subplots(len(policies), len(arms), sharey=True, squeeze=False, sharex=True)
        for row, policy in enumerate(policies):
            for column, arm in enumerate(arms):
                axes = grid[row][column]
                own = [one for one in measured if (one.item.cell.arm, one.item.cell.policy) == (arm, policy)]
                for one in own:
                    look, place = line_of(one.item.cell.format), names.index(one.item.cell.format)
                    marks = {"color": look["color"], "capsize": 2, "lw": 1.4}
                    axes.errorbar(one.item.mean, place - 0.14, xerr=one.item.half, fmt=look["marker"], ms=5, **marks)
                    if one.longer is not None and math.isfinite(one.longer.half):
                        hollow = marks | {"mfc": "white", "lw": 0.9}
                        axes.errorbar(
                            one.longer.mean, place + 0.18, xerr=one.longer.half, fmt=look["marker"], ms=4, **hollow
                        )
                if own:
                    axes.axvspan(-own[0].limit, own[0].limit, color=FAINT, lw=0)
                axes.axvline(0, color=INK, lw=0.8)
                axes.set_title(f"{arm}, {policy}", fontsize=10)
                axes.set_yticks(range(len(names)), names)
                axes.set_ylim(len(names) - 0.5, -0.5)
                axes.tick_params(axis="x", labelsize=8)
                axes.grid(False, axis="y")
        figure.supxlabel("gain beyond BF16's, nats; grey: equal; hollow: 1 000 steps", fontsize=9, color=SOFT)
    return True
