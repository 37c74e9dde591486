"""The table of requirements names nothing that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from altgrad.cli import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8")
IN_AUDIT = 49


def functions(path: str) -> set[str]:
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_id_of_the_audit_stands_once() -> None:
    ids = re.findall(r"^\| ([A-Z]{4,5}-\d\d) \|", TEXT, re.MULTILINE)
    assert len(ids) == len(set(ids)) == IN_AUDIT


def test_what_a_row_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.rsplit("|", 2)[1] for line in TEXT.splitlines() if re.match(r"\| (?!---)", line)]
    assert [row.strip() for row in rows if "`" not in row] == ["seen by", "seen by"]
    named = [re.fullmatch(r"(?:(tests/[\w/]+\.py)::(test_\w+)|altgrad ([a-z-]+))", text) for text in _quoted(rows)]
    assert None not in named, "a test as pytest takes it, or a command"
    found = [match.groups() for match in named if match is not None]
    assert not [f"{path}::{test}" for path, test, _ in found if path and test not in functions(path)]
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    ([a-z-]+)\s", capsys.readouterr().out, re.MULTILINE))
    assert not {command for *_, command in found if command} - commands


def _quoted(rows: list[str]) -> list[str]:
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
