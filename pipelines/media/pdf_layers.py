"""Optional content (layers) of PDFs, where a library takes hidden content for visible.

MuPDF 1.28 takes the policy `AllOn` as always fulfilled and `AnyOff` as never, and it ignores expressions (`VE`).
`settle_conditions` writes what a condition comes to in its place (ISO 32000-1, 8.11.2.2). PDFium reads the text of
hidden layers, and `remove_hidden_text` takes it away.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipelines.samples import UInt8Array

_REFERENCE = re.compile(r"(\d+) \d+ R")
_TOKEN = re.compile(r"\[|\]|/\w+|\d+ \d+ R")
_MAX_DEPTH = 32
_MAX_LAYERS = 32


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


def remove_hidden_text(pdfium: Any, load_page: Callable[[], Any], render: Callable[[Any], UInt8Array]) -> Any:
    """Return a page of PDFium without the text of hidden layers. The file stays as it is.

    A layer is hidden if its text, alone and black, leaves the page empty. PDFium does not say so itself. Text within
    nested forms is kept, and on a page of over 32 layers all text is.
    """
    page = load_page()
    names = {name for _, name in _layered_texts(pdfium, page)}
    if not names or len(names) > _MAX_LAYERS:
        return page
    empty = load_page()
    _remove_all_but(pdfium, empty, "")
    hidden = set()
    for name in sorted(names):
        alone = load_page()
        _remove_all_but(pdfium, alone, name)
        if np.array_equal(render(alone), render(empty)):
            hidden.add(name)
    for item, name in _layered_texts(pdfium, page):
        if name in hidden:
            page.remove_obj(item)
    return page


def _layered_texts(pdfium: Any, page: Any) -> list[tuple[Any, str]]:
    """Return the texts of a page that belong to layers, each with the names of its layers."""
    raw, found = pdfium.raw, []
    for item in page.get_objects([raw.FPDF_PAGEOBJ_TEXT], max_depth=1):
        marks = [raw.FPDFPageObj_GetMark(item, i) for i in range(max(0, raw.FPDFPageObj_CountMarks(item)))]
        layers = [_mark_text(raw, mark, "Name") for mark in marks if _mark_text(raw, mark) == "OC"]
        if layers:
            found.append((item, "layer " + "/".join(layers)))
    return found


def _remove_all_but(pdfium: Any, page: Any, name: str) -> None:
    """Leave only the text of one layer, filled with black."""
    raw, kept = pdfium.raw, set()
    for item, layer in _layered_texts(pdfium, page):
        if layer == name:
            raw.FPDFPageObj_SetFillColor(item, 0, 0, 0, 255)
            raw.FPDFTextObj_SetTextRenderMode(item, raw.FPDF_TEXTRENDERMODE_FILL)
            kept.add(ctypes.addressof(item.raw.contents))
    for item in list(page.get_objects(max_depth=1)):
        if ctypes.addressof(item.raw.contents) not in kept:
            page.remove_obj(item)


def _mark_text(raw: Any, mark: Any, parameter: str = "") -> str:
    """Return the name of a mark, or a text that it holds."""
    buffer, length = (ctypes.c_ushort * 256)(), ctypes.c_ulong()
    if parameter:
        raw.FPDFPageObjMark_GetParamStringValue(mark, parameter.encode(), buffer, ctypes.sizeof(buffer), length)
    else:
        raw.FPDFPageObjMark_GetName(mark, buffer, ctypes.sizeof(buffer), length)
    return bytes(buffer)[: max(0, length.value - 2)].decode("utf-16-le", "replace")
