"""JSON Schema of specs, for editors and other programs.

It describes a file as it may be written: `base` is allowed, a file that has one may leave out what its base has, and
`null` removes a named entry. `check` of `jobs/spec/load.py` applies all rules to the file as it is resolved.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from jobs.spec.job import NAME_PATTERN
from jobs.spec.kinds import find_kind, kind_names

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BASE = {"type": "string", "description": "YAML file that this one is based on, relative to this file."}


def schema_of_kind(name: str) -> dict[str, Any]:
    """Return the schema of one kind. Raise `UserError` if there is no such kind."""
    definitions, references = _definitions([name])
    return {"$schema": DIALECT, "title": f"rzen {name}", "$ref": references[name], "$defs": definitions}


def schema_of_all() -> dict[str, Any]:
    """Return one schema for all kinds, which follows the `kind` of the file."""
    definitions, references = _definitions(list(kind_names()))
    kinds = [{"const": name, "description": find_kind(name).summary} for name in references]
    by_kind = [
        {"if": {"properties": {"kind": {"const": name}}, "required": ["kind"]}, "then": {"$ref": reference}}
        for name, reference in references.items()
    ]
    return {
        "$schema": DIALECT,
        "title": "rzen",
        "type": "object",
        "properties": {"kind": {"description": "Kind of the job.", "anyOf": kinds}, "base": _BASE},
        "anyOf": [{"required": ["kind"]}, {"required": ["base"]}],
        "allOf": by_kind,
        "$defs": definitions,
    }


def _definitions(names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the definitions of all models in these kinds, and kind -> reference to its own."""
    models = {name: find_kind(name).spec for name in names}
    found, shared = models_json_schema([(model, "validation") for model in models.values()])
    definitions = {name: _as_written(definition) for name, definition in shared["$defs"].items()}
    references = {name: str(found[model, "validation"]["$ref"]) for name, model in models.items()}
    for reference in references.values():
        spec = definitions[reference.rpartition("/")[2]]
        spec["properties"] = {"base": _BASE} | spec["properties"]
    return definitions, references


def _as_written(node: Any) -> Any:
    """Return a definition without `required`, which a base may satisfy, and with `null` for named entries."""
    if isinstance(node, list):
        return [_as_written(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _as_written(value) for key, value in node.items()}
    if isinstance(kept.get("required"), list):  # and not a setting of this name
        del kept["required"]
    entries = kept.get("patternProperties")
    if isinstance(entries, dict) and NAME_PATTERN in entries:
        kept["patternProperties"] = {NAME_PATTERN: {"anyOf": [entries[NAME_PATTERN], {"type": "null"}]}}
        kept["additionalProperties"] = False
    return kept
