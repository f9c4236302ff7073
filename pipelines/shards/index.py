"""The index of a shard: key, byte range, target and query of every sample, as a Parquet file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.samples import Input, Sample
from pipelines.shards.manifest import ShardInfo
from pipelines.storage.store import Store

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # bytes from the start of the tar to the first header that the sample needs
        ("length", pa.int64()),  # bytes to the end of its last member, padding included
        ("target_sha256", pa.string()),
        ("num_members", pa.int32()),  # without the json
        ("query_sha256", pa.string()),  # not in datasets of format 2
        ("crc32", pa.uint32()),  # of these bytes of the tar; not in datasets that were made before
    ]
)


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One sample of a shard: a row of `INDEX_SCHEMA`."""

    key: str
    offset: int
    length: int
    target_sha256: str
    num_members: int
    query_sha256: str
    crc32: int | None = None


@dataclass(frozen=True)
class ShardIndex:
    """Byte ranges of the N samples of a shard, int64 [N]. `targets` are SHA-256 digests, 32 bytes each, or None.

    `checksums` are the CRC-32 of the bytes of each, uint32 [N]. None in datasets without.
    """

    keys: pa.StringArray
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    targets: bytes | None = None
    checksums: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def num_bytes(self) -> int:
        """Approximate memory that the index takes."""
        arrays = self.keys.nbytes + self.offsets.nbytes + self.lengths.nbytes
        checksums = 0 if self.checksums is None else self.checksums.nbytes
        return int(arrays) + len(self.targets or b"") + checksums

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return offset and length in bytes of the samples `first` .. `last` and everything between them."""
        rows = slice(first, last + 1)
        start = int(self.offsets[rows].min())  # a sample with hard links may begin before the one before it
        return start, int((self.offsets[rows] + self.lengths[rows]).max()) - start

    def target_sha256(self, row: int) -> str:
        """Return the target of a sample in hex, or "" if targets were not read."""
        return (self.targets or b"")[32 * row : 32 * (row + 1)].hex()


def content_sha256(part: Input, members: Mapping[str, bytes]) -> str:
    """Identify a query or target by its content: its text and the bytes of its media, in order."""
    digest = hashlib.sha256(hashlib.sha256(part.text.encode()).digest())
    for media in part.media:
        digest.update(hashlib.sha256(members[media.member]).digest())
    return digest.hexdigest()


def with_hashes(sample: Sample, members: Mapping[str, bytes]) -> Sample:
    """Return the sample with `target_sha256` and `query_sha256`. Those that it has are kept."""
    target = sample.target_sha256 or content_sha256(sample.positive, members)
    query = sample.query_sha256 or content_sha256(sample.query, members)
    return replace(sample, target_sha256=target, query_sha256=query)


def index_bytes(rows: list[IndexRow], metadata: dict[bytes, bytes] | None = None) -> bytes:
    """Return the rows as a Parquet file, with the caller's `metadata` in its schema."""
    columns = {name: [getattr(row, name) for row in rows] for name in INDEX_SCHEMA.names}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, INDEX_SCHEMA.with_metadata(metadata)), sink, compression="zstd")
    return sink.getvalue()


def read_shard_index(store: Store, shard: ShardInfo) -> ShardIndex:
    """Read the index of a shard. Raises `UserError` if it is missing or not the manifest's."""
    columns = ["key", "offset", "length", "crc32"]
    if shard.index:  # samples of shards that ingest wrote carry their own target
        columns.append("target_sha256")
    table = read_index_table(store, shard, columns)
    keys, offsets, lengths = (_column(table, name) for name in ("key", "offset", "length"))
    targets = _digests(_column(table, "target_sha256")) if shard.index else None
    checksums = None
    if "crc32" in table.column_names and not table["crc32"].null_count:
        checksums = _column(table, "crc32").to_numpy()
    return ShardIndex(keys, offsets.to_numpy(), lengths.to_numpy(), targets, checksums)


def read_index_table(store: Store, shard: ShardInfo, columns: Sequence[str]) -> pa.Table:
    """Read columns of the index of a shard, those that it has. Raises `UserError` if it is missing or not the
    manifest's.
    """
    place, fix = f"{store.url}/{shard.index_path}", shard.remedy
    try:
        data = store.read(shard.index_path)
    except FileNotFoundError as error:
        raise UserError(place, "is named in the manifest but missing", fix) from error
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(place, "is not the index that the manifest names", fix)
    with pq.ParquetFile(io.BytesIO(data), pre_buffer=False) as file:  # without Arrow's threads, as for duplicates
        known = [name for name in columns if name in file.schema_arrow.names]
        table = file.read(known, use_threads=False).combine_chunks()  # callers read several indices at once
    if len(table) != shard.num_samples:
        raise UserError(place, f"{len(table)} indexed samples, the manifest says {shard.num_samples}", fix)
    return table


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _digests(hexadecimal: pa.StringArray) -> bytes:
    """Pack 64 hex characters a row to 32 bytes a row, without an object per row in memory."""
    return b"".join(bytes.fromhex(text) for text in hexadecimal.to_pylist())
