"""RunPod's own OpenAPI document as a judge of requests and answers.

The document is not part of the project: it is looked for in `shared/data/runpod_openapi` beside the checkout or any of
the folders above it. Without it there is no judge, and the tests that need one say so and skip.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

PLACE = "shared/data/runpod_openapi/openapi-v2.json"
ROOT = Path(__file__).parents[2]


def document() -> Path | None:
    """Where the document is, or None."""
    return next((folder / PLACE for folder in ROOT.parents if (folder / PLACE).exists()), None)


class Contract:
    """Finds what an exchange has that the document doesn't allow."""

    def __init__(self, path: Path) -> None:
        self._document = json.loads(path.read_text())
        resource = Resource(self._document, DRAFT202012)
        self._registry = Registry().with_resource("urn:runpod", resource)
        self._paths = [(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), path) for path in self._document["paths"]]

    def violations(
        self, method: str, path: str, query: dict[str, str], body: Any, status: int, answer: Any
    ) -> list[str]:
        """One line for each thing that is not as documented."""
        found = next((template for pattern, template in self._paths if pattern.fullmatch(path)), None)
        operation = self._document["paths"].get(found, {}).get(method.lower())
        if operation is None:
            return [f"{method} {path}: no such operation"]
        where = f"{method} {found}"
        lines = [f"{where}: query {name}" for name in set(query) - self._parameters(found, operation)]
        requested = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        # What the API itself refuses as malformed need not be well-formed.
        if status != 422:
            lines += self._errors(f"{where} request", requested, body)
        declared = operation["responses"].get(str(status)) or operation["responses"]["default"]
        declared = self._resolved(declared)
        content = next(iter(declared.get("content", {}).values()), {}).get("schema")
        return lines + self._errors(f"{where} {status}", content, answer)

    def _parameters(self, path: str, operation: dict[str, Any]) -> set[str]:
        stated = [*self._document["paths"][path].get("parameters", []), *operation.get("parameters", [])]
        return {parameter["name"] for parameter in map(self._resolved, stated) if parameter["in"] == "query"}

    def _resolved(self, node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            target: Any = self._document
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            node = target
        return node

    def _errors(self, where: str, schema: dict[str, Any] | None, value: Any) -> list[str]:
        if schema is None:
            return [] if value in (None, {}) else [f"{where}: no body is documented"]
        schema = json.loads(json.dumps(schema).replace('"$ref": "#/', '"$ref": "urn:runpod#/'))
        validator = Draft202012Validator(schema, registry=self._registry)
        return [
            f"{where}: {'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
            for error in validator.iter_errors(value)
        ]
