"""`python -m altgrad.results`: writes RESULTS.md and docs/results from what is committed in sweeps/study."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from altgrad.results.chapters import chapters
from altgrad.results.evidence import load
from altgrad.results.page import Figures, page

ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> int:
    """Writes the page and its figures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m altgrad.results", description=__doc__)
    parser.add_argument("--study", type=Path, default=ROOT / "sweeps" / "study", help="the exports of its sweeps")
    parser.add_argument("--to", type=Path, default=ROOT, help="the folder of RESULTS.md and docs/results")
    asked = parser.parse_args(argv)
    parts = load(asked.study)
    if "main" not in parts:
        print(
            f"{asked.study}: no export of the main sweep (main/0001-…); sweeps/study/run.sh makes it", file=sys.stderr
        )
        return 2
    folder = asked.to / "docs" / "results"
    shutil.rmtree(folder, ignore_errors=True)
    figures = Figures(folder, "docs/results")
    text = page("Results", chapters(parts, figures, ROOT), figures)
    (asked.to / "RESULTS.md").write_text(text, encoding="utf-8")
    print(f"{asked.to / 'RESULTS.md'}: {len(text.splitlines())} lines, {len(list(folder.glob('*.png')))} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
