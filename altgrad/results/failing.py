"""Why formats fail: first signs of the cells that do, what sparing layers gives back, what missing bits cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from altgrad.analysis.cells import Cell
from altgrad.analysis.contrasts import Contrast, measured, reliefs, widths
from altgrad.analysis.signs import common_sign, pass_text
from altgrad.analysis.study import Study
from altgrad.analysis.tables import DASH, Table, excess_text, number
from altgrad.analysis.twins import twin_map
from altgrad.analysis.wording import listed, signed


def worse(study: Study) -> list[Cell]:
    """The 8-bit cells that fail, were stopped, or lie above BF16 by a decided amount."""
    found = []
    for cell in study.cells:
        if not cell.is_judged:
            continue
        verdict, against = study.verdicts.get(cell.key), study.comparison(cell)
        is_above = against is not None and against.decided and against.mean > 0
        if cell.stops or is_above or (verdict is not None and verdict.word == "fails"):
            found.append(cell)
    return found


def table(study: Study, policy: str) -> Table:
    """A line per cell that is worse: how far, how it ended, the first sign of failure and where."""
    columns = (
        "format",
        "arm",
        "excess over BF16 AdamW",
        "verdict",
        "stopped by",
        "first sign",
        "direction",
        "layers",
        "steps",
        "value",
        "limit",
        "runs that show it",
    )
    lines = []
    for cell in (cell for cell in worse(study) if cell.policy == policy):
        verdict, found = study.verdicts.get(cell.key), common_sign(list(cell.signs.values()))
        stop = f"{cell.main_stop().signal}, {len(cell.stops)} of {cell.n}" if cell.stops else DASH
        own = (DASH,) * 7
        if found is not None:
            first, last = found.steps
            own = (
                found.sign.signal,
                found.sign.direction,
                listed(found.kinds[:2]),
                str(first) if first == last else f"{first}–{last}",
                number(found.sign.value, ".3g", missing="not finite"),
                number(found.sign.limit, "g"),
                f"{found.seeds} of {found.runs}",
            )
        word = DASH if verdict is None else verdict.word
        lines.append((cell.format, cell.arm, DASH if verdict is None else excess_text(verdict), word, stop, *own))
    return Table(columns, lines, frozenset({2, 8, 9, 10}), "format")


def sentence(study: Study) -> str:
    """Where in a step the formats that are worse begin to fail, by format."""
    by_format: dict[str, Counter[tuple[str, str]]] = {}
    for cell in worse(study):
        found = common_sign(list(cell.signs.values()))
        if found is not None:
            by_format.setdefault(cell.format, Counter())[found.sign.signal, pass_text(found.sign.direction)] += 1
    if not by_format:
        return "No run shows a sign of failure."
    parts = []
    for format, counts in by_format.items():
        (signal, where), _ = counts.most_common(1)[0]
        parts.append(f"{format} by {signal} in the {where}")
    return f"What fails first shows, in most of a format's worse cells: {listed(parts)}."


def silent(study: Study) -> list[Cell]:
    """The cells that are worse than BF16 though no rule of failure ever held."""
    return [cell for cell in worse(study) if not any(cell.signs.values())]


def relief_table(study: Study) -> Table:
    """What sparing a kind of layer gives back, by policy."""
    return _effects(
        study, reliefs(study.cells), ("format", "arm", "policy", "uniform minus policy, nats", "interval", "decided")
    )


def width_table(study: Study) -> Table:
    """What an 8-bit format's missing mantissa bits cost."""
    return _effects(
        study, widths(study.cells), ("format", "arm", "policy", "minus 16 bits, nats", "interval", "decided")
    )


def _effects(study: Study, contrasts: Sequence[Contrast], columns: Sequence[str]) -> Table:
    lines = []
    for item in measured(contrasts, twin_map(study.cells), study.reference):
        if item.n < 2 or item.status == "stopped":
            continue
        interval = f"[{signed(item.low)}, {signed(item.high)}]"
        decided = "**yes**" if item.decided else "identical" if item.status == "identical" else "no"
        lines.append((item.cell.format, item.cell.arm, item.cell.policy, signed(item.mean), interval, decided))
    return Table(columns, lines, frozenset({3, 4}), "format")
