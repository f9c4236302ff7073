"""Versions of an embedded corpus: each is whole, one write makes it the live one, and earlier ones stay for a while."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from jobs.runtime.lease import Lease
from jobs.runtime.records import as_json
from pipelines.storage.store import Store
from rzen.embedding.corpus import MANIFEST, VERSIONS, VectorsFile, read_version
from rzen.index.build import delete_unused


def version_of(config: str, parts: Sequence[str]) -> str:
    """Return the name of a version: equal vectors of equal targets have the same."""
    return hashlib.sha256(json.dumps([config, sorted(parts)]).encode()).hexdigest()[:16]


def previous_of(old: VectorsFile | None, version: str, count: int) -> list[str]:
    """Return the `count` versions before this one, the newest first, given what was live until now."""
    if old is None or "version" not in old:
        return []
    return [name for name in (old["version"], *old.get("previous", [])) if name != version][:count]


def commit(store: Store, content: dict[str, Any], lease: Lease) -> list[VectorsFile]:
    """Make a version the live one with one write. Return all that are kept now, this one first."""
    lease.check()
    store.write(f"{VERSIONS}/{content['version']}.json", as_json(content))
    store.write(MANIFEST, as_json(content))
    names = [content["version"], *content["previous"]]
    return [found for name in names if (found := read_version(store, name)) is not None]


def delete_old(store: Store, kept: Iterable[VectorsFile]) -> None:
    """Delete the indices and the names of versions that are not kept."""
    versions = list(kept)
    names = {f"{VERSIONS}/{one['version']}.json" for one in versions if "version" in one}
    for path in store.list(VERSIONS):
        if path not in names:
            store.delete(path)
    delete_unused(store, [entry for one in versions if (entry := one.get("index"))])
