"""Settings without effect: a table next to each kind says when, and `rzen validate` and `rzen run` warn of them.

Only what a spec says is reported: settings that differ from their default. An entry may also report a default, where
another setting takes away an effect that one would expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from jobs.spec.job import JobConfig
    from jobs.spec.load import Document


@dataclass(frozen=True)
class NoEffect:
    """A setting of a kind that changes nothing under a condition."""

    setting: str
    """Dotted key. Of a group of settings, each that was set is reported. `*` stands for any name."""
    when: Callable[[Any], bool]
    """Whether a checked spec of the kind meets the condition."""
    reason: str
    """What takes the effect away, for the message."""
    also_default: bool = False
    """Whether to report the setting with its default value, too."""


@dataclass(frozen=True)
class Unused:
    """A setting of one spec that changes nothing."""

    key: tuple[str, ...]
    value: Any
    reason: str

    def __str__(self) -> str:
        value = "" if isinstance(self.value, dict | BaseModel) else f"={self.value!r}"
        return f"{'.'.join(self.key)}{value} has no effect: {self.reason}"


def unused_settings(spec: JobConfig) -> list[Unused]:
    """Return the settings of a spec that have no effect, in the order of the table of its kind."""
    from jobs.spec.kinds import find_kind

    return [
        Unused(key, value, entry.reason)
        for entry in find_kind(spec.kind).no_effect
        if entry.when(spec)
        for key, value in _said(spec, entry.setting.split("."), (), entry.also_default)
    ]


def warnings(spec: JobConfig, named: Sequence[JobConfig], document: Document) -> list[str]:
    """Return a line for each setting without effect, of a spec and of those that it names. Equal lines are joined."""
    lines = [f"{document.place(found.key)}: {found}" for found in unused_settings(spec)]
    owners: dict[str, list[str]] = {}
    for other in named:
        for found in unused_settings(other):
            owners.setdefault(str(found), []).append(str(getattr(other, "name", other.kind)))
    return lines + [f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in owners.items()]


def _said(node: Any, path: Sequence[str], key: tuple[str, ...], also_default: bool) -> Iterator[tuple[Any, Any]]:
    """Yield key and value of what was set at or below a path."""
    if path and isinstance(node, dict):
        names = list(node) if path[0] == "*" else [name for name in path[:1] if name in node]
        for name in names:
            yield from _said(node[name], path[1:], (*key, name), also_default)
    elif path and isinstance(node, BaseModel):
        name = path[0]
        if also_default or name in node.model_fields_set:
            value = getattr(node, name)
            is_default = value == type(node).model_fields[name].get_default(call_default_factory=True)
            if len(path) > 1 or isinstance(value, BaseModel) or also_default or not is_default:
                yield from _said(value, path[1:], (*key, name), also_default)
    elif not path and isinstance(node, BaseModel) and not also_default:
        below = [pair for name in type(node).model_fields for pair in _said(node, [name], key, also_default)]
        yield from below
    elif not path:
        yield key, node
