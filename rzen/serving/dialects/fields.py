"""Reads the fields of a JSON body, and says in each error which field is wrong and what it may be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from rzen.serving.types import Limits, RequestError

T = TypeVar("T")
Body = Mapping[str, Any]


def check_fields(
    body: Any, known: Collection[str], ignored: Collection[str] = (), refused: Collection[str] = ()
) -> Body:
    """Return a body that is an object with known fields. Raises `RequestError` 400.

    `ignored` fields change no vector. `refused` ones would, and are not supported. Null counts as not given.
    """
    if not isinstance(body, dict):
        raise RequestError(400, "the body is not a JSON object")
    given = {name: value for name, value in body.items() if value is not None and name not in ignored}
    for name in given:
        if name in refused:
            raise RequestError(400, f"{name!r} is not supported; leave it out", name)
        if name not in known:
            raise RequestError(400, f"{name!r} is not a field of this request; use {', '.join(sorted(known))}", name)
    return given


def choice(body: Body, name: str, values: Mapping[str, T], default: T) -> T:
    """Return what a word stands for. Raises `RequestError` 400 for another word."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or value not in values:
        raise RequestError(400, f"{name}={value!r} is not supported; use {', '.join(values)}", name)
    return values[value]


def text(body: Body, name: str) -> str | None:
    """Return a text, None if there is none."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(400, f"{name} is not a text", name)
    return value


def flag(body: Body, name: str, default: bool) -> bool:
    """Return a boolean."""
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(400, f"{name}={value!r} is not true or false", name)
    return value


def positive(body: Body, name: str) -> int | None:
    """Return a number of at least 1, None if there is none."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(400, f"{name}={value!r} is not a whole number of at least 1", name)
    return value


def words(body: Body, name: str) -> tuple[str, ...]:
    """Return a list of texts, or one text as a list."""
    value = body.get(name)
    several = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in several):
        raise RequestError(400, f"{name} is not a list of texts", name)
    return tuple(several)


def items(body: Body, name: str, limits: Limits) -> list[Any]:
    """Return a list of at least one input, and at most as many as a request may hold."""
    value = body.get(name)
    if not isinstance(value, list) or not value:
        raise RequestError(400, f"{name} is not a list of at least one input", name)
    if len(value) > limits.max_inputs:
        raise RequestError(413, f"{name} has {len(value)} inputs; send at most {limits.max_inputs} at once", name)
    return value
