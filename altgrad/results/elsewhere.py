"""The question asked in other settings: longer, another text, another task, a larger net; and on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import spearmanr

from altgrad.analysis.study import Study
from altgrad.analysis.tables import DASH, Table
from altgrad.results.evidence import Evidence
from altgrad.results.geometry import Judged, judged_pairs, named
from altgrad.results.training import verdicts_of

TITLES = {
    "main": "400 steps, byte GPT 2 × 64 on pydoc",
    "long": "1 000 steps",
    "law": "EU law",
    "classify": "EU law by 21 domains, an encoder",
    "large": "4 × 128",
}
GPU = "## A 50 M GPT for 2 000 steps of real text"


def training_table(parts: Mapping[str, Evidence], policies: Sequence[str]) -> Table:
    """Which formats train, by setting and policy."""
    lines = []
    for name, title in TITLES.items():
        if name not in parts:
            continue
        for policy in policies:
            found = verdicts_of(parts[name].study, policy)
            if found:
                words = ("trains", "fails", "open")
                texts = (", ".join(" = ".join(one.formats) for one in found if one.word == word) for word in words)
                lines.append((title, policy, *(text or DASH for text in texts)))
    return Table(("setting", "policy", "train", "fail", "open"), lines, grouped_by="setting")


def geometry_table(parts: Mapping[str, Evidence], policies: Sequence[str]) -> Table:
    """Which pairs gain more or less than in BF16, by setting and policy, and whether in the main one's order."""
    main = _means(judged_pairs(parts["main"].study, None)) if "main" in parts else {}
    lines = []
    for name, title in TITLES.items():
        if name not in parts:
            continue
        pairs = judged_pairs(parts[name].study, None)
        for policy in policies:
            own = [one for one in pairs if one.item.cell.policy == policy]
            if own:
                words = (named(own, word) or DASH for word in ("more", "less", "equal"))
                opened = str(sum(one.word == "open" for one in own))
                rank = DASH if name == "main" else _rank(main, _means(own))
                lines.append((title, policy, *words, opened, rank))
    columns = ("setting", "policy", "more", "less", "equal", "open", "rank correlation with the main setting")
    return Table(columns, lines, frozenset({5, 6}), "setting")


def _means(pairs: Sequence[Judged]) -> dict[tuple[str, str, str], float]:
    return {one.item.cell.key: one.item.mean for one in pairs if one.item.n > 1}


def _rank(one: Mapping[tuple[str, str, str], float], other: Mapping[tuple[str, str, str], float]) -> str:
    shared = sorted(one.keys() & other.keys())
    if len(shared) < 4:
        return DASH
    return f"{spearmanr([one[key] for key in shared], [other[key] for key in shared]).statistic:+.2f} of {len(shared)}"


def gpu_text(bench: Path) -> str:
    """What docs/bench/gpu.md says of runs of this kind on a GPU, as it stands there."""
    text = bench.read_text(encoding="utf-8")
    if GPU not in text:
        return "docs/bench/gpu.md has no such runs."
    section = text.split(GPU, 1)[1].split("\n## ", 1)[0].strip()
    return section


def seeds_of(study: Study) -> str:
    """How many seeds cells have, '10' or '2–3'."""
    counts = sorted({cell.n for cell in study.cells})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}" if counts else DASH
