"""Which index a corpus gets, how it is built for a version of the vectors, and how it is opened."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from pipelines.errors import UserError
from pipelines.storage.location import localize
from pipelines.storage.store import Store
from rzen.index.exact import ExactIndex
from rzen.index.kinds import INDEX_KINDS, IndexKind
from rzen.index.lance import LanceIndex, import_lancedb, keep_versions, sync_table
from rzen.index.parts import Parts
from rzen.index.qdrant import QdrantIndex, check_server, drop_collection, keep_points, sync_collection
from rzen.index.resident import ResidentIndex, build_resident, import_faiss
from rzen.index.types import INDEX, LARGE, CorpusIndex, IndexEntry
from rzen.model.locate import cache_dir

_log = logging.getLogger(__name__)
_QDRANT = f"{INDEX}/qdrant-"
_OURS = re.compile(rf"{INDEX}/({'|'.join(INDEX_KINDS)})-[0-9a-f]{{16}}")


def default_kind(num_vectors: int) -> IndexKind:
    """Return the kind of index for a corpus: exact search if it is small, else LanceDB where it is installed."""
    return "lance" if num_vectors > LARGE and importlib.util.find_spec("lancedb") else "exact"


def check_index(kind: IndexKind, store: Store, old: IndexEntry | None = None) -> None:
    """Raise `UserError` for a library or a server that the kind needs and that is not there.

    `old` is the entry of the last version of the vectors in `store`.
    """
    if kind == "lance":
        import_lancedb()
    elif kind == "qdrant":
        check_server(store.child(old["path"]) if old and old["kind"] == kind else None)
    elif kind != "exact":
        import_faiss()


def build_index(
    kind: IndexKind,
    parts: Parts,
    config: str,
    version: str,
    old: IndexEntry | None = None,
    into: Store | None = None,
) -> IndexEntry | None:
    """Build the index of a version next to its vectors, and return its entry. Exact search has none.

    `config` names how the vectors are made, and `version` their content. `old` is the entry of the last version. What
    earlier versions use stays as it is. A killed build goes on. `into` is another folder than that of the vectors.
    Raises `UserError` for a library that is missing.
    """
    if kind == "exact" or not parts.paths:
        return None
    root = into or parts.store
    if kind in ("lance", "qdrant"):
        path = f"{INDEX}/{kind}-{config}"
        sync = sync_table if kind == "lance" else sync_collection
        return sync(parts, root.child(path), old if old and old["path"] == path else None)
    return build_resident(kind, parts, root.child(f"{INDEX}/{kind}-{version}"))


def open_index(
    entry: IndexEntry | None, parts: Parts, endpoint: str | None = None, root: Store | None = None
) -> CorpusIndex:
    """Open the index of a version; exact search where it has none. `root` is another folder than that of the vectors.

    Raises `UserError` if it is damaged or gone.
    """
    if entry is None or entry["kind"] == "exact":
        return ExactIndex(parts)
    folder = (root or parts.store).child(entry["path"])
    if entry["kind"] == "lance":
        return LanceIndex.open(folder, entry["version"], parts.place)
    if entry["kind"] == "qdrant":
        return QdrantIndex.open(folder, entry["version"], parts)
    try:
        local = localize(folder.url, cache_dir(), endpoint)
    except FileNotFoundError as error:
        raise UserError(folder.url, "does not exist", "run `rzen embed` again") from error
    return ResidentIndex.open(entry["kind"], local, parts.place)


def delete_unused(store: Store, kept: Iterable[IndexEntry]) -> None:
    """Delete indices next to the vectors that none of these entries names.

    What is on a Qdrant server that does not answer stays there until the next call.
    """
    entries = list(kept)
    paths = {entry["path"] for entry in entries}
    there = {"/".join(path.split("/")[:2]) for path in store.list(INDEX)}
    for path in there - paths:
        if _OURS.fullmatch(path) and (not path.startswith(_QDRANT) or _answered(drop_collection, store.child(path))):
            store.delete_tree(path)
    for path in paths & there:
        if versions := sorted({entry["version"] for entry in entries if entry["path"] == path and "version" in entry}):
            if path.startswith(_QDRANT):
                _answered(keep_points, store.child(path), versions)
            else:
                keep_versions(store.child(path), versions)


def _answered(change: Callable[..., None], *arguments: Any) -> bool:
    """Change a collection. Return whether its server answered."""
    try:
        change(*arguments)
    except UserError as error:
        _log.warning("%s", error)
        return False
    return True
