"""The JSON schema of a sweep, for editors and other programs: what YAML and JSON files may say.

It is derived from `SweepSpec`, and widened by the short forms that the spec reads: lists as texts with commas, a model
by name, guards as 'on' and 'off' or as rules in words.
"""

from __future__ import annotations

from typing import Any

from altgrad.sweep.space.declaration import GIVEN_BY_AXES, TEMPLATE
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import MODELS

_TEXT = {"type": "string"}
_NUMBER = {"type": "number", "exclusiveMinimum": 0}
SHORT_FORMS: dict[str, list[dict[str, Any]]] = {
    "formats": [_TEXT],
    "optimizers": [_TEXT],
    "policies": [_TEXT],
    "objectives": [_TEXT],
    "lrs": [_TEXT, _NUMBER],
    "rung_clip": [_TEXT, _NUMBER],
    "guards": [_TEXT, {"type": "boolean"}],
    "model": [{"type": "string", "enum": list(MODELS)}],
}


def json_schema() -> dict[str, Any]:
    """Draft 2020-12, as pydantic writes it."""
    schema = SweepSpec.model_json_schema()
    trial = schema["$defs"]["TrainConfig"]["properties"]
    for name, forms in SHORT_FORMS.items():
        fields = trial if name in TEMPLATE else schema["properties"]
        long = fields[name]
        about = {key: long.pop(key) for key in ("title", "description", "default") if key in long}
        fields[name] = {"anyOf": [long, *forms], **about}
    for name in GIVEN_BY_AXES:
        del trial[name]
    # What all trials share may stand at the sweep's own level.
    schema["properties"] |= {name: trial[name] for name in TEMPLATE}
    schema["properties"]["base"] = {"$ref": "#/$defs/TrainConfig", "description": "what all trials share"}
    rule = schema["$defs"]["GuardRule"]
    schema["$defs"]["GuardRule"] = {"anyOf": [rule, {"type": "string", "description": "a rule in words, or by name"}]}
    when = schema["$defs"]["Constraint"]["properties"]["when"]["additionalProperties"]
    when["anyOf"].append({"type": ["string", "number", "boolean", "null"]})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
