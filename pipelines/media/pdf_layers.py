"""Conditions of optional content (layers) for MuPDF, which shows some of them wrongly.

MuPDF 1.28 takes the policy `AllOn` as always fulfilled and `AnyOff` as never, and it ignores expressions (`VE`). What a
condition comes to is therefore written in its place, in a form that MuPDF understands (ISO 32000-1, 8.11.2.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_REFERENCE = re.compile(r"(\d+) \d+ R")
_TOKEN = re.compile(r"\[|\]|/\w+|\d+ \d+ R")
_MAX_DEPTH = 32


def settle_conditions(document: Any) -> None:
    """Replace conditions in an open pymupdf document by what they come to in its default configuration."""
    if document.xref_get_key(document.pdf_catalog(), "OCProperties")[0] == "null":
        return
    states = {xref: bool(group["on"]) for xref, group in document.get_ocgs().items()}
    for xref in range(1, document.xref_length()):
        if document.xref_get_key(xref, "Type")[1] == "/OCMD" and states:
            _settle(document, xref, states)


def _settle(document: Any, xref: int, states: Mapping[int, bool]) -> None:
    expression, policy = _resolved(document, xref, "VE"), document.xref_get_key(xref, "P")[1]
    if expression.startswith("["):
        is_shown = _evaluated(_TOKEN.findall(expression), states, 0)
    elif policy in ("/AllOn", "/AnyOff"):
        members = [states.get(int(found), True) for found in _REFERENCE.findall(_resolved(document, xref, "OCGs"))]
        is_shown = not members or (all(members) if policy == "/AllOn" else not all(members))
    else:
        return
    group, is_on = next(iter(states.items()))
    hides = "/AllOff" if is_on else "/AnyOn"  # not fulfilled by this group
    shows = "/AnyOn" if is_on else "/AllOff"
    document.xref_set_key(xref, "VE", "null")
    document.xref_set_key(xref, "OCGs", f"[{group} 0 R]")
    document.xref_set_key(xref, "P", shows if is_shown else hides)


def _resolved(document: Any, xref: int, key: str) -> str:
    """Return the text of an entry. An array may be an object of its own."""
    kind, text = document.xref_get_key(xref, key)
    if kind != "xref":
        return str(text)
    target = str(document.xref_object(int(text.split()[0]), compressed=True))
    return target if target.startswith("[") else str(text)


def _evaluated(tokens: list[str], states: Mapping[int, bool], depth: int) -> bool:
    """Evaluate `[/Not 7 0 R]`, `[/And ...]`, `[/Or ...]`, nested. Removes the tokens. A malformed one is fulfilled."""
    if tokens:
        tokens.pop(0)  # the opening bracket
    operator = tokens.pop(0) if tokens else ""
    values = []
    while tokens and tokens[0] != "]":
        if tokens[0] == "[":
            if depth == _MAX_DEPTH:
                return True
            values.append(_evaluated(tokens, states, depth + 1))
        else:
            found = _REFERENCE.fullmatch(tokens.pop(0))
            values.append(states.get(int(found[1]), True) if found else True)
    if tokens:
        tokens.pop(0)
    if operator == "/Or":
        return any(values)
    return not any(values) if operator == "/Not" else all(values)
