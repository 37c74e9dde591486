"""YAML and JSON without their surprises: a key twice, and numbers that are not the number that was written.

YAML 1.1 reads 0100 as 64 and 1:40 as 100, and both languages keep the last of two equal keys in silence. A sweep that
runs for days on another value than the one in its file is worse than an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

OCTAL = re.compile(r"[-+]?0[0-9_]+")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} stands there twice, first in line {seen[key.value]}",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        text = str(self.construct_scalar(node))
        kind = "int" if node.tag.endswith(":int") else "float"
        construct = self.construct_yaml_int if kind == "int" else self.construct_yaml_float
        value = construct(node)
        if ":" in text or (kind == "int" and OCTAL.fullmatch(text)):
            raise yaml.constructor.ConstructorError(
                problem=f"{text} would be read as {value:g}; write the number in decimals, or a text in quotes",
                problem_mark=node.start_mark,
            )
        return value


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def read_yaml(text: str) -> Any:
    """The document; yaml.MarkedYAMLError, with its place, also for equal keys and numbers in other bases."""
    return yaml.load(text, _Loader)


def read_json(text: str) -> Any:
    """The document; ValueError also for equal keys."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found
