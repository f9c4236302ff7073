"""Reads a YAML file into a checked spec. Each error names the file, line, key, value, rule and fix.

text -> plain data with the line of every key -> `--set a.b=c` on top -> spec class of the kind
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from jobs.spec.job import JobConfig
from jobs.spec.kinds import did_you_mean, find_kind, kind_names
from pipelines.errors import UserError

Key = tuple[str, ...]
_MAX_PROBLEMS = 8
_BUILTIN = Path(__file__).resolve().parents[1]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `2e-4` is a number, as in YAML 1.2, and a repeated key is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


@dataclass(frozen=True)
class Document:
    """Plain data of a spec and where each key was written: `stage1.yaml:31`, or `--set optim.lr=1`."""

    data: dict[str, Any]
    name: str
    folder: Path
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Return where a key was written, or the nearest key around it."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.name

    def overlaid(self, changes: Mapping[str, Any], place: Callable[[Key], str]) -> Document:
        """Return a copy with `changes` on top. Mappings are merged key by key, everything else is replaced.

        `place(key)` returns where the change of a key was written.
        """
        places = dict(self.places)
        return Document(_merge(self.data, changes, (), places, place), self.name, self.folder, places)

    def place_under(self, *around: str) -> Callable[[Key], str]:
        """Return a function for the places of keys within the part of this document at `around`."""
        return lambda key: self.place((*around, *key))


def read_document(path: str | Path, folder: Path | None = None, above: tuple[Path, ...] = ()) -> Document:
    """Read a YAML file on top of its `base`, without checking it.

    A relative path is looked up in `folder`, that of the file that names it. A shipped spec such as `jobs/demo.yaml` is
    also found in the installed package. `above` are the files that are based on this one.
    """
    file = Path(path) if folder is None else folder / path
    if not file.is_file() and (_BUILTIN / file.name).is_file() and file.parent.name in ("jobs", ""):
        file = _BUILTIN / file.name
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
    except FileNotFoundError as error:
        shipped = ", ".join(sorted(f"jobs/{spec.name}" for spec in _BUILTIN.glob("*.yaml")))
        raise UserError(str(path), "no such file", f"name a spec of your own, or one of {shipped}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}", "name a YAML file") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise UserError(f"{path}:{line}", f"is not YAML: {getattr(error, 'problem', error)}", "fix the line") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(str(path), "is not a mapping of settings", "start with `kind: ...`")
    places: dict[Key, str] = {}
    document = Document(_plain(node, (), str(path), places), str(path), file.resolve().parent, places)
    base = document.data.pop("base", None)
    if base is None:
        return document
    if file.resolve() in above:
        raise UserError(document.place(("base",)), f"{path} is based on itself", "name another base")
    below = read_document(str(base), document.folder, (*above, file.resolve()))
    return replace(below.overlaid(document.data, document.place), name=document.name, folder=document.folder)


def override(document: Document, overrides: Sequence[str]) -> Document:
    """Return the document with each `a.b=c` on top. The value is YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {text}", "is not of the form key=value", "write it like --set optim.lr=1e-4")
        try:
            change = yaml.load(value, Loader=_Loader)  # a subclass of SafeLoader
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}", "its value is not YAML", "quote it") from error
        document = document.overlaid(nested(key, change), partial(_place_on_command_line, text))
    return document


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return a dotted key and its value as nested mappings: `a.b`, 1 -> {a: {b: 1}}."""
    first, dot, rest = key.partition(".")
    return {first: nested(rest, value) if dot else value}


def _place_on_command_line(text: str, key: Key) -> str:
    return f"--set {text}"


def check(document: Document) -> JobConfig:
    """Return the spec that a document describes. Raise `UserError` with one line for each error."""
    kind = document.data.get("kind")
    known = list(kind_names())
    if not isinstance(kind, str) or kind not in known:
        problem = f"kind={kind!r} is not a kind of job" if "kind" in document.data else "has no `kind`"
        raise UserError(document.place(("kind",)), problem, did_you_mean(str(kind), known))
    model = find_kind(kind).spec
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        problems = [_explain(document, model, key, problem) for key, problem in _distinct(error, document.data)]
        first, rest = problems[0], problems[1:_MAX_PROBLEMS]
        more = [f"... and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise UserError(first.place, first.problem, "\n".join([first.fix, *map(str, rest), *more])) from error


def substitute(data: Any, values: Mapping[str, Any], place: str) -> Any:
    """Return `data` with `${name}` replaced in every string. A string that is one variable takes its type."""
    if isinstance(data, dict):
        return {key: substitute(value, values, place) for key, value in data.items()}
    if isinstance(data, list):
        return [substitute(value, values, place) for value in data]
    if not isinstance(data, str):
        return data
    names = re.findall(r"\$\{(\w+)\}", data)
    if unknown := [name for name in names if name not in values]:
        fix = f"vars has {', '.join(values) or 'none'}"
        raise UserError(place, f"{data!r}: there is no variable {unknown[0]!r}", fix)
    if len(names) == 1 and data == f"${{{names[0]}}}":
        return values[names[0]]
    return re.sub(r"\$\{(\w+)\}", lambda match: str(values[match[1]]), data)


def _plain(node: yaml.Node, key: Key, name: str, places: dict[Key, str]) -> Any:
    places[key] = f"{name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            part = str(key_node.value)
            if part in mapping:
                raise UserError(
                    f"{name}:{key_node.start_mark.line + 1}", f"{part!r} is given twice", "keep one of them"
                )
            mapping[part] = _plain(value_node, (*key, part), name, places)
            places[*key, part] = f"{name}:{key_node.start_mark.line + 1}"
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*key, str(i)), name, places) for i, item in enumerate(node.value)]
    return _Loader("").construct_object(node)


def _merge(
    data: Mapping[str, Any], changes: Mapping[str, Any], key: Key, places: dict[Key, str], place: Callable[[Key], str]
) -> dict[str, Any]:
    merged = dict(data)
    for part, change in changes.items():
        inner = (*key, part)
        old = merged.get(part)
        if isinstance(old, dict) and isinstance(change, dict):
            merged[part] = _merge(old, change, inner, places, place)
            continue
        for stale in [known for known in places if known[: len(inner)] == inner]:
            del places[stale]
        places |= {changed: place(changed) for changed in _keys(change, inner)}
        merged[part] = change
    return merged


def _keys(data: Any, key: Key) -> Iterator[Key]:
    yield key
    if isinstance(data, dict):
        for part, value in data.items():
            yield from _keys(value, (*key, part))


def _distinct(error: ValidationError, data: Any) -> list[tuple[Key, Any]]:
    """Return the problems by the key as it was written. A union reports every alternative: keep the intended one."""
    problems: dict[Key, Any] = {}
    for problem in error.errors():
        problems.setdefault(_written_key(data, problem), problem)
    return [
        (key, problem)
        for key, problem in problems.items()
        if not (isinstance(problem["input"], dict) and any(other[: len(key)] == key != other for other in problems))
    ]


def _written_key(data: Any, problem: Any) -> Key:
    """Return pydantic's location without the names of union members, which are not in the file."""
    key: list[str] = []
    for position, part in enumerate(problem["loc"]):
        is_missing = problem["type"] == "missing" and position == len(problem["loc"]) - 1
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
        elif not is_missing:
            continue
        key.append(str(part))
    return tuple(key)


def _explain(document: Document, model: type[BaseModel], key: Key, problem: Any) -> UserError:
    dotted = ".".join(key)
    message = str(problem["msg"]).removeprefix("Value error, ")
    match problem["type"]:
        case "extra_forbidden":
            fix = did_you_mean(key[-1], _fields(model, problem["loc"][:-1]), "known here:")
            return UserError(document.place(key), f"{dotted} is not a setting", fix)
        case "missing":
            return UserError(document.place(key[:-1]), f"{dotted} is missing", "add it")
        case "value_error":
            return UserError(document.place(key), f"{dotted + ': ' if dotted else ''}{message}", "change one of them")
    rule = message[0].lower() + message[1:]
    fix = f"rzen schema {document.data['kind']} documents it"
    return UserError(document.place(key), f"{dotted}={problem['input']!r}: {rule}", fix)


def _fields(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Return the settings of the model at `loc`."""
    schema = model.model_json_schema()
    here: Any = schema
    for part in loc:
        here = _resolved(here, schema)
        here = here.get("properties", {}).get(part) or here.get("additionalProperties") or here
    return list(_resolved(here, schema).get("properties", {}))


def _resolved(node: Any, schema: Any) -> Any:
    for option in [node, *node.get("anyOf", []), *node.get("allOf", [])]:
        if "$ref" in option:
            return schema["$defs"][option["$ref"].rpartition("/")[2]]
    return node
