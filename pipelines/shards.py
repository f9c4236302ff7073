"""Deterministic shards: WebDataset tar files with an index, and the manifest that makes them a data set.

Layout under a data root: `{split}/{source}/{source}-000000.tar`, the same with `.idx.parquet`, and, written last,
`{split}/manifest.json`. Readers trust only the manifest. Equal samples give equal bytes, so that a hash is a version.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import BadMedia, UserError
from pipelines.samples import Sample, Side
from pipelines.store import Store, disk_errors

FORMAT_VERSION = 1
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # bytes from the start of the tar to the header of the sample's json
        ("length", pa.int64()),  # bytes to the end of its last member, padding included
        ("target_sha256", pa.string()),
        ("num_members", pa.int32()),  # the json not counted
    ]
)
_BLOCK_BYTES = 512
_READERS = 8

Members = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard: `path` relative to the data root (or to its folder, as `write_shard` returns it)."""

    path: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """The shards of one source in a split; all samples of a source have one task."""

    task: str
    num_samples: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a split consists of, and the settings it was made with."""

    split: str
    sources: dict[str, SourceInfo]
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return sum(source.num_samples for source in self.sources.values())

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical content: equal fingerprints mean byte-identical data."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> bytes:
        """Readable JSON with the fingerprint in it."""
        content = asdict(self) | {"fingerprint": self.fingerprint}
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Inverse of `to_json`. Raises `ValueError` for anything else, also for an edited manifest."""
        try:
            fields = json.loads(data)
            if fields["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {fields['format_version']}, this program reads {FORMAT_VERSION}")
            fingerprint = fields.pop("fingerprint")
            sources = {name: _source(source) for name, source in fields.pop("sources").items()}
            manifest = cls(sources=sources, **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error
        if manifest.fingerprint != fingerprint:
            raise ValueError("its fingerprint is not that of its content")
        return manifest


def _source(fields: dict[str, Any]) -> SourceInfo:
    return SourceInfo(fields["task"], fields["num_samples"], tuple(ShardInfo(**shard) for shard in fields["shards"]))


def manifest_path(split: str) -> str:
    """Where the manifest of a split is, below the data root."""
    return f"{split}/manifest.json"


def index_path(shard_path: str) -> str:
    """Where the index of a shard is: beside it."""
    return f"{shard_path.removesuffix('.tar')}.idx.parquet"


def target_sha256(positive: Side, members: Members) -> str:
    """Identity of a target's content: its text and the bytes of its media, in order."""
    digest = hashlib.sha256(hashlib.sha256(positive.text.encode()).digest())
    for media in positive.media:
        digest.update(hashlib.sha256(members[media.member]).digest())
    return digest.hexdigest()


def write_shard(local_path: Path, samples: Iterable[tuple[Sample, Members]]) -> ShardInfo:
    """Writes a tar (USTAR, json first, members sorted, no times, no owners) and its index beside it.

    Raises `UserError` for a full disk, `ValueError` for a key or member name that WebDataset could not group.
    """
    digest = hashlib.sha256()
    rows: list[dict[str, Any]] = []
    offset = 0
    with disk_errors(local_path), local_path.open("wb") as file:
        for sample, members in samples:
            record = _record(sample, members)
            file.write(record)
            digest.update(record)
            row = {"key": sample.key, "offset": offset, "length": len(record), "num_members": len(members)}
            rows.append(row | {"target_sha256": sample.target_sha256})
            offset += len(record)
        end = bytes(2 * _BLOCK_BYTES)
        file.write(end)
        digest.update(end)
    index = _index_bytes(rows)
    with disk_errors(local_path):
        Path(index_path(str(local_path))).write_bytes(index)
    num_bytes = offset + len(end)
    return ShardInfo(local_path.name, len(rows), num_bytes, digest.hexdigest(), hashlib.sha256(index).hexdigest())


def _record(sample: Sample, members: Members) -> bytes:
    if "." in sample.key or "/" in sample.key or not sample.key:
        raise ValueError(f"key {sample.key!r} must not be empty and hold no dot and no slash")
    if "json" in members or any("/" in name for name in members):
        raise ValueError(f"members {sorted(members)} of {sample.key} must hold no slash, and none is called json")
    entries = [("json", sample.to_json()), *sorted(members.items())]
    return b"".join(part for name, data in entries for part in _entry(f"{sample.key}.{name}", data))


def _entry(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(data), 0o644, 0
    return header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"), data, bytes(-len(data) % _BLOCK_BYTES)


def _index_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def read_samples(store: Store, shard_path: str, offset: int, length: int) -> list[tuple[Sample, Members]]:
    """Samples in a byte range of a shard: one ranged read, of one sample or of several neighbours.

    Raises `BadMedia` (`damaged_shard`) if the bytes are not whole samples: a tar reader would stop there in silence.
    """
    try:
        return list(_parse(store.read_range(shard_path, offset, length)))
    except (ValueError, tarfile.HeaderError) as error:
        raise BadMedia("damaged_shard", f"{shard_path} at byte {offset}: {error}") from error


def _parse(data: bytes) -> Iterator[tuple[Sample, Members]]:
    sample: Sample | None = None
    members: Members = {}
    for name, content in _entries(data):
        key, _, member = name.partition(".")
        if member == "json":
            if sample:
                yield sample, members
            sample, members = Sample.from_json(content), {}
        if sample is None or sample.key != key:
            raise ValueError(f"{name} does not belong to the sample before it")
        if member != "json":
            members[member] = content
    if sample:
        yield sample, members


def _entries(data: bytes) -> Iterator[tuple[str, bytes]]:
    position = 0
    while position < len(data):
        header = tarfile.TarInfo.frombuf(data[position : position + _BLOCK_BYTES], "utf-8", "strict")
        start = position + _BLOCK_BYTES
        content = data[start : start + header.size]
        if len(content) != header.size:
            raise ValueError(f"{header.name} is cut")
        yield header.name, content
        position = start + header.size + -header.size % _BLOCK_BYTES


def publish_manifest(store: Store, manifest: Manifest) -> None:
    """Makes a split visible. To be called when all of its shards are in place."""
    store.write(manifest_path(manifest.split), manifest.to_json())


def read_manifest(store: Store, split: str) -> Manifest:
    """The manifest of a split. Raises `UserError` if there is none or it is damaged."""
    place = f"{store.url}/{manifest_path(split)}"
    try:
        return Manifest.from_json(store.read(manifest_path(split)))
    except FileNotFoundError as error:
        raise UserError(place, "there is no such manifest", "run an ingest job that writes here first") from error
    except ValueError as error:
        raise UserError(place, f"cannot be read: {error}", "run the ingest job again") from error


def read_index(store: Store, manifest: Manifest, source: str) -> pa.Table:
    """`INDEX_SCHEMA` plus `shard` (int32, position in the source's shards), in order of shard and offset.

    Raises `UserError` for an unknown source, and for an index that is missing or not the manifest's.
    """
    if source not in manifest.sources:
        known = ", ".join(sorted(manifest.sources)) or "none"
        raise UserError(f"{store.url}/{manifest.split}", f"has no source {source!r}", f"its sources: {known}")
    shards = manifest.sources[source].shards
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda shard: _read_shard_index(store, shard), shards))
    ordinals = [ordinal for ordinal, table in enumerate(tables) for _ in range(len(table))]
    return pa.concat_tables(tables).append_column("shard", pa.array(ordinals, pa.int32()))


def _read_shard_index(store: Store, shard: ShardInfo) -> pa.Table:
    path = index_path(shard.path)
    fix = "run the ingest job again"
    try:
        data = store.read(path)
    except FileNotFoundError as error:
        raise UserError(f"{store.url}/{path}", "is named in the manifest but missing", fix) from error
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(f"{store.url}/{path}", "is not the index that the manifest names", fix)
    return pq.read_table(io.BytesIO(data), schema=INDEX_SCHEMA)


def verify(store: Store, split: str) -> list[str]:
    """Compares a split with its manifest, reading every byte of it. Returns the problems, none if it is sound."""
    manifest = read_manifest(store, split)
    shards = [shard for source in manifest.sources.values() for shard in source.shards]
    expected = {manifest_path(split), *(path for shard in shards for path in (shard.path, index_path(shard.path)))}
    present = set(store.list(split))
    problems = [f"{path}: missing" for path in sorted(expected - present)]
    problems += [f"{path}: not in the manifest" for path in sorted(present - expected)]
    for name, source in sorted(manifest.sources.items()):
        if source.num_samples != sum(shard.num_samples for shard in source.shards):
            problems.append(f"{split}/{name}: {source.num_samples} samples, its shards hold another number")
    for shard in shards:
        problems += _verify_shard(store, shard, present)
    return problems


def _verify_shard(store: Store, shard: ShardInfo, present: set[str]) -> list[str]:
    problems = []
    if shard.path in present:
        data = store.read(shard.path)
        if len(data) != shard.num_bytes:
            problems.append(f"{shard.path}: {len(data)} bytes, the manifest says {shard.num_bytes}")
        elif hashlib.sha256(data).hexdigest() != shard.sha256:
            problems.append(f"{shard.path}: its bytes have changed")
    if index_path(shard.path) in present:
        try:
            num_rows = len(_read_shard_index(store, shard))
        except UserError as error:
            return [*problems, f"{index_path(shard.path)}: {error.problem}"]
        if num_rows != shard.num_samples:
            problems.append(f"{shard.path}: {num_rows} indexed samples, the manifest says {shard.num_samples}")
    return problems
