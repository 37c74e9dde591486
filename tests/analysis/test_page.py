"""The page of a report as a reader has it: wide, narrow, dark, printed, and by axe-core's rules of accessibility."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, browser, executable
from synthetic import Plan, explode, stall, write_ledger

from altgrad.analysis.report import write_report

pytestmark = pytest.mark.browser
AXE = "axe-core@4"
PRINTED_WIDTH = 1047
"""CSS pixels of an A4 page in landscape between margins of 10 mm."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of section that a synthetic sweep can have, of many columns."""

    def result(name: str, arm: str, seed: int):
        if name == "E7M0":
            return explode() if arm == "grid" else stall()
        return (0.2 if name == "E0M7" else 0.01) + 0.004 * seed if name != "BF16" else 0.0

    out_dir = tmp_path_factory.mktemp("sweep")
    arms = ["adamw", "adamw_sr", "manifold", "grid"]
    rates = Plan(["FP32", "BF16", "E0M7", "E5M2", "E7M0"], arms, 3, 40, result, lrs=(1e-3, 3e-3))
    write_ledger(out_dir, rates, {"spec": {"name": "page", "axes": {}}, "manifest": {"git": None, "argv": []}})
    write_report(out_dir)
    return out_dir / "report" / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if executable() is None:
        pytest.skip("no Chromium on this machine")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script, from npm."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("no npm on this machine, which axe-core comes from")
    done = subprocess.run(["npm", "pack", AXE], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    packed = list(folder.glob("*.tgz"))
    if not packed:
        pytest.skip(f"npm pack {AXE} brought nothing: {done.stderr.strip()[-200:]}")
    shutil.unpack_archive(packed[0], folder, filter="data")
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_its_window(report: Path, page: Page, width: int, dark: bool) -> None:
    page.open(report, width, dark=dark)
    seen = page.run(
        "({wide: document.documentElement.scrollWidth - innerWidth, loaded: performance.getEntriesByType('resource')"
        ".length, figures: [...document.querySelectorAll('svg[role=img]')].map(f => [f.getBoundingClientRect().height, "
        "f.querySelector('title').textContent])})"
    )
    assert seen["wide"] <= 0, "the page scrolls sideways"
    assert seen["loaded"] == 0
    drawn = len(list((report.parent / "figures").glob("*.svg")))
    assert len(seen["figures"]) == drawn > 5 and all(height > 150 and title for height, title in seen["figures"])


def test_ids_are_unique_and_links_lead_somewhere(report: Path, page: Page) -> None:
    page.open(report, 1200)
    seen = page.run(
        "({ids: [...document.querySelectorAll('[id]')].map(e => e.id), links: [...document.links]"
        ".map(a => a.getAttribute('href')).filter(h => h.startsWith('#')).map(h => h.slice(1))})"
    )
    assert len(seen["ids"]) == len(set(seen["ids"]))
    assert len(seen["links"]) > 40 and set(seen["links"]) <= set(seen["ids"])


def test_the_first_column_stays_in_a_narrow_window(report: Path, page: Page) -> None:
    page.open(report, 390)
    found = page.run(
        "[...document.querySelectorAll('.wide')].filter(b => b.querySelector('table') && b.scrollWidth > b.clientWidth)"
        ".map(b => { b.scrollLeft = 200; const r = b.querySelector('tbody th').getBoundingClientRect();"
        "return Math.abs(r.left - b.getBoundingClientRect().left) })"
    )
    assert len(found) >= 3 and max(found) < 1


def test_the_dark_page_has_no_bright_areas(report: Path, page: Page) -> None:
    page.open(report, 1200, dark=True)
    bright = page.run(
        "(() => { const light = (c, share) => { const v = c.match(/[0-9.]+/g); return v && (v[3] ?? 1) * share > .5 && "
        "Math.min(...v.slice(0, 3)) > 200 }; const found = [];"
        "for (const e of document.querySelectorAll('body, main *:not(defs *, svg, g, text, use)')) {"
        "const s = getComputedStyle(e), r = e.getBoundingClientRect();"
        "const fill = e.closest('svg') && s.fill != 'none' && light(s.fill, s.fillOpacity * s.opacity);"
        "if (r.width * r.height > 900 && (light(s.backgroundColor, 1) || fill)) found.push(e.outerHTML.slice(0, 200)) }"
        "return found })()"
    )
    assert not bright, "an area as bright as a page of paper"


def test_a_print_holds_every_column(report: Path, page: Page, tmp_path: Path) -> None:
    page.open(report, PRINTED_WIDTH)
    page.call("Emulation.setEmulatedMedia", media="print")
    seen = page.run(
        "({right: Math.max(...[...document.querySelectorAll('th, td, svg, pre')].map(e => "
        "e.getBoundingClientRect().right)), hidden: [...document.querySelectorAll('th')].filter(e => "
        "!e.getClientRects().length).length, scheme: getComputedStyle(document.body).backgroundColor})"
    )
    page.call("Emulation.setEmulatedMedia", media="")
    assert seen["right"] <= PRINTED_WIDTH and seen["hidden"] == 0
    page.printed(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_axe_finds_no_fault(report: Path, page: Page, axe: str, width: int, dark: bool) -> None:
    page.open(report, width, dark=dark)
    page.run(f"{axe}; 0")
    found = page.run("axe.run(document, {resultTypes: ['violations']}).then(r => JSON.stringify(r.violations))")
    faults = [(item["id"], item["impact"], item["nodes"][0]["html"][:120]) for item in json.loads(found)]
    assert not faults
