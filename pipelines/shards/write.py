"""Deterministic shards: WebDataset tars with an index. Equal samples give equal bytes, so that a hash is a version."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from pipelines.samples import Members, Sample
from pipelines.shards.index import IndexRow, index_bytes, with_hashes
from pipelines.shards.manifest import ShardInfo, index_path
from pipelines.shards.tar_headers import BLOCK_BYTES, CHECKSUM
from pipelines.storage.store import disk_errors


def write_shard(local_path: Path, samples: Iterable[tuple[Sample, Members]]) -> ShardInfo:
    """Write a tar (USTAR, json first, members sorted, no times, no owners) and its index next to it.

    A sample without hashes gets them. Raises `UserError` for a full disk, `ValueError` for a key or member name that
    WebDataset could not group.
    """
    digest = hashlib.sha256()
    rows: list[IndexRow] = []
    offset = 0
    with disk_errors(local_path), local_path.open("wb") as file:
        for sample, members in samples:
            sample = with_hashes(sample, members)
            record = _record(sample, members)
            file.write(record)
            digest.update(record)
            target, query = sample.target_sha256, sample.query_sha256
            row = IndexRow(sample.key, offset, len(record), target, len(members), query, zlib.crc32(record))
            rows.append(row)
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
    """Return the tar entries of one sample."""
    if "." in sample.key or "/" in sample.key or not sample.key:
        raise ValueError(f"key {sample.key!r} must not be empty and hold no dot and no slash")
    if "json" in members or any("/" in name for name in members):
        raise ValueError(f"members {sorted(members)} of {sample.key} must hold no slash, and none is called json")
    parts: list[bytes] = []
    for name, data in [("json", sample.to_json()), *sorted(members.items())]:
        parts += [_header(f"{sample.key}.{name}", len(data)), data, bytes(-len(data) % BLOCK_BYTES)]
    return b"".join(parts)


def _header(name: str, size: int) -> bytes:
    encoded = name.encode()
    if len(encoded) > tarfile.LENGTH_NAME or size >= _LARGEST_SIZE:
        return _info(name, size).tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    header = bytearray(_BLANK)  # four times as fast as tarfile
    header[: len(encoded)] = encoded
    header[_SIZE] = b"%011o\0" % size
    header[CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


def _info(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = size, 0o644, 0
    return header


_SIZE = slice(124, 136)
_LARGEST_SIZE = 8**11  # that 11 octal digits cannot say
_BLANK = bytearray(_info("", 0).tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
_BLANK[CHECKSUM] = b" " * 8  # as which it counts
