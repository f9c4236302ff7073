"""The manifest of a split: which shards it consists of, and the settings that they were made with.

    {split}/{source}/{source}-000000-{digest}.tar           a shard
    {split}/{source}/{source}-000000-{digest}.idx.parquet   its index
    {split}/{source}/duplicates-{digest}.parquet            samples of the source that share a target or a query
    {split}/manifest.json                                   written last; readers trust nothing else
    rzen-output.json                                        marks the folder as a dataset

Names hold a digest of the content, so that a new version of a dataset leaves the files of the old one as they are. The
manifests of both splits are replaced at the same moment.

External shards stay where they are. The manifest names them by absolute URL, with a mapping for each source. Only
their indices are below the data root.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from pipelines.errors import UserError
from pipelines.samples import SOURCE_PATTERN
from pipelines.storage.publish import publish_files, read_published
from pipelines.storage.store import Store
from pipelines.stored_json import explain

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, FORMAT_VERSION)
"""Datasets of version 2 do not know equal queries: plans do not keep them apart. The objective finds them all the same.
"""
DATASET = "dataset"
DIGEST_CHARS = 12  # of a hash, in the name of a file
_SHARDS_PER_PIECE = 1000
_OURS = re.compile(rf".*-[0-9a-f]{{{DIGEST_CHARS}}}\.(tar|idx\.parquet|parquet)")
_NONE: Mapping[str, bytes] = MappingProxyType({})


T = TypeVar("T")
_STORED = with_config(ConfigDict(extra="forbid"))
_Count = Annotated[int, Field(ge=0, strict=True)]


@_STORED
@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard: `path` relative to the data root, or to its folder as `write_shard` returns it.

    The `path` of an external shard is an absolute URL. Its `index` is a path below the data root, and `tag` is the
    store's tag of its content when it was indexed. Both are None for shards that ingest wrote.
    """

    path: str
    num_samples: _Count
    num_bytes: _Count
    sha256: str
    index_sha256: str
    index: str | None = None
    tag: str | None = None

    @property
    def index_path(self) -> str:
        """Path of the index below the data root."""
        return self.index or index_path(self.path)

    @property
    def remedy(self) -> str:
        """What the user should do if the shard is not as the manifest says."""
        return "run the index job again" if self.index else "delete it and run the ingest job again"


@_STORED
@dataclass(frozen=True, slots=True)
class SourceInfo:
    """The shards of one source in a split; all samples of a source have one task.

    `mapping` is a `SourceMapping` as plain data, which makes samples of external shards. It is None for shards that
    ingest wrote. `duplicates_sha256` is the hash of the file at `duplicates_path`, or None before that file exists.
    """

    task: str
    num_samples: _Count
    shards: tuple[ShardInfo, ...]
    mapping: dict[str, Any] | None = None
    duplicates_sha256: str | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content: equal for byte-identical data."""
        return _fingerprint(self)


@_STORED
@dataclass(frozen=True, slots=True)
class Manifest:
    """What a split consists of, and the settings that it was made with."""

    split: str
    sources: dict[str, SourceInfo]
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: _Count = FORMAT_VERSION

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return sum(source.num_samples for source in self.sources.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical content: equal fingerprints mean byte-identical data."""
        return _fingerprint(self)

    def to_json(self) -> bytes:
        """Return readable JSON that includes the fingerprint."""
        content = _plain(self) | {"fingerprint": self.fingerprint}
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, default=_plain) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse what `to_json` wrote. Raises `ValueError` for anything else, an edited manifest included."""
        try:
            content = json.loads(data, object_hook=_parse_shard)
            if content["format_version"] not in READABLE_VERSIONS:
                known = " and ".join(map(str, READABLE_VERSIONS))
                raise ValueError(f"format version {content['format_version']}, this program reads {known}")
            fingerprint = content.pop("fingerprint")
            sources = {name: _parse_source(name, source) for name, source in content.pop("sources").items()}
            manifest = _checked(cls, {**content, "sources": sources})
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error
        for name in manifest.sources:
            if not re.fullmatch(SOURCE_PATTERN, name):
                raise ValueError(f"sources has {name!r}, which is not the name of a source")
        if manifest.fingerprint != fingerprint:
            raise ValueError("its fingerprint is not that of its content")
        if manifest.format_version < FORMAT_VERSION:  # its files of duplicates know no queries and have other names
            older = {name: replace(source, duplicates_sha256=None) for name, source in manifest.sources.items()}
            return replace(manifest, sources=older)
        return manifest


def manifest_path(split: str) -> str:
    """Return the path of a split's manifest below the data root."""
    return f"{split}/manifest.json"


def report_path(split: str) -> str:
    """Return the path of an index job's report below the data root."""
    return f"{split}/report.json"


def index_path(shard_path: str) -> str:
    """Return the path of a shard's index, which is next to the shard."""
    return f"{shard_path.removesuffix('.tar')}.idx.parquet"


def duplicates_path(split: str, source: str, sha256: str) -> str:
    """Return the path, below the data root, of the file with this hash: samples with a common target or query."""
    return f"{split}/{source}/duplicates-{sha256[:DIGEST_CHARS]}.parquet"


def manifest_files(manifest: Manifest) -> set[str]:
    """Return the files of a split below the data root, without its manifest."""
    files = set()
    for name, source in manifest.sources.items():
        for shard in source.shards:
            files.add(shard.index_path)
            if not shard.index:  # external shards are elsewhere
                files.add(shard.path)
        if source.duplicates_sha256:
            files.add(duplicates_path(manifest.split, name, source.duplicates_sha256))
    return files


def publish_manifest(store: Store, *manifests: Manifest, reports: Mapping[str, bytes] = _NONE) -> None:
    """Make splits visible at the same moment, with their reports. Call it when all of their shards are in place.

    Then the files of earlier versions of these splits are deleted, and those of jobs that were killed.
    """
    files = {manifest_path(some.split): some.to_json() for some in manifests} | dict(reports)
    publish_files(store, files, DATASET)
    for manifest in manifests:
        named = manifest_files(manifest)
        for path in store.list(manifest.split):
            if path not in named and _OURS.fullmatch(path):
                store.delete(path)


def read_manifest(store: Store, split: str) -> Manifest:
    """Read the manifest of a split. Raises `UserError` if it is missing or damaged."""
    place = f"{store.url}/{manifest_path(split)}"
    try:
        return Manifest.from_json(read_published(store, manifest_path(split)))
    except FileNotFoundError as error:
        fix = "run a job of kind ingest or index that writes here"
        raise UserError(place, "there is no such manifest", fix) from error
    except ValueError as error:
        raise UserError(place, f"cannot be read: {error}", "run the job again that wrote it") from error


def is_stored(store: Store, split: str) -> bool:
    """Return whether a split has a manifest."""
    try:
        read_published(store, manifest_path(split))
    except FileNotFoundError:
        return False
    return True


def source_info(store: Store, manifest: Manifest, source: str) -> SourceInfo:
    """Return a source of a manifest. Raises `UserError` if there is no such source."""
    if source not in manifest.sources:
        known = ", ".join(sorted(manifest.sources)) or "none"
        raise UserError(f"{store.url}/{manifest.split}", f"has no source {source!r}", f"its sources: {known}")
    return manifest.sources[source]


def _plain(part: Manifest | SourceInfo | ShardInfo) -> dict[str, Any]:
    """Return the fields of a manifest, source or shard that have a value."""
    values = {item.name: getattr(part, item.name) for item in fields(part)}
    return {name: value for name, value in values.items() if value is not None}


def _fingerprint(part: Manifest | SourceInfo) -> str:
    digest = hashlib.sha256()
    for piece in _canonical(part):
        digest.update(piece.encode())
    return digest.hexdigest()


def _canonical(part: object) -> Iterator[str]:
    """Yield JSON with sorted keys and without spaces, in pieces: that of a million shards is half a gigabyte."""
    if isinstance(part, Manifest | SourceInfo):
        part = _plain(part)
    if isinstance(part, dict) and part:
        for position, name in enumerate(sorted(part)):
            yield f"{',' if position else '{'}{_compact(name)}:"
            yield from _canonical(part[name])
        yield "}"
    elif isinstance(part, tuple) and part:
        for start in range(0, len(part), _SHARDS_PER_PIECE):
            yield f"{',' if start else '['}{_compact(part[start : start + _SHARDS_PER_PIECE])[1:-1]}"
        yield "]"
    else:
        yield _compact(part)


def _compact(part: object) -> str:
    return json.dumps(part, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def _parse_shard(parsed: dict[str, Any]) -> ShardInfo | dict[str, Any]:
    """Make a shard as soon as it is parsed, so that a million dicts never exist at once. Other dicts stay."""
    if parsed.keys() >= {"path", "index_sha256"}:
        return _checked(ShardInfo, parsed)
    return parsed


def _parse_source(name: str, parsed: dict[str, Any]) -> SourceInfo:
    return _checked(SourceInfo, parsed | {"shards": tuple(parsed["shards"])}, f"sources.{name}.")


def _checked(kind: type[T], fields: dict[str, Any], place: str = "") -> T:
    """Return a dataclass of these fields, with their types checked. Raises `ValueError` that names the field."""
    try:
        made: T = _validator(cast(Hashable, kind)).validate_python(fields)
    except ValidationError as error:
        raise ValueError(place + explain(error)) from error
    return made


@cache
def _validator(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
