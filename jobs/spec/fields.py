"""Finds settings in the JSON Schema of a spec, through references, alternatives, named entries and lists."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Node = Mapping[str, Any]
"""A part of a JSON Schema."""
_MAX_NAMED = 12  # settings of a mapping
_LIMITS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "of at least {} letters",
    "maxLength": "of at most {} letters",
    "minItems": "with at least {} entries",
    "pattern": "that matches {}",
}


def properties(node: Node, schema: Node) -> dict[str, Node]:
    """Return the settings inside of a node by their names. Empty for one that is a value.

    A setting that several alternatives have, each in its own way, has their alternatives, and the text of the first.
    """
    found: dict[str, Node] = {}
    for option in _options(node, schema):
        for name, child in option.get("properties", {}).items():
            first = found.setdefault(name, child)
            if first != child:
                found[name] = {**first, "anyOf": [first, child]}
    return found


def alternative(node: Node, tag: str, schema: Node) -> Node | None:
    """Return the alternative of a node that has a setting with only this value. None if there is none."""
    for option in _options(node, schema):
        if any(child.get("const") == tag for child in option.get("properties", {}).values()):
            return option
    return None


def inner(node: Node, part: str | int, schema: Node) -> Node | None:
    """Return the node of a setting, named entry or position inside of a node. None if it can have none of this name."""
    if part in (named := properties(node, schema)):
        return named[str(part)]
    for option in _options(node, schema):
        entries = [*option.get("patternProperties", {}).values(), option.get("additionalProperties", False)]
        if str(part).isdigit():
            entries.append(option.get("items", False))
        for entry in entries:
            if entry is not False:
                return {} if entry is True else entry
    return None


def type_text(node: Node, schema: Node) -> str:
    """Return the type of a value and its limits, such as `integer >= 1 or null`."""
    return " or ".join(dict.fromkeys(_type_of(option, schema) for option in _options(node, schema)))


def value_text(node: Node, schema: Node) -> str:
    """Return what a value may be, as a part of a sentence: `a string or a mapping with base, adapter`."""
    options = [*_options(node, schema)]
    found = [_with_article(option, schema) for option in options if "properties" not in option]
    if names := list(properties(node, schema)):  # of all mappings together
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        found.append(f"a mapping with {', '.join(names[:_MAX_NAMED])}{more}")
    return " or ".join(sorted(dict.fromkeys(found), key=lambda text: text == "null"))


def _with_article(option: Node, schema: Node) -> str:
    text = _type_of(option, schema)
    if text == "null" or "enum" in option or "const" in option:
        return text
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _options(node: Node, schema: Node) -> Iterator[Node]:
    """Yield the alternatives of a node, with references resolved."""
    if "$ref" in node:
        yield from _options(schema["$defs"][str(node["$ref"]).rpartition("/")[2]], schema)
        return
    alternatives = [*node.get("anyOf", []), *node.get("oneOf", []), *node.get("allOf", [])]
    for alternative in alternatives:
        yield from _options(alternative, schema)
    if not alternatives:
        yield node


def _type_of(option: Node, schema: Node) -> str:
    if "enum" in option or "const" in option:
        return " or ".join(json.dumps(value) for value in option.get("enum", [option.get("const")]))
    kind = str(option.get("type", "any value"))
    if kind == "object" and "properties" not in option:
        entry = inner(option, "name", schema)
        kind = f"mapping of names to {type_text(entry, schema)}" if entry else "mapping"
    elif kind == "object":
        kind = "mapping"
    elif kind == "array" and isinstance(option.get("items"), dict):
        kind = f"list of {type_text(option['items'], schema)}"
    forms = _LIMITS if option.get("type") != "object" else {"minLength": _LIMITS["minItems"]}
    limits = [form.format(option[limit]) for limit, form in forms.items() if limit in option]
    return " ".join([kind, " and ".join(limits)]).strip()
