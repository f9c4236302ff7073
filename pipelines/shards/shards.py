"""Deterministic shards: WebDataset tar files with an index, and the manifest that makes them a data set.

Layout under a data root: `{split}/{source}/{source}-000000.tar`, the same with `.idx.parquet`, and, written last,
`{split}/manifest.json`. Readers trust only the manifest. Equal samples give equal bytes, so that a hash is a version.

External shards (`pipelines/shards/external.py`) stay where they are: the manifest names them by absolute URL, with a
mapping for each source. Only their indices are under the data root.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import BadMedia, UserError
from pipelines.samples import Input, Sample
from pipelines.shards.mapping import SampleMapper, SourceMapping
from pipelines.shards.tars import BLOCK_BYTES, only_group
from pipelines.storage.location import open_store
from pipelines.storage.store import LocalStore, Store, check_relative_path, disk_errors

FORMAT_VERSION = 2
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # bytes from the start of the tar to the sample's first header
        ("length", pa.int64()),  # bytes to the end of its last member, padding included
        ("target_sha256", pa.string()),
        ("num_members", pa.int32()),  # the json not counted
    ]
)
_READERS = 8
_SHARDS_A_PIECE = 1000

Members = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One sample of a shard: a row of `INDEX_SCHEMA`."""

    key: str
    offset: int
    length: int
    target_sha256: str
    num_members: int


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard: `path` relative to the data root (or to its folder, as `write_shard` returns it).

    A foreign shard's `path` is an absolute URL; its `index` lies below the data root, and `tag` is the store's tag of
    its content when it was indexed. Both are None for shards of ours.
    """

    path: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    index: str | None = None
    tag: str | None = None

    @property
    def index_path(self) -> str:
        """Where its index is, below the data root."""
        return self.index or index_path(self.path)

    @property
    def remedy(self) -> str:
        """What to do where it is not as the manifest says."""
        return f"run the {'index' if self.index else 'ingest'} job again"


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """The shards of one source in a split; all samples of a source have one task.

    `mapping`, a `SourceMapping` as plain data, makes samples of foreign shards; None for shards of ours. The hash is
    that of the file at `duplicates_path`; None before `pipelines/shards/duplicates.py` has written it.
    """

    task: str
    num_samples: int
    shards: tuple[ShardInfo, ...]
    mapping: dict[str, Any] | None = None
    duplicates_sha256: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of its content: equal for byte-identical data."""
        return _fingerprint(self)


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
        return _fingerprint(self)

    def to_json(self) -> bytes:
        """Readable JSON with the fingerprint in it."""
        content = _plain(self) | {"fingerprint": self.fingerprint}
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, default=_plain) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Inverse of `to_json`. Raises `ValueError` for anything else, also for an edited manifest."""
        try:
            content = json.loads(data, object_hook=_shard)
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {content['format_version']}, this program reads {FORMAT_VERSION}")
            fingerprint = content.pop("fingerprint")
            sources = {name: _source(source) for name, source in content.pop("sources").items()}
            manifest = cls(sources=sources, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error
        if manifest.fingerprint != fingerprint:
            raise ValueError("its fingerprint is not that of its content")
        return manifest


def _plain(part: Any) -> dict[str, Any]:
    """The fields of a manifest, source or shard, without what only some have where there is none."""
    values = ((item.name, getattr(part, item.name)) for item in fields(part))
    return {name: value for name, value in values if value is not None}


def _fingerprint(part: Any) -> str:
    digest = hashlib.sha256()
    for piece in _canonical(part):
        digest.update(piece.encode())
    return digest.hexdigest()


def _canonical(part: Any) -> Iterator[str]:
    """JSON with sorted keys and without spaces, in pieces: a manifest of a million shards is half a gigabyte of it."""
    if isinstance(part, Manifest | SourceInfo):
        part = _plain(part)
    if isinstance(part, dict) and part:
        for position, name in enumerate(sorted(part)):
            yield f"{',' if position else '{'}{_compact(name)}:"
            yield from _canonical(part[name])
        yield "}"
    elif isinstance(part, tuple) and part:
        for start in range(0, len(part), _SHARDS_A_PIECE):
            yield f"{',' if start else '['}{_compact(part[start : start + _SHARDS_A_PIECE])[1:-1]}"
        yield "]"
    else:
        yield _compact(part)


def _compact(part: Any) -> str:
    return json.dumps(part, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def _shard(parsed: dict[str, Any]) -> Any:
    """A shard as soon as it is parsed, so that a million dicts are never there at once; all else as it is."""
    return ShardInfo(**parsed) if parsed.keys() >= {"path", "index_sha256"} else parsed


def _source(parsed: dict[str, Any]) -> SourceInfo:
    return SourceInfo(**parsed | {"shards": tuple(parsed["shards"])})


def manifest_path(split: str) -> str:
    """Where the manifest of a split is, below the data root."""
    return f"{split}/manifest.json"


def index_path(shard_path: str) -> str:
    """Where the index of a shard is: beside it."""
    return f"{shard_path.removesuffix('.tar')}.idx.parquet"


def duplicates_path(split: str, source: str) -> str:
    """Where the samples of a source that share a target are named, below the data root."""
    return f"{split}/{source}/duplicates.parquet"


def manifest_files(manifest: Manifest) -> set[str]:
    """What a split consists of below the data root, apart from its manifest."""
    shards = [shard for source in manifest.sources.values() for shard in source.shards]
    files = {shard.index_path for shard in shards} | {shard.path for shard in shards if not shard.index}
    return files | {
        duplicates_path(manifest.split, name) for name, info in manifest.sources.items() if info.duplicates_sha256
    }


def target_sha256(positive: Input, members: Mapping[str, bytes]) -> str:
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
    rows: list[IndexRow] = []
    offset = 0
    with disk_errors(local_path), local_path.open("wb") as file:
        for sample, members in samples:
            record = _record(sample, members)
            file.write(record)
            digest.update(record)
            rows.append(IndexRow(sample.key, offset, len(record), sample.target_sha256, len(members)))
            offset += len(record)
        end = bytes(2 * BLOCK_BYTES)
        file.write(end)
        digest.update(end)
    index = index_bytes(rows)
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
    return header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"), data, bytes(-len(data) % BLOCK_BYTES)


def index_bytes(rows: list[IndexRow], metadata: dict[bytes, bytes] | None = None) -> bytes:
    """The rows as a Parquet file, with `metadata` of the caller's in its schema."""
    columns = {name: [getattr(row, name) for row in rows] for name in INDEX_SCHEMA.names}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, INDEX_SCHEMA.with_metadata(metadata)), sink, compression="zstd")
    return sink.getvalue()


@dataclass(frozen=True)
class ShardIndex:
    """Where the N samples of a shard lie: bytes, int64 [N]. `targets` are sha256 digests, 32 bytes each, or None."""

    keys: pa.StringArray
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    targets: bytes | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def num_bytes(self) -> int:
        """Memory that it takes, nearly."""
        arrays = self.keys.nbytes + self.offsets.nbytes + self.lengths.nbytes
        return int(arrays) + len(self.targets or b"")

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Offset and length in bytes of the samples `first` .. `last`, and of what lies between them."""
        start = int(self.offsets[first])
        return start, int(self.offsets[last] + self.lengths[last]) - start

    def target_sha256(self, row: int) -> str:
        """Of a sample, where targets were read."""
        return (self.targets or b"")[32 * row : 32 * (row + 1)].hex()


Parser = Callable[
    [str, bytes], tuple[Sample, Members]
]  # key and bytes of one sample -> sample; `ValueError`, `BadMedia`


def parse_native_sample(key: str, data: bytes) -> tuple[Sample, Members]:
    """A sample of ours from its bytes. Raises `ValueError` if they are anything else."""
    group = only_group(data)
    members = {name: data[entry.start : entry.start + entry.size] for name, entry in group.members.items()}
    sample = Sample.from_json(members.pop("json", b""))
    if not key == sample.key == group.key:
        raise ValueError(f"the index says {key!r}, the shard {group.key!r} and {sample.key!r}")
    return sample, members


def external_sample_parser(source: str, mapping: SourceMapping) -> Parser:
    """Makes samples of a foreign source from their bytes; only the media that a sample names are its members."""
    mapper = SampleMapper(source, mapping)

    def parse(key: str, data: bytes) -> tuple[Sample, Members]:
        group = only_group(data)
        if group.key != key:
            raise ValueError(f"the index says {key!r}, the shard {group.key!r}")
        members = mapper.select(data, group)
        sample = mapper.sample(key, members, key)
        return sample, {media.member: members[media.member] for side in sample.sides() for media in side.media}

    return parse


def read_samples(
    store: Store, path: str, index: ShardIndex, rows: range, parse: Parser = parse_native_sample
) -> list[tuple[Sample, Members] | BadMedia]:
    """Neighboring samples of a shard, in one ranged read. Bytes that are no sample are `BadMedia` (`damaged_shard`)
    in its place, and cost no other. Raises `FileNotFoundError`, and `UserError` if the shard ends earlier.
    """
    start, length = index.span(rows[0], rows[-1])
    data = store.read_range(path, start, length)
    found: list[tuple[Sample, Members] | BadMedia] = []
    for row in rows:
        offset, length = index.span(row, row)
        try:
            sample, members = parse(index.keys[row].as_py(), data[offset - start : offset - start + length])
            if index.targets is not None:
                sample = replace(sample, target_sha256=index.target_sha256(row))
            found.append((sample, members))
        except (ValueError, BadMedia) as error:
            found.append(BadMedia("damaged_shard", f"{path} at byte {offset}: {error}"))
    return found


def publish_manifest(store: Store, manifest: Manifest) -> None:
    """Makes a split visible. To be called when all of its shards are in place."""
    store.write(manifest_path(manifest.split), manifest.to_json())


def read_manifest(store: Store, split: str) -> Manifest:
    """The manifest of a split. Raises `UserError` if there is none or it is damaged."""
    place = f"{store.url}/{manifest_path(split)}"
    try:
        return Manifest.from_json(store.read(manifest_path(split)))
    except FileNotFoundError as error:
        raise UserError(
            place, "there is no such manifest", "run a job of kind ingest or index that writes here"
        ) from error
    except ValueError as error:
        raise UserError(place, f"cannot be read: {error}", "run the job again that wrote it") from error


def source_info(store: Store, manifest: Manifest, source: str) -> SourceInfo:
    """A source of a manifest. Raises `UserError` if it has no such source."""
    if source not in manifest.sources:
        known = ", ".join(sorted(manifest.sources)) or "none"
        raise UserError(f"{store.url}/{manifest.split}", f"has no source {source!r}", f"its sources: {known}")
    return manifest.sources[source]


def read_shard_index(store: Store, shard: ShardInfo) -> ShardIndex:
    """The index of a shard. Raises `UserError` for one that is missing or not the manifest's."""
    columns = ["key", "offset", "length", *(["target_sha256"] if shard.index else [])]  # samples of ours have theirs
    table = read_index_table(store, shard, columns)
    keys, offsets, lengths = (_column(table, name) for name in ("key", "offset", "length"))
    targets = _digests(_column(table, "target_sha256")) if shard.index else None
    return ShardIndex(keys, offsets.to_numpy(), lengths.to_numpy(), targets)


def read_index_table(store: Store, shard: ShardInfo, columns: list[str]) -> pa.Table:
    """Columns of the index of a shard. Raises `UserError` for one that is missing or not the manifest's."""
    place, fix = f"{store.url}/{shard.index_path}", shard.remedy
    try:
        data = store.read(shard.index_path)
    except FileNotFoundError as error:
        raise UserError(place, "is named in the manifest but missing", fix) from error
    if _sha256(data) != shard.index_sha256:
        raise UserError(place, "is not the index that the manifest names", fix)
    table = pq.read_table(io.BytesIO(data), columns=columns).combine_chunks()
    if len(table) != shard.num_samples:
        raise UserError(place, f"{len(table)} indexed samples, the manifest says {shard.num_samples}", fix)
    return table


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _digests(hexadecimal: pa.StringArray) -> bytes:
    """64 characters a row, to 32 bytes a row."""
    return b"".join(binascii.unhexlify(text) for text in hexadecimal.to_pylist())


def shard_file(store: Store, shard: ShardInfo, endpoint: str | None = None) -> tuple[Store, str]:
    """The store that a shard lies in, and its path there. `endpoint` is that of foreign shards on S3."""
    if not shard.index:
        return store, shard.path
    folder, _, name = shard.path.rpartition("/")
    return open_store(folder or "/", endpoint), name


@contextmanager
def on_disk(store: Store, path: str) -> Iterator[Path]:
    """An object as a local file: itself, or a copy for the time of the block. Raises `FileNotFoundError`."""
    if isinstance(store, LocalStore):
        yield store.root / check_relative_path(path)
        return
    with tempfile.TemporaryDirectory(prefix="rzen-shard-") as folder:
        local = Path(folder, "shard.tar")
        store.download(path, local)
        yield local


def verify(
    store: Store,
    split: str,
    endpoint: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Compares a split with its manifest. Returns the problems, none if it is sound; memory does not grow with shards.

    Every byte of our own shards is read. Foreign shards, whose `endpoint` may be given, must have the tag that they
    had when they were indexed. `on_progress` gets (done, all) shards.
    """
    manifest = read_manifest(store, split)
    shards = [shard for source in manifest.sources.values() for shard in source.shards]
    expected = {manifest_path(split), *manifest_files(manifest)}
    present = set(store.list(split)) - {report_path(split)}
    problems = [f"{path}: missing" for path in sorted(expected - present)]
    problems += [f"{path}: not in the manifest" for path in sorted(present - expected)]
    for name, source in sorted(manifest.sources.items()):
        if source.num_samples != sum(shard.num_samples for shard in source.shards):
            problems.append(f"{split}/{name}: {source.num_samples} samples, its shards hold another number")
        path = duplicates_path(split, name)
        if source.duplicates_sha256 and path in present and _sha256(store.read(path)) != source.duplicates_sha256:
            problems.append(f"{path}: its bytes have changed")
    tags = _foreign_tags(shards, endpoint)
    with ThreadPoolExecutor(_READERS) as pool:
        checked = pool.map(lambda shard: _verify_shard(store, shard, present, tags), shards)
        for done, found in enumerate(checked, start=1):
            problems += found
            if on_progress:
                on_progress(done, len(shards))
    return problems


def report_path(split: str) -> str:
    """Where the report of an index job is, below the data root."""
    return f"{split}/report.json"


def _foreign_tags(shards: list[ShardInfo], endpoint: str | None) -> dict[str, str]:
    """URL of every object in the folders of foreign shards -> its tag."""
    folders = {shard.path.rpartition("/")[0] or "/" for shard in shards if shard.index}
    stores = [open_store(folder, endpoint) for folder in sorted(folders)]
    return {f"{store.url.rstrip('/')}/{path}": tag for store in stores for path, tag in store.tags().items()}


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
