"""Explains a setting: its type, default and documentation, and the shipped specs that have it.

It reads the JSON Schema of the pydantic models that check a spec. `rzen schema` prints that schema for programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from jobs.spec.fields import Node, inner, properties, type_text
from jobs.spec.kinds import find_kind, kind_names
from jobs.spec.load import shipped_values
from jobs.spec.nearest import nearest
from pipelines.errors import UserError

_MAX_DEPTH = 6  # of the settings that an unknown one is compared with


class _WithFactories(GenerateJsonSchema):
    """Writes the defaults that a function makes, too."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> dict[str, Any]:
        factory: Any = schema.get("default_factory")
        return super().default_schema({**schema, "default": factory()} if factory else schema)


@dataclass(frozen=True)
class Setting:
    """A setting of one or several kinds of job."""

    type: str
    """Type and limits, such as `integer >= 1 or null`."""
    required: bool
    """Whether a spec that has the settings around it must have it."""
    default: Any
    """Plain data."""
    text: str
    """Documentation."""
    no_effect: tuple[str, ...]
    """What takes its effect away."""
    settings: Mapping[str, str]
    """Name of each setting inside of it -> first sentence of its documentation."""


@dataclass(frozen=True)
class Explanation:
    """A setting, the kinds that have it as it is, and where shipped specs of these kinds set it."""

    kinds: tuple[str, ...]
    setting: Setting
    shipped: Mapping[str, Any]
    """`jobs/stage1.yaml:31` -> value there."""


def explain(key: str, kind: str | None = None) -> list[Explanation]:
    """Explain a dotted key. An empty one is the whole spec. Kinds in which a setting differs have an entry each.

    Raise `UserError` if no kind has this setting, or if there is no such kind.
    """
    names = [find_kind(kind).name] if kind else list(kind_names())
    parts = tuple(key.split(".")) if key else ()
    found: list[tuple[list[str], Setting]] = []
    for name in names:
        if (setting := _find(name, parts)) is None:
            continue
        kinds = next((kinds for kinds, other in found if other == setting), None)
        if kinds is None:
            found.append(([name], setting))
        else:
            kinds.append(name)
    if not found:
        where = f" of kind {kind}" if kind else ""
        raise UserError(key, f"is not a setting{where}", _nearest(key, names))
    return [
        Explanation(tuple(kinds), setting, {} if setting.type == "mapping" else shipped_values(parts, kinds))
        for kinds, setting in found
    ]


@cache
def _schema(kind: str) -> dict[str, Any]:
    return find_kind(kind).spec.model_json_schema(schema_generator=_WithFactories)


def _find(kind: str, parts: Sequence[str]) -> Setting | None:
    schema = _schema(kind)
    node: Node = schema
    required, default = True, None
    for part in parts:
        entry = inner(node, part, schema)
        if entry is None:
            return None
        if isinstance(default, dict) and part in default:  # what the setting around it makes of its default
            default = default[part]
        else:
            required = "default" not in entry and part in properties(node, schema)  # and no entry of a mapping or list
            default = entry.get("default")
        node = entry
    return Setting(
        type=type_text(node, schema),
        required=required,
        default=default,
        text=_text(node),
        no_effect=tuple(entry.reason for entry in find_kind(kind).no_effect if _covers(entry.setting, parts)),
        settings={name: _first_sentence(child) for name, child in properties(node, schema).items()},
    )


def _covers(pattern: str, parts: Sequence[str]) -> bool:
    """Return whether the dotted key of a table of settings without effect is this setting, or one around it."""
    tops = pattern.split(".")
    return len(tops) <= len(parts) and all(top in ("*", part) for top, part in zip(tops, parts, strict=False))


def _text(node: Node) -> str:
    return " ".join(str(node.get("description", "")).split())


def _first_sentence(node: Node) -> str:
    return _text(node).partition(". ")[0].rstrip(".")


def _nearest(key: str, kinds: Sequence[str]) -> str:
    """Return the fix for a setting that does not exist."""
    if key in kind_names():
        return f"did you mean `rzen explain --kind {key}`?"
    known = list(dict.fromkeys(name for kind in kinds for name in _keys(_schema(kind), _schema(kind))))
    last = key.rpartition(".")[2]
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return f"did you mean {' or '.join(map(repr, same[:5]))}?"
    near = nearest(key, known)
    return f"did you mean {near!r}?" if near else "`rzen explain --kind KIND` lists the settings of a kind"


def _keys(node: Node, schema: Node, before: str = "", depth: int = _MAX_DEPTH) -> Iterator[str]:
    for name, child in properties(node, schema).items() if depth else ():
        yield f"{before}{name}"
        yield from _keys(child, schema, f"{before}{name}.", depth - 1)
