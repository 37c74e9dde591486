"""Where each number comes from, what it cost, and whether the records are whole."""

from __future__ import annotations

from collections.abc import Mapping

from altgrad.analysis.cells import format_order
from altgrad.analysis.grids import chosen
from altgrad.analysis.records import UNRESOLVED
from altgrad.analysis.tables import DASH, Table
from altgrad.results.elsewhere import seeds_of
from altgrad.results.evidence import Evidence
from altgrad.sweep.record.layout import shards


def costs(parts: Mapping[str, Evidence]) -> Table:
    """A line per sweep: how much was run, how it ended, what it took."""
    columns = ("sweep", "trials", "with a result", "ended", "steps recorded wrongly", "seeds", "CPU-hours", "hours run")
    lines = [
        (
            name,
            str(len(part.trials)),
            str(part.results),
            ", ".join(f"{count} {kind}" for kind, count in part.outcomes.items()),
            str(part.repeated_steps),
            seeds_of(part.study),
            f"{part.cpu_hours:.2f}",
            f"{part.wall_hours:.2f}",
        )
        for name, part in parts.items()
    ]
    hours = [sum(part.cpu_hours for part in parts.values()), sum(part.wall_hours for part in parts.values())]
    trials, results = (
        sum(values) for values in zip(*((len(p.trials), p.results) for p in parts.values()), strict=True)
    )
    lines.append(("all", str(trials), str(results), DASH, DASH, DASH, f"{hours[0]:.2f}", f"{hours[1]:.2f}"))
    return Table(columns, lines, frozenset({1, 2, 4, 6, 7}))


def sources(parts: Mapping[str, Evidence]) -> Table:
    """A line per sweep: the command, the commits that ran it, where, on what data."""
    columns = ("sweep", "command", "commits", "machine, Python", "torch", "numerics", "data")
    lines = []
    for name, part in parts.items():
        manifest = part.manifest
        machine, versions, data = (manifest.get(key) or {} for key in ("machine", "versions", "data"))
        where = (machine.get("processor"), f"{machine['cores']} cores" if machine else None, manifest.get("python"))
        sha256 = data.get("sha256")
        lines.append(
            (
                f"[{name}](sweeps/study/{name})",
                f"`python sweeps/study_{name}.py`",
                ", ".join(part.commits) or DASH,
                ", ".join(str(text) for text in where if text) or DASH,
                str(versions.get("torch", DASH)),
                str(manifest.get("numerics", DASH)),
                f"{data['source']}, sha256 {sha256[:12]}" if sha256 else DASH,
            )
        )
    return Table(columns, lines)


def lacking(parts: Mapping[str, Evidence]) -> str:
    """What of the plan has no result yet, in a sentence; '' where everything has."""
    texts = []
    for name, part in parts.items():
        left = int((part.trials["state"] == UNRESOLVED).sum())
        if left:
            texts.append(f"{name}: {left} of {len(part.trials)} trials")
    return f"Not finished: {'; '.join(texts)}." if texts else ""


def rates_table(part: Evidence) -> Table:
    """The settled rates, a line per arm and policy, a column per format; † at an end of the grid."""
    cells = part.study.cells
    names = sorted({cell.format for cell in cells}, key=format_order)
    rows = dict.fromkeys((cell.arm, cell.policy) for cell in cells)
    by_key = {cell.key: cell for cell in cells}
    lines = []
    for arm, policy in rows:
        found = [by_key.get((name, arm, policy)) for name in names]
        texts = []
        for cell in found:
            if cell is None:
                texts.append(DASH)
                continue
            settled, tried = chosen(cell.tried, None).lr, [one.lr for one in cell.tried]
            is_end = len(tried) > 1 and settled in (min(tried), max(tried))
            texts.append(f"{1000 * settled:g}{' †' if is_end else ''}")
        lines.append((arm, policy, *texts))
    return Table(("arm", "policy", *names), lines, frozenset(range(2, len(names) + 2)), "arm")


def shard_count(parts: Mapping[str, Evidence]) -> tuple[int, float]:
    """How many shards there are, and their megabytes."""
    found = [shard for part in parts.values() for shard in shards(part.folder)]
    return len(found), sum(path.stat().st_size for shard in found for path in shard.iterdir()) / 1e6
