"""The JSON schema of recipes, made from the typed settings."""

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from pipeline.stage import Stage
from pipeline.templates import EACH


def recipe_schema(stages: Mapping[str, Stage]) -> dict[str, Any]:
    """JSON Schema (2020-12) of a whole recipe: every step is one of the stages, with its settings."""
    pairs, definitions = models_json_schema([(stage.settings, "validation") for stage in stages.values()])
    shared = definitions.get("$defs", {})
    variants = []
    for stage in stages.values():
        reference = pairs[(stage.settings, "validation")]["$ref"]
        body = dict(shared[reference.removeprefix("#/$defs/")])
        body["properties"] = {"stage": {"const": stage.name}} | body["properties"]
        body["required"] = ["stage", *body.get("required", [])]
        shared[f"step_{stage.name}"] = body
        variants.append({"$ref": f"#/$defs/step_{stage.name}"})
    for stage in stages.values():
        shared.pop(pairs[(stage.settings, "validation")]["$ref"].removeprefix("#/$defs/"), None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "simclr-pipeline recipe",
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "letters, digits, - and _"},
            "seed": {"type": "integer", "minimum": 0, "description": "all randomness derives from it"},
            "steps": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {
                    "type": "object",
                    "properties": {"stage": {"enum": list(stages)}},
                    "required": ["stage"],
                    # A step that stands for several has placeholders in place of values: it is checked written out.
                    "if": {"required": [EACH]},
                    "then": {"properties": {EACH: {"type": "object", "minProperties": 1}}},
                    "else": {"oneOf": variants},
                },
            },
        },
        "required": ["steps"],
        "additionalProperties": False,
        "$defs": shared,
    }
