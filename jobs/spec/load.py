"""Reads a YAML file into a checked spec. Each error names the file, line, key, value, rule and fix.

text -> plain data with the line of every key -> `--set a.b=c` on top -> spec class of the kind
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jobs.spec.fields import Node, alternative, inner, properties, value_text
from jobs.spec.job import JobConfig
from jobs.spec.kinds import find_kind, kind_names
from jobs.spec.nearest import did_you_mean, nearest
from jobs.spec.yaml_text import MAX_BYTES, MAX_DEPTH, Key, parse_yaml
from pipelines.errors import UserError

_MAX_PROBLEMS = 8
_MAX_BASES = 16  # a file on a file on a file ...
_MAX_SHOWN = 200  # letters of a value in an error
_NO_MAPPING = ("model_type", "model_attributes_type", "dict_type")
"""Problems of a value where a mapping is needed. pydantic's words for them name Python classes."""
_BUILTIN = Path(__file__).resolve().parents[1]
_files: ContextVar[list[Path] | None] = ContextVar("files", default=None)


@dataclass(frozen=True)
class Document:
    """Plain data of a spec and where each key was written: `stage1.yaml:31`, or `--set optim.lr=1`."""

    data: dict[str, Any]
    name: str
    folder: Path
    places: dict[Key, str] = field(default_factory=dict)
    folders: dict[Key, Path] = field(default_factory=dict)
    """Folder of the file that wrote a key. All other keys are of a file in `folder`."""

    def place(self, key: Key) -> str:
        """Return where a key was written, or the nearest key around it."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.name

    def folder_of(self, key: Key) -> Path:
        """Return the folder of the file that wrote a key. The file that its value names is relative to it."""
        return self.folders.get(key, self.folder)

    def overlaid(
        self, changes: Mapping[str, Any], place: Callable[[Key], str], folder: Callable[[Key], Path] | None = None
    ) -> Document:
        """Return a copy with `changes` on top. Mappings are merged key by key, everything else is replaced.

        `place(key)` returns where the change of a key was written, and `folder(key)` the folder of that file, which is
        that of this document by default.
        """
        changed: list[Key] = []
        merged = _merge(self.data, changes, (), changed)
        replaced = set(changed)
        kept = {key: where for key, where in self.places.items() if not _is_below(key, replaced)}
        new = {key: place(key) for top in changed for key in _keys(_at(merged, top), top)}
        folders = {key: self.folder_of(key) for key in kept} | {key: folder(key) for key in new if folder}
        return Document(merged, self.name, self.folder, kept | new, folders)

    def place_under(self, *around: str) -> Callable[[Key], str]:
        """Return a function for the places of keys within the part of this document at `around`."""
        return lambda key: self.place((*around, *key))

    def folder_under(self, *around: str) -> Callable[[Key], Path]:
        """Return a function for the folders of keys within the part of this document at `around`."""
        return lambda key: self.folder_of((*around, *key))


def read_document(path: str | Path, folder: Path | None = None, above: tuple[Path, ...] = ()) -> Document:
    """Read a YAML file on top of its `base`, without checking it.

    A relative path is looked up in `folder`, that of the file that names it. A shipped spec such as `jobs/demo.yaml` is
    also found in the installed package. `above` are the files that are based on this one.
    """
    file = Path(path) if folder is None else folder / path
    if not file.is_file() and (_BUILTIN / file.name).is_file() and Path(path).parent.name in ("jobs", ""):
        file = _BUILTIN / file.name
    data, places = parse_yaml(_read_text(file, str(path)), str(path))
    if (files := _files.get()) is not None:
        files.append(file)
    if not isinstance(data, dict):
        raise UserError(str(path), "is not a mapping of settings", "start with `kind: ...`")
    document = Document(data, str(path), file.resolve().parent, places)
    base = document.data.pop("base", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise UserError(document.place(("base",)), f"base={base!r} is not a file", "name a YAML file")
    if file.resolve() in above:
        raise UserError(document.place(("base",)), f"{path} is based on itself", "name another base")
    if len(above) >= _MAX_BASES:
        raise UserError(document.place(("base",)), f"is the base of {_MAX_BASES} others", "use fewer files")
    below = read_document(base, document.folder, (*above, file.resolve()))
    merged = below.overlaid(document.data, document.place, document.folder_of)
    return replace(merged, name=document.name, folder=document.folder)


@contextmanager
def recorded_files() -> Iterator[list[Path]]:
    """Yield a list that gets each file that is read as a spec, or as its base, while the block runs."""
    files: list[Path] = []
    token = _files.set(files)
    try:
        yield files
    finally:
        _files.reset(token)


def shipped_specs() -> list[str]:
    """Return the specs of the installed package, by the names that commands take: `jobs/stage1.yaml`."""
    return sorted(f"jobs/{spec.name}" for spec in _BUILTIN.glob("*.yaml"))


def shipped_values(key: Key, kinds: Sequence[str]) -> dict[str, Any]:
    """Return `jobs/stage1.yaml:31` -> value for each shipped spec of these kinds that sets a key itself."""
    found: dict[str, Any] = {}
    for name in shipped_specs():
        file = _BUILTIN / Path(name).name
        data, places = parse_yaml(_read_text(file, name), name)
        if key in places and read_document(file).data.get("kind") in kinds:
            found[places[key]] = _at(data, key)
    return found


def is_shipped(file: Path) -> bool:
    """Return whether a file is one of the specs of the installed package."""
    return file.resolve().parent == _BUILTIN


def override(document: Document, overrides: Sequence[str]) -> Document:
    """Return the document with each `a.b=c` on top. The value is YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.split(".")
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            place = f"--set {_shortened(text)}"
            raise UserError(place, "is not of the form key=value", "write it like --set optim.lr=1e-4")
        change, _ = parse_yaml(value, f"--set {_shortened(text)}", one_line=True)
        document = document.overlaid(nested(key, change), partial(_place_on_command_line, text))
    return document


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return a dotted key and its value as nested mappings: `a.b`, 1 -> {a: {b: 1}}."""
    first, dot, rest = key.partition(".")
    return {first: nested(rest, value) if dot else value}


def _place_on_command_line(text: str, key: Key) -> str:
    return f"--set {_shortened(text)}"


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _read_text(file: Path, name: str) -> str:
    """Return the text of a YAML file. Raises `UserError` for other files, such as devices and very large ones."""
    if not file.exists():
        own = [str(Path(name).with_name(spec.name)) for spec in file.parent.glob("*.y*ml")]
        known = {Path(spec).stem: spec for spec in (*shipped_specs(), *own)}  # the ending makes all files similar
        near = nearest(Path(name).stem, known)
        listed = f"name a spec of your own, or one of {', '.join([*own, *shipped_specs()])}"
        fix = f"did you mean {known[near]!r}?" if near else listed
        raise UserError(name, "no such file", fix)
    try:
        if not file.is_file():  # reading a device or a pipe may never end
            raise UserError(name, "is not a file", "name a YAML file")
        with file.open("rb") as content:
            return content.read(MAX_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(name, f"cannot be read: {error}", "name a YAML file in UTF-8") from error


def check(document: Document) -> JobConfig:
    """Return the spec that a document describes. Raise `UserError` with one line for each error."""
    kind = document.data.get("kind")
    known = list(kind_names())
    if not isinstance(kind, str) or kind not in known:
        problem = f"kind={kind!r} is not a kind of job" if "kind" in document.data else "has no `kind`"
        raise UserError(document.place(("kind",)), problem, did_you_mean(str(kind), known))
    declared = find_kind(kind)
    model = declared.spec
    try:
        spec = model.model_validate(document.data)
    except ValidationError as error:
        distinct = _distinct(error, document.data)
        # Explaining takes milliseconds each, and a file may have thousands of problems.
        first, *rest = (_explain(document, model, key, problems) for key, problems in distinct[:_MAX_PROBLEMS])
        more = [f"... and {len(distinct) - _MAX_PROBLEMS} more"] if len(distinct) > _MAX_PROBLEMS else []
        raise UserError(first.place, first.problem, "\n".join([first.fix, *map(str, rest), *more])) from error
    if declared.impossible and (unworkable := declared.impossible(spec)):
        raise UserError(document.place(()), unworkable, "change one of them")
    return spec


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


def _merge(data: Mapping[str, Any], changes: Mapping[str, Any], key: Key, changed: list[Key]) -> dict[str, Any]:
    """Return `data` with `changes` on top. The keys whose values are replaced are added to `changed`."""
    merged = dict(data)
    for part, change in changes.items():
        inner = (*key, part)
        old = merged.get(part)
        if isinstance(old, dict) and isinstance(change, dict):
            merged[part] = _merge(old, change, inner, changed)
            continue
        changed.append(inner)
        merged[part] = change
    return merged


def _is_below(key: Key, tops: Set[Key]) -> bool:
    """Return whether a key is one of `tops` or inside of one."""
    return any(key[:length] in tops for length in range(1, len(key) + 1))


def _at(data: Any, key: Key) -> Any:
    for part in key:
        data = data[part]
    return data


def _keys(data: Any, key: Key) -> Iterator[Key]:
    yield key
    if isinstance(data, dict):
        for part, value in data.items():
            yield from _keys(value, (*key, part))


def _distinct(error: ValidationError, data: Any) -> list[tuple[Key, list[Any]]]:
    """Return the problems by the key as it was written: of a union, one for each alternative.

    An alternative with a problem inside of it is the intended one. The others are left out.
    """
    problems: dict[Key, list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_written_key(data, problem), []).append(problem)
    inner = {key[:length] for key in problems for length in range(len(key))}  # keys with a problem inside of them
    return [(key, some) for key, some in problems.items() if not (isinstance(some[0]["input"], dict) and key in inner)]


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


def _explain(document: Document, model: type[BaseModel], key: Key, problems: Sequence[Any]) -> UserError:
    problem, dotted = problems[0], ".".join(key)
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
    is_name = "[key]" in problem["loc"]  # of an entry
    if (len(problems) > 1 or problem["type"] in _NO_MAPPING) and not is_name:
        rule = f"must be {_value_at(model, key)}"
    fix = f"rzen schema {document.data['kind']} documents it"
    return UserError(document.place(key), f"{dotted}={_shortened(repr(problem['input']))}: {rule}", fix)


def _value_at(model: type[BaseModel], key: Key) -> str:
    """Return what the setting at a key may be."""
    schema: Node = model.model_json_schema()
    here: Node | None = schema
    for part in key:
        here = inner(here, part, schema) if here else None
    return value_text(here, schema) if here else "a mapping"


def _fields(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Return the settings of the model at `loc`, which may hold names of union members."""
    schema: Node = model.model_json_schema()
    here = schema
    for part in loc:
        entry = inner(here, part, schema) or alternative(here, part, schema)
        here = here if entry is None else entry
    return list(properties(here, schema))
