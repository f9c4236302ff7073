"""Records that jobs keep as JSON: how they are written, who wrote them, and how two of them differ."""

from __future__ import annotations

import getpass
import json
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pipelines.redaction import redacted


def changes(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield `optim.lr`, 0.0002, 0.0001 for every leaf that differs."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield key, before, after
        return
    for name in [*before, *(name for name in after if name not in before)]:
        yield from changes(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """Return `optim.lr 0.0002 -> 0.0001` for every leaf that differs."""
    return [f"{name} {old!r} -> {new!r}" for name, old, new in changes(before, after, key)]


def leaves(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `optim.lr` -> 0.0002 for every leaf."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def as_json(content: Any) -> bytes:
    """Return a JSON file for people and programs, without secrets. Equal contents give equal bytes."""
    return (json.dumps(redacted(content), indent=1, sort_keys=True) + "\n").encode()


def signature() -> dict[str, str]:
    """Return when and by whom a record is written, as fields of it."""
    return {"at": datetime.now(UTC).isoformat(timespec="microseconds"), "by": f"{getpass.getuser()}@{platform.node()}"}
