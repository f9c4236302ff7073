"""Records that jobs keep as JSON: how they are written, and in what two of them differ."""

from __future__ import annotations

import json
from typing import Any


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """`optim.lr 0.0002 -> 0.0001` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(name for name in after if name not in before)]
        inner = ((name, before.get(name), after.get(name)) for name in keys)
        return [change for name, old, new in inner for change in differences(old, new, f"{key}.{name}".lstrip("."))]
    return [] if before == after else [f"{key} {before!r} -> {after!r}"]


def as_json(content: Any) -> bytes:
    """A file of JSON for people and programs: equal contents are equal bytes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
