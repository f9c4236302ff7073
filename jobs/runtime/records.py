"""Records that jobs keep as JSON: how they are written, who wrote them, and how two of them differ."""

from __future__ import annotations

import getpass
import json
import platform
from datetime import UTC, datetime
from typing import Any

from pipelines.redaction import redacted


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """Return `optim.lr 0.0002 -> 0.0001` for every leaf that differs."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{key} {before!r} -> {after!r}"]
    changes: list[str] = []
    for name in [*before, *(name for name in after if name not in before)]:
        changes += differences(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
    return changes


def as_json(content: Any) -> bytes:
    """Return a JSON file for people and programs, without secrets. Equal contents give equal bytes."""
    return (json.dumps(redacted(content), indent=1, sort_keys=True) + "\n").encode()


def signature() -> dict[str, str]:
    """Return when and by whom a record is written, as fields of it."""
    return {"at": datetime.now(UTC).isoformat(timespec="microseconds"), "by": f"{getpass.getuser()}@{platform.node()}"}
