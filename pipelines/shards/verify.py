"""A split compared with its manifest: missing, unexpected and changed files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from pipelines.errors import UserError
from pipelines.shards.index import read_shard_index
from pipelines.shards.manifest import (
    Manifest,
    ShardInfo,
    duplicates_path,
    manifest_files,
    manifest_path,
    read_manifest,
    report_path,
)
from pipelines.shards.read import on_disk
from pipelines.storage.location import open_store
from pipelines.storage.store import Store

_READERS = 8


def verify(
    store: Store,
    split: str,
    endpoint: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Compare a split with its manifest. Return the problems, none if it is sound.

    Every byte of the shards that ingest wrote is read, with memory that does not grow with their number. External
    shards, whose `endpoint` may be given, must have the tag that they had when they were indexed. `on_progress` gets
    (done, all) shards.
    """
    manifest = read_manifest(store, split)
    shards = [shard for source in manifest.sources.values() for shard in source.shards]
    expected = {manifest_path(split), *manifest_files(manifest)}
    present = set(store.list(split)) - {report_path(split)}
    problems = [f"{path}: missing" for path in sorted(expected - present)]
    problems += [f"{path}: not in the manifest" for path in sorted(present - expected)]
    problems += _verify_sources(store, manifest, present)
    tags = _external_tags(shards, endpoint)
    with ThreadPoolExecutor(_READERS) as pool:
        checked = pool.map(lambda shard: _verify_shard(store, shard, present, tags), shards)
        for done, found in enumerate(checked, start=1):
            problems += found
            if on_progress:
                on_progress(done, len(shards))
    return problems


def _verify_sources(store: Store, manifest: Manifest, present: set[str]) -> list[str]:
    problems = []
    for name, source in sorted(manifest.sources.items()):
        if source.num_samples != sum(shard.num_samples for shard in source.shards):
            problems.append(f"{manifest.split}/{name}: {source.num_samples} samples, its shards hold another number")
        if not source.duplicates_sha256:
            continue
        path = duplicates_path(manifest.split, name, source.duplicates_sha256)
        if path not in present:
            continue
        if hashlib.sha256(store.read(path)).hexdigest() != source.duplicates_sha256:
            problems.append(f"{path}: its bytes have changed")
    return problems


def _external_tags(shards: list[ShardInfo], endpoint: str | None) -> dict[str, str]:
    """Return the URL of every object in the folders of external shards -> its tag."""
    tags = {}
    for folder in sorted({shard.path.rpartition("/")[0] or "/" for shard in shards if shard.index}):
        folder_store = open_store(folder, endpoint)
        for path, tag in folder_store.tags().items():
            tags[f"{folder_store.url.rstrip('/')}/{path}"] = tag
    return tags


def _verify_shard(store: Store, shard: ShardInfo, present: set[str], tags: Mapping[str, str]) -> list[str]:
    problems = _verify_tag(shard, tags) if shard.index else []
    if not shard.index and shard.path in present:
        with on_disk(store, shard.path) as file, file.open("rb") as content:
            num_bytes = file.stat().st_size
            if num_bytes != shard.num_bytes:
                problems.append(f"{shard.path}: {num_bytes} bytes, the manifest says {shard.num_bytes}")
            elif hashlib.file_digest(content, "sha256").hexdigest() != shard.sha256:
                problems.append(f"{shard.path}: its bytes have changed")
    if shard.index_path in present:
        try:
            read_shard_index(store, shard)
        except UserError as error:
            problems.append(f"{shard.index_path}: {error.problem}")
    return problems


def _verify_tag(shard: ShardInfo, tags: Mapping[str, str]) -> list[str]:
    if shard.path not in tags:
        return [f"{shard.path}: missing"]
    if tags[shard.path] != shard.tag:
        return [f"{shard.path}: has changed since it was indexed"]
    return []
