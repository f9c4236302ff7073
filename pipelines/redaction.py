"""Text that leaves the program: without secrets, without control characters, and escaped for Markdown.

Settings, names of files and captions come from others, or hold passwords. Records, logs, model cards and the terminal
get them through these functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # all but tab and line feed
    "\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c"  # marks that turn the direction of text
    "\u2028\u2029\ud800-\udfff]"
)
_PASSWORD_IN_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@?#'\"<>]*@(?=[^\s/])")
_SECRET_NAME = (
    r"(?:[A-Za-z0-9]+[_.-])*(?:secret|token|password|passwd|passphrase|pwd|credentials?|signature|sig|"
    r"(?:api|access|secret|private|account|auth)[_-]?key(?:[_-]?id)?)(?:[_-][A-Za-z0-9]+)?"
)
_NAMED = re.compile(_SECRET_NAME, re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?P<name>(?<![A-Za-z0-9]){_SECRET_NAME})(?P<between>\s*[=:]\s*)(?P<value>[^\s&;,'\"]+)", re.IGNORECASE
)
# Formats that issuers gave to their keys, so that scanners find them.
_KEYS = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b|\bhf_[A-Za-z0-9_]{8,}|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bsk-[\w-]{16,}|\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_ENVIRONMENT = "env"
"""Setting whose values are variables of the environment. Only their names are kept."""


def redact_text(text: str) -> str:
    """Return a text without passwords in URLs, values of names such as `token`, and known kinds of keys."""
    text = _PASSWORD_IN_URL.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _KEYS.sub(HIDDEN, text)
    return _ASSIGNED.sub(rf"\g<name>\g<between>{HIDDEN}", text)


def redacted(content: Any) -> Any:
    """Return plain data without secrets: texts as `redact_text` does, values by their keys, and values of `env`."""
    if isinstance(content, Mapping):
        return {key: _redacted_value(str(key), value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redacted(item) for item in content]
    return redact_text(content) if isinstance(content, str) else content


def _redacted_value(key: str, value: Any) -> Any:
    if key == _ENVIRONMENT and isinstance(value, Mapping):
        return dict.fromkeys(value, HIDDEN)
    if isinstance(value, str) and value and _NAMED.fullmatch(key):
        return HIDDEN
    return redacted(value)


def has_hidden(text: str | None) -> bool:
    """Return whether a stored text has lost a password, so that it cannot be used again."""
    return text is not None and f"{HIDDEN}@" in text


def printable(text: str) -> str:
    """Return a text in which no character controls the terminal: U+FFFD stands for those that would."""
    return _CONTROL.sub("\ufffd", text)


def escape_markdown(text: str) -> str:
    """Return a text as Markdown shows it in a line or a cell of a table: no markup, no HTML, no new line."""
    one_line = " ".join(printable(text).split())
    escaped = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`|]|\](?=[(\[:]))", r"\\\1", escaped)  # a bracket alone makes no link


def code_span(text: str) -> str:
    """Return a text as inline code of Markdown, whatever backticks it has."""
    one_line = " ".join(printable(text).split())
    fence = "`" * (max((len(run) for run in re.findall(r"`+", one_line)), default=0) + 1)
    return f"{fence} {one_line} {fence}" if len(fence) > 1 else f"`{one_line}`"
