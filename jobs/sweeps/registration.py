"""What an ablation registers before its first run: variants, seeds, contrasts and how they are scored.

`registered.json` is written once, when no run has begun. The report compares it with the spec: a comparison that was
added after results were seen proves less than one that was there before.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from typing_extensions import TypedDict

from jobs.runtime.records import as_json
from jobs.sweeps.specs import AblationSpec
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file

FILE = "registered.json"
_REGISTERED = ("stage", "set", "variants", "baseline", "contrasts", "evaluate")


@stored_file
class Registration(TypedDict):
    """`registered.json`: the date, and the settings that decide what is compared."""

    date: str
    settings: dict[str, Any]


def register(spec: AblationSpec, out: Store, has_begun: bool) -> str:
    """Register the settings of a job none of whose runs has begun. Return what the report says of registration."""
    settings = spec.model_dump(mode="json", include={*_REGISTERED}) | {"seeds": spec.seed_list}
    if not has_begun:
        registration: Registration = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "settings": settings}
        out.write(FILE, as_json(registration))
    if not out.exists(FILE):
        return "not registered before the first run"
    found = parse_json(out.read(FILE), f"{out.url}/{FILE}", Registration, "delete the file to report without it")
    text = f"registered before the first run, {found['date']}"
    if changed := _changes(found["settings"], settings):
        text += f"; changed since: {', '.join(changed)}"
    return text


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ. Variants and contrasts are compared one by one."""
    found = []
    for name in now:
        if name in ("variants", "contrasts"):
            old, new = before.get(name, {}), now[name]
            found += [f"{name}.{entry}" for entry in {**old, **new} if old.get(entry) != new.get(entry)]
        elif before.get(name) != now[name]:
            found.append(name)
    return found
