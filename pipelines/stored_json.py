"""The one reader of the JSON files that rzen stores: any damage is one error that names file, key, rule and fix.

A kind of file is a `TypedDict` next to its writer, or any other type that pydantic checks. Types are checked strictly.
Keys that the type does not name are kept, so that newer files can be read.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from pipelines.errors import UserError

T = TypeVar("T")
FIX = "restore the file, or run the job again that wrote it"
stored_file = with_config(ConfigDict(extra="allow"))
"""Decorator of a `TypedDict` that describes a stored file."""
_MAX_SHOWN = 60


def parse_json(data: bytes | str, place: str, kind: type[T], fix: str = FIX) -> T:
    """Return the content of a JSON file, checked against `kind`. Raises `UserError` at `place`."""
    try:
        content: T = _adapter_of(cast(Hashable, kind)).validate_json(data, strict=True)
    except ValidationError as error:
        raise UserError(place, explain(error), fix) from error
    return content


def read_json(path: Path, kind: type[T], fix: str = FIX) -> T:
    """Return the content of a local JSON file. Raises `UserError` for one that is missing or damaged."""
    try:
        return parse_json(path.read_bytes(), str(path), kind, fix)
    except OSError as error:
        raise UserError(str(path), error.strerror or str(error), fix) from error


def explain(error: ValidationError) -> str:
    """Return what is wrong with the first bad key: its name, value and rule."""
    first = error.errors(include_url=False, include_context=False)[0]
    # pydantic names the members of unions in brackets, which are no keys of the file.
    key = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    message = first["msg"][0].lower() + first["msg"][1:]
    match first["type"]:
        case "json_invalid":
            return message.replace("invalid JSON", "is not JSON")
        case "missing":
            return f"has no {key}"
    value = repr(first["input"])
    shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
    return f"{key}={shown}: {message}" if key else f"is {shown}: {message}"


@cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator of a type. Making one costs a millisecond."""
    return TypeAdapter(kind)
