"""Samples of a shard by ranged read, whether ingest wrote the shard or it is external."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipelines.errors import BadMedia, UserError
from pipelines.samples import Members, Sample
from pipelines.shards.index import ShardIndex, with_hashes
from pipelines.shards.manifest import ShardInfo
from pipelines.shards.mapping import SampleMapper, SourceMapping
from pipelines.shards.tars import last_group, only_group
from pipelines.storage.location import open_object
from pipelines.storage.store import LocalStore, Store, check_relative_path

Parser = Callable[[str, bytes], tuple[Sample, Members]]
"""Key and bytes of one sample -> the sample. Raises `ValueError` or `BadMedia`."""


def parse_native_sample(key: str, data: bytes) -> tuple[Sample, Members]:
    """Parse a sample that `write_shard` wrote. Raises `ValueError` if the bytes are anything else."""
    group = only_group(data)
    members = {name: data[entry.start : entry.start + entry.size] for name, entry in group.members.items()}
    sample = Sample.from_json(members.pop("json", b""))
    if not key == sample.key == group.key:
        raise ValueError(f"the index says {key!r}, the shard {group.key!r} and {sample.key!r}")
    return sample, members


def external_sample_parser(source: str, mapping: SourceMapping) -> Parser:
    """Return a parser for an external source. The members of a sample are only the media that it names."""
    mapper = SampleMapper(source, mapping)

    def parse(key: str, data: bytes) -> tuple[Sample, Members]:
        group = last_group(data, key)
        members = mapper.select(data, group)
        sample = mapper.sample(key, members, key)
        return sample, {media.member: members[media.member] for part in sample.inputs() for media in part.media}

    return parse


def read_samples(
    store: Store,
    path: str,
    index: ShardIndex,
    rows: range,
    parse: Parser = parse_native_sample,
    tag: str | None = None,
) -> list[tuple[Sample, Members] | BadMedia]:
    """Read adjacent samples of a shard in one ranged read. All have `target_sha256` and `query_sha256`.

    With `tag`, they are read only from the object that had this tag when it was indexed. Bytes that are not the indexed
    sample become `BadMedia` (`damaged_shard`) in its place and affect no other sample. Raises `FileNotFoundError`, and
    `UserError` if the shard ends early or has another tag.
    """
    start, length = index.span(rows[0], rows[-1])
    found_data = store.read_range(path, start, length) if tag is None else store.read_range_if(path, start, length, tag)
    if found_data is None:
        problem = "has changed since it was indexed: its samples may be others now"
        raise UserError(f"{store.url}/{path}", problem, "restore it, or run the index job again")
    data = found_data
    found: list[tuple[Sample, Members] | BadMedia] = []
    for row in rows:
        offset, length = index.span(row, row)
        content = data[offset - start : offset - start + length]
        try:
            if index.checksums is not None and zlib.crc32(content) != index.checksums[row]:
                raise ValueError("other bytes than were indexed")
            sample, members = parse(index.keys[row].as_py(), content)
            if index.targets is not None:
                sample = replace(sample, target_sha256=index.target_sha256(row))
            found.append((with_hashes(sample, members), members))  # datasets of format 2 lack those of queries
        except (ValueError, BadMedia) as error:
            found.append(BadMedia("damaged_shard", f"{path} at byte {offset}: {error}"))
    return found


def shard_file(store: Store, shard: ShardInfo, endpoint: str | None = None) -> tuple[Store, str]:
    """Return the store that holds a shard, and its path there. `endpoint` is that of external shards on S3."""
    if not shard.index:
        return store, shard.path
    return open_object(shard.path, endpoint)


def check_length(store: Store, path: str, shard: ShardInfo) -> None:
    """Raise `UserError` if a shard is longer or shorter than its manifest says."""
    if (found := store.size(path)) != shard.num_bytes:
        problem = f"has {found:,} bytes, the manifest says {shard.num_bytes:,}: it was replaced"
        raise UserError(f"{store.url}/{path}", problem, f"restore it, or {shard.remedy}")


@contextmanager
def on_disk(store: Store, path: str) -> Iterator[Path]:
    """Provide an object as a local file: itself, or a temporary download. Raises `FileNotFoundError`."""
    if isinstance(store, LocalStore):
        yield store.root / check_relative_path(path)
        return
    with tempfile.TemporaryDirectory(prefix="rzen-shard-") as folder:
        local = Path(folder, "shard.tar")
        store.download(path, local)
        yield local
