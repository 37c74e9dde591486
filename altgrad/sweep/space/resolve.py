"""From a preset, a file and flags to one SweepSpec, or to one sentence that says what is wrong and where.

Layers are merged key by key, later ones win: the base (a preset or the sweep file's own value), the
configuration file, the flags. Each key remembers where it came from, so that an error names the flag or the
file and path that a person wrote, the value, what is allowed and the nearest match.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from altgrad.sweep.complaints import SpecError, nearest, own_path
from altgrad.sweep.space.declaration import GIVEN_BY_AXES, TEMPLATE
from altgrad.sweep.space.presets import for_task
from altgrad.sweep.space.spec import SweepSpec
from altgrad.sweep.space.strict_yaml import read_json, read_yaml
from altgrad.training.config import TrainConfig

SUFFIXES = (".yaml", ".yml", ".json")


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; a spec without a name takes the file's."""
    if path.suffix.lower() not in SUFFIXES:
        raise SpecError(f"{path}: allowed are {', '.join(SUFFIXES)} files")
    try:
        text = path.read_text(encoding="utf-8")
        found = read_json(text) if path.suffix.lower() == ".json" else read_yaml(text)
    except FileNotFoundError:
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SpecError(f"{path}: no such file{nearest(path.name, beside)}") from None
    except yaml.MarkedYAMLError as error:
        raise SpecError(f"{path}: {_place(error, text)}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: not readable as {path.suffix[1:]}: {_one_line(error)}") from None
    if not isinstance(found, dict):
        raise SpecError(f"{path}: a mapping of keys is expected, found {type(found).__name__}")
    return {"name": _name_from(path.stem)} | found


def _place(error: yaml.MarkedYAMLError, text: str) -> str:
    """Where a YAML file stops being one, and why."""
    mark = error.problem_mark
    if mark is None:
        return f"not readable as yaml: {_one_line(error)}"
    lines = [*text.splitlines(), ""]
    line = lines[min(mark.line, len(lines) - 1)]
    if "\t" in line[: mark.column + 1]:
        return f"line {mark.line + 1}: a tab in {line!r}; YAML takes spaces"
    return f"line {mark.line + 1}, column {mark.column + 1}: not readable as yaml: {error.problem}"


def _name_from(stem: str) -> str:
    """A file's name as a sweep's: accents dropped, other letters as _; a checksum where nothing would be left."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")
    return name or f"sweep-{zlib.crc32(stem.encode('utf-8', 'surrogateescape')):08x}"


def resolve(base: SweepSpec, flags: Mapping[str, Any], config_file: Path | None = None) -> SweepSpec:
    """The spec that the layers make; `flags` is keyed by dotted path ('data.source'). Raises SpecError."""
    from_file: dict[str, Any] = read_config(config_file) if config_file is not None else {}
    template = from_file.pop("base", {})
    if not isinstance(template, dict):
        raise SpecError(f"{config_file}: base: {_short(template)} is not allowed: a mapping of a trial's fields")
    base = for_task(base, str(flags.get("task", from_file.get("task", template.get("task", base.base.task)))))
    values = {name: getattr(base, name) for name in SweepSpec.model_fields if name != "base"}
    values |= {name: getattr(base.base, name) for name in TEMPLATE}
    for name, value in (template | from_file).items():
        inherited = values.get(name)
        if isinstance(inherited, BaseModel) and isinstance(value, dict):
            value = dict(inherited) | value
        values[name] = value
    for path, value in flags.items():
        head, _, tail = path.partition(".")
        values[head] = dict(values[head]) | {tail: value} if tail else value
    try:
        return SweepSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError(_explain(error, flags, config_file)) from None


def _explain(error: ValidationError, flags: Mapping[str, Any], config_file: Path | None) -> str:
    first = error.errors()[0]
    path = own_path([str(part) for part in first["loc"]])
    flag = next((name for name in flags if path[: len(name.split("."))] == name.split(".")), None)
    if flag is not None:
        where = "--" + ("data" if flag == "data.source" else flag.rpartition(".")[2].replace("_", "-"))
    else:
        where = ": ".join(part for part in (str(config_file or ""), ".".join(path)) if part)
    text = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        allowed = [name for name in _fields_at(path[:-1]) if name not in (*GIVEN_BY_AXES, "base")]
        text = (
            f"unknown key with value {_short(first['input'])}; allowed: {', '.join(allowed)}"
            f"{nearest(path[-1], allowed)}"
        )
    elif first["type"] != "value_error":
        close = nearest(str(first["input"]), _literals_at(path))
        text = f"{_short(first['input'])} is not allowed: {text[:1].lower()}{text[1:]}{close}"
    return f"{where}: {text}" if where else text


def _fields_at(path: list[str]) -> Mapping[str, Any]:
    """The fields of the model that stands at a path of names and indices."""
    if not path:
        return SweepSpec.model_fields | {name: TrainConfig.model_fields[name] for name in TEMPLATE}
    model: Any = TrainConfig if path[0] in TEMPLATE else SweepSpec
    for part in path:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        model = next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)
        if model is None:
            return {}
    fields: Mapping[str, Any] = model.model_fields
    return fields


def _literals_at(path: list[str]) -> list[str]:
    fields = _fields_at(path[:-1])
    field = fields.get(path[-1]) if path else None
    return [item for item in get_args(field.annotation) if isinstance(item, str)] if field is not None else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
