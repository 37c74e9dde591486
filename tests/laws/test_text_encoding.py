"""Text is UTF-8 wherever it is read or written: the locale's encoding is another one on another machine."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("altgrad", "cluster", "sweeps") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"}
OTHER = {"os", "gzip", "request", "webbrowser", "tarfile", "zipfile", "Image"}
"""What has an `open` that is not about text, or not by default."""


def unstated(tree: ast.AST) -> Iterator[int]:
    """The lines of calls that open or decode text without saying how."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = getattr(getattr(called, "value", None), "id", "")
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if owner == "subprocess":
            is_text = {"text", "universal_newlines"} & given.keys()
        else:
            modes = [given.get("mode"), *node.args] if "open" in name or "File" in name else []
            modes = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
            is_binary = any("b" in mode and set(mode) <= set("rwaxbt+") for mode in modes)
            is_binary |= name.endswith("TemporaryFile") and not modes
            is_text = name in FILES and not is_binary and not (owner in OTHER and name == "open")
        if is_text and "encoding" not in given:
            yield node.lineno


def test_every_text_states_its_encoding() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    assert not [
        f"{path.relative_to(ROOT)}:{line}" for path, text in texts.items() for line in unstated(ast.parse(text))
    ]


@pytest.mark.parametrize("call", ["open('a')", "p.open('w')", "p.write_text('b')", "subprocess.run(x, text=True)"])
def test_the_law_sees_a_call_that_breaks_it(call: str) -> None:
    assert list(unstated(ast.parse(call))) == [1]
