"""Which 8-bit formats train: by policy, each format's arms against BF16 AdamW; their order beside the published law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from altgrad.analysis.cells import Cell, format_order
from altgrad.analysis.contrasts import table as by_seed
from altgrad.analysis.contrasts import weights_of
from altgrad.analysis.figures import drawn
from altgrad.analysis.inference import best_set, t_interval
from altgrad.analysis.palette import INK, SOFT, line_of
from altgrad.analysis.study import Study
from altgrad.analysis.tables import DASH, Table, excess_text
from altgrad.analysis.twins import twin_map
from altgrad.analysis.verdicts import FormatVerdict, format_verdicts
from altgrad.analysis.wording import counted, listed, percent
from altgrad.results.evidence import Evidence
from altgrad.results.geometry import shown

LAW = ("E4M3", "E3M4", "E5M2", "E2M5", "E6M1", "E7M0", "E0M7")
"""Of the distinct grids, best first, by arXiv 2501.02423: penalties fall with E + .5, a little less with M + .5."""
ONE_ARM = "adamw"
NARROW = 0.02
"""A margin beside the usual one: 2 %."""


def verdicts_of(study: Study, policy: str) -> list[FormatVerdict]:
    """On each format under one policy; none where BF16 AdamW has not learned, and nothing is judged."""
    if not study.is_sound:
        return []
    own = [cell for cell in study.cells if cell.policy == policy and cell.is_judged]
    return format_verdicts(own, study.verdicts, twin_map(study.cells))


@dataclass(frozen=True)
class Trained:
    """A format under a policy: the verdicts on it at one length and at another, each also at a narrower margin."""

    formats: tuple[str, ...]
    policy: str
    short: FormatVerdict
    long: FormatVerdict | None
    narrow: tuple[str, ...]

    @property
    def word(self) -> str:
        """The longer runs' where they were made."""
        return (self.long or self.short).word


def trained(main: Evidence, longer: Evidence | None, policy: str) -> list[Trained]:
    """Every format under one policy."""
    later = {} if longer is None else {one.formats: one for one in verdicts_of(longer.study, policy)}
    parts = [main] if longer is None else [main, longer]
    narrow = [{one.formats: one.word for one in verdicts_of(part.study_at(NARROW), policy)} for part in parts]
    return [
        Trained(one.formats, policy, one, later.get(one.formats), tuple(word.get(one.formats, DASH) for word in narrow))
        for one in verdicts_of(main.study, policy)
    ]


def table(found: Sequence[Trained]) -> Table:
    """A line per format: its word, and at each length the best arm, AdamW over master weights, and arms that fail."""
    columns = (
        "format",
        "word",
        "400 steps",
        "best arm",
        "excess",
        "AdamW's",
        "arms that fail",
        "1 000 steps",
        "best arm",
        "excess",
        "AdamW's",
        "arms that fail",
        "within 2 %, 400 / 1 000",
    )
    lines = [
        (
            " = ".join(shown(name, one.policy) for name in one.formats),
            f"**{one.word}**",
            *_texts(one.short),
            *(_texts(one.long) if one.long is not None else (DASH,) * 5),
            " / ".join(one.narrow),
        )
        for one in found
    ]
    return Table(columns, lines, frozenset({4, 5, 9, 10}))


def _texts(found: FormatVerdict) -> tuple[str, ...]:
    plain = next((arm for arm in found.arms if arm.cell.arm == ONE_ARM), None)
    fails = [arm.cell.arm for arm in found.arms if arm.word == "fails"]
    return (
        found.word,
        found.best.cell.arm,
        excess_text(found.best),
        DASH if plain is None else excess_text(plain),
        listed(fails) if fails else DASH,
    )


def sentence(by_policy: Mapping[str, Sequence[Trained]]) -> str:
    """Which formats train, which fail, which are open, under each policy."""
    parts = []
    for policy, found in by_policy.items():
        said = []
        for word, text in (("trains", "train"), ("fails", "fail"), ("open", "are open")):
            names = [" = ".join(one.formats) for one in found if one.word == word]
            if names:
                said.append(f"{'all' if len(names) == len(found) else listed(names)} {text}")
        if said:
            parts.append(f"{_what(policy)}: {'; '.join(said)}")
    if not parts:
        return "Nothing is judged: BF16 AdamW has not learned."
    return f"{'. '.join(part[0].upper() + part[1:] for part in parts)}."


def _what(policy: str) -> str:
    known = {"uniform": "with weights in 8 bits", "uniform_full": "with weights, activations and gradients in 8 bits"}
    return known.get(policy, f"under {policy}")


def excesses(study: Study, policy: str, path: Path, arms: Sequence[str]) -> bool:
    """Excess over BF16 AdamW by format, a panel per arm, each seed a dot."""
    reference = study.reference
    own = [cell for cell in study.cells if cell.policy == policy and cell.is_judged and cell.arm in arms]
    if reference is None or not own:
        return False
    names = sorted({cell.format for cell in own}, key=format_order)
    with drawn(path, 1.0 + 0.36 * len(names)) as figure:
        for axes, arm in zip(
            figure.subplots(1, len(arms), sharey=True, sharex=True, squeeze=False)[0], arms, strict=True
        ):
            for cell in (cell for cell in own if cell.arm == arm):
                place, look = names.index(cell.format), line_of(cell.format)
                values = [
                    100 * (cell.losses[k] / reference.losses[k] - 1) for k in cell.losses if k in reference.losses
                ]
                axes.plot(values, [place] * len(values), look["marker"], color=look["color"], ms=3.5, alpha=0.6, lw=0)
                if values:
                    axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=look["color"], lw=2)
            axes.axvline(0, color=INK, lw=0.8)
            axes.axvline(100 * study.margin, color=SOFT, lw=0.8, ls=(0, (4, 3)))
            axes.set_xscale("symlog", linthresh=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_title(arm, fontsize=10)
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(False, axis="y")
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
        figure.supxlabel("excess over BF16 AdamW's loss, %; dashed: the margin; a dot per seed", fontsize=9, color=SOFT)
    return True


def order_cells(study: Study, policy: str, without: Sequence[str] = ()) -> list[Cell]:
    """The 8-bit cells of AdamW over master weights that the law orders, in the order of formats."""
    own = [cell for cell in study.cells if (cell.arm, cell.policy) == (ONE_ARM, policy) and cell.format in LAW]
    return sorted(
        (cell for cell in own if cell.losses and cell.format not in without), key=lambda cell: format_order(cell.format)
    )


def rank_correlations(cells: Sequence[Cell]) -> list[float]:
    """Per seed, of the losses of formats with their places in the law's order."""
    seeds = sorted(set.intersection(*(set(cell.losses) for cell in cells))) if cells else []
    places = [LAW.index(cell.format) for cell in cells]
    return [float(spearmanr(places, [cell.losses[seed] for cell in cells]).statistic) for seed in seeds]


def order_text(study: Study, policy: str) -> str:
    """Whether the order agrees with the law's."""
    reference, texts, agrees = study.reference, [], True
    cells = order_cells(study, policy)
    for own in (cells, order_cells(study, policy, ("E4M3",))):
        found = rank_correlations(own)
        if len(found) < 2 or reference is None:
            return "not measured."
        low, high = t_interval(found)
        agrees &= low > 0.5
        texts.append(f"{np.mean(found):.2f} [{low:.2f}, {high:.2f}] over {counted(len(own), 'format')}")
    ordered = sorted(cells, key=lambda cell: cell.mean if math.isfinite(cell.mean) else math.inf)
    assert reference is not None
    excesses = [f"{shown(cell.format, policy)} {percent(_excess(cell, reference))}" for cell in ordered]
    best = [cell.format for cell in _best_formats(cells)]
    word = "agrees" if agrees and "E4M3" in best else "does not agree"
    names = listed([shown(name, policy) for name in best], "or")
    return (
        f"rank correlation with the law's order {listed(texts)}, {len(found)} seeds, 95 % intervals. The best may be "
        f"{names}. The order **{word}** by the plan's rule. Excess over BF16, least first: {', '.join(excesses)}."
    )


def _excess(cell: Cell, reference: Cell) -> float:
    shared = [seed for seed in cell.losses if seed in reference.losses]
    return float(np.mean([cell.losses[seed] / reference.losses[seed] - 1 for seed in shared]))


def _best_formats(cells: Sequence[Cell]) -> list[Cell]:
    # The least loss is the greatest gain.
    columns = by_seed([{seed: -loss for seed, loss in cell.losses.items()} for cell in cells])
    stays = best_set(columns, weights_of([((cell, -1),) for cell in cells]))
    return [cell for cell, is_in in zip(cells, stays, strict=True) if is_in]
