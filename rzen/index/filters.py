"""Conditions on the columns of a corpus, such as `modality=page` or `start_s>=60`: which rows a search may find."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipelines.errors import UserError

if TYPE_CHECKING:  # models are loaded without pyarrow
    import pyarrow as pa
    import pyarrow.compute as pc

Operator = Literal["=", "!=", "<", "<=", ">", ">="]
_CONDITION = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_NOT_SEARCHED = ("vector",)


@dataclass(frozen=True, slots=True)
class Condition:
    """A column and the values that it may have. `=` and `!=` take several: any of them, or none."""

    column: str
    operator: Operator
    values: tuple[str | float, ...]


def parse_condition(text: str) -> Condition:
    """Return the condition that a text such as `source=photos,scans` or `start_s>=60` states.

    A comma separates values. Raises `UserError` for anything else.
    """
    place = f"filter {text!r}"
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise UserError(place, "is not a column, an operator and a value", "write modality=page or start_s>=60")
    column, operator, value = found.groups()
    values = tuple(part.strip() for part in value.split(","))
    if operator not in ("=", "!=") and len(values) != 1:
        raise UserError(place, f"compares with {len(values)} values", f"give {operator} one value")
    return Condition(column, operator, values)  # type: ignore[arg-type]


def parse_conditions(texts: Sequence[str] | Mapping[str, Any] | None) -> tuple[Condition, ...]:
    """Return conditions, which all must hold, of texts or of a mapping of columns to a value or a list of values."""
    if isinstance(texts, Mapping):
        pairs = ((name, value if isinstance(value, list | tuple) else [value]) for name, value in texts.items())
        return tuple(Condition(name, "=", tuple(values)) for name, values in pairs)
    return tuple(map(parse_condition, texts or ()))


def check_conditions(conditions: Sequence[Condition], schema: pa.Schema, place: str) -> tuple[Condition, ...]:
    """Return the conditions with values of the type of their columns. Raises `UserError` for unknown columns."""
    known = [name for name in schema.names if name not in _NOT_SEARCHED]
    checked = []
    for one in conditions:
        if one.column not in known:
            raise UserError(f"filter {one.column}", f"is not a column of {place}", f"use {', '.join(known)}")
        checked.append(Condition(one.column, one.operator, _typed(one, schema.field(one.column).type)))
    return tuple(checked)


def expression(conditions: Sequence[Condition]) -> pc.Expression | None:
    """Return checked conditions as an expression of pyarrow, None if there are none. Empty cells fulfill none."""
    import pyarrow.compute as pc

    whole = None
    for one in conditions:
        column = pc.field(one.column)
        match one.operator:
            case "=":
                part = column.isin(list(one.values))
            case "!=":
                part = ~column.isin(list(one.values)) & column.is_valid()
            case "<":
                part = column < one.values[0]
            case "<=":
                part = column <= one.values[0]
            case ">":
                part = column > one.values[0]
            case ">=":
                part = column >= one.values[0]
        whole = part if whole is None else whole & part
    return whole


def sql(conditions: Sequence[Condition]) -> str | None:
    """Return checked conditions as a condition of SQL, None if there are none."""
    parts = []
    for one in conditions:
        values = ", ".join(map(_literal, one.values))
        column = f"`{one.column}`"
        if one.operator in ("=", "!="):
            parts.append(f"{column} {'IN' if one.operator == '=' else 'NOT IN'} ({values})")
        else:
            parts.append(f"{column} {one.operator} {values}")
    return " AND ".join(parts) or None


def _typed(condition: Condition, type_: pa.DataType) -> tuple[str | float, ...]:
    import pyarrow.types as types

    if types.is_string(type_) or types.is_large_string(type_):
        return tuple(map(str, condition.values))
    place = f"filter {condition.column}"
    if types.is_boolean(type_):
        words = {"true": True, "false": False}
        if any(str(value).lower() not in words for value in condition.values):
            raise UserError(place, f"is compared with {condition.values}", "use true or false")
        return tuple(words[str(value).lower()] for value in condition.values)
    number = int if types.is_integer(type_) else float
    try:
        return tuple(number(value) for value in condition.values)
    except ValueError as error:
        raise UserError(place, f"is a number, and {error}", f"write {condition.column}>=1") from error


def _literal(value: str | float) -> str:
    if isinstance(value, bool):
        return str(value).upper()
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)
