"""External shards, read once to index them: their samples, which of these are usable, and their byte ranges.

A shard stays where it is, and is never written to. Its index has the format of all indices, and the result of the scan
in its metadata. The index therefore shows whether a shard has to be read again. Files are hashed, and decoded only on
request.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.decode import Decoder
from pipelines.samples import Sample
from pipelines.shards.index import IndexRow, content_sha256, index_bytes
from pipelines.shards.manifest import DIGEST_CHARS, ShardInfo
from pipelines.shards.mapping import SampleMapper, SourceMapping
from pipelines.shards.read import on_disk
from pipelines.shards.shuffle_check import ShardSimilarity, Words, shard_similarity, words_of
from pipelines.shards.tars import Finding, Group, entries, groups
from pipelines.storage.location import open_object
from pipelines.storage.shard_urls import ShardFile
from pipelines.storage.store import Store

SCAN_VERSION = 4
_METADATA = b"rzen"
_MAX_EXAMPLES = 3  # for each shard and reason


@dataclass(slots=True)
class ScanCounts:
    """Counts of the samples of a shard: `seen` is the sum of `accepted` and of all counts in `rejected`.

    `findings` are places that belong to no sample, and their bytes: damage, files without an extension.
    """

    seen: int = 0
    accepted: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    findings: dict[str, list[int]] = field(default_factory=dict)  # reason -> [places, bytes]
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys or offsets, with details

    def reject(self, key: str, error: BadMedia) -> None:
        """Count a sample that is not used."""
        self.rejected[error.reason] = self.rejected.get(error.reason, 0) + 1
        self._example(error.reason, f"{key}: {error.detail}" if error.detail else key)

    def find(self, finding: Finding) -> None:
        """Count bytes that belong to no sample."""
        places, num_bytes = self.findings.get(finding.reason, (0, 0))
        self.findings[finding.reason] = [places + 1, num_bytes + finding.num_bytes]
        self._example(finding.reason, f"at byte {finding.offset}")

    def _example(self, reason: str, text: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _MAX_EXAMPLES:
            examples.append(text)


@dataclass(frozen=True, slots=True)
class ScanJob:
    """One shard to index. With `media`, every file is decoded once, in a killable child."""

    source: str
    found: ShardFile
    folder: str
    """Folder of the index below the data root."""
    mapping: SourceMapping
    media: MediaConfig | None = None

    @property
    def index_path(self) -> str:
        """Path of the index, named after the shard and all that decides the index.

        Added, removed and changed shards do not change the indices of others, nor those of an earlier manifest.
        """
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return f"{self.folder}/{PurePosixPath(self.found.url).stem}-{digest[:DIGEST_CHARS]}.idx.parquet"

    def identity(self) -> dict[str, Any]:
        """Return what decides the index. An index that was made with an equal identity is still valid."""
        media = self.media.model_dump() if self.media else None
        content = {"url": self.found.url, "tag": self.found.tag, "selection": self.mapping.selection(), "media": media}
        return {"scan_version": SCAN_VERSION, **content}


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """A shard with its index in place; `reused` if an earlier job has indexed it."""

    shard: ShardInfo
    tally: ScanCounts
    neighbors: ShardSimilarity
    reused: bool = False


def index_shard(job: ScanJob, out: Store, endpoint: str | None = None) -> IndexedShard:
    """Index a shard, or return the valid index of an earlier job. Raises `UserError` for a missing shard."""
    try:
        index = out.read(job.index_path)
    except FileNotFoundError:
        pass
    else:
        if earlier := _reuse(job, index):
            return earlier
    rows, tally, neighbors, num_bytes, sha256 = _scan(job, endpoint)
    content = {"num_bytes": num_bytes, "sha256": sha256, "tally": asdict(tally), "neighbors": asdict(neighbors)}
    metadata = json.dumps(job.identity() | content, sort_keys=True).encode()
    index = index_bytes(rows, {_METADATA: metadata})
    out.write(job.index_path, index)
    return IndexedShard(_shard_info(job, index, len(rows), num_bytes, sha256), tally, neighbors)


def _reuse(job: ScanJob, index: bytes) -> IndexedShard | None:
    """Return the result of the scan that made an index, or None if shard, mapping or program have changed since."""
    try:
        schema = pq.read_schema(io.BytesIO(index))
        content = json.loads((schema.metadata or {})[_METADATA])
        if any(content.get(name) != value for name, value in job.identity().items()):
            return None
        tally, neighbors = ScanCounts(**content["tally"]), ShardSimilarity(**content["neighbors"])
        neighbors.pool = [(target, words) for target, words in neighbors.pool]
        shard = _shard_info(job, index, tally.accepted, content["num_bytes"], content["sha256"])
    except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # a damaged index is made again
    return IndexedShard(shard, tally, neighbors, reused=True)


def _shard_info(job: ScanJob, index: bytes, num_samples: int, num_bytes: int, sha256: str) -> ShardInfo:
    digest = hashlib.sha256(index).hexdigest()
    return ShardInfo(job.found.url, num_samples, num_bytes, sha256, digest, job.index_path, job.found.tag)


def _scan(job: ScanJob, endpoint: str | None) -> tuple[list[IndexRow], ScanCounts, ShardSimilarity, int, str]:
    try:
        with on_disk(*open_object(job.found.url, endpoint)) as path, path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = file.tell()
            if not num_bytes:  # mmap rejects empty files
                return [], ScanCounts(findings={"no_end_marker": [1, 0]}), ShardSimilarity(), 0, sha256
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                rows, tally, texts = scan(data, SampleMapper(job.source, job.mapping), job.media)
    except FileNotFoundError as error:
        problem = "existed when the job began, and is missing now"
        raise UserError(job.found.url, problem, "run the command again") from error
    return rows, tally, shard_similarity(texts), num_bytes, sha256


def scan(
    data: bytes | mmap.mmap, mapper: SampleMapper, media: MediaConfig | None = None
) -> tuple[list[IndexRow], ScanCounts, list[tuple[str, Words]]]:
    """Return the index rows of the usable samples of a tar in order, all counts, and (target, words) of each row.

    Reasons for rejecting a sample: damaged, duplicate_member, duplicate_key, those of `SampleMapper.sample`, and with
    `media` those of the decoders.
    """
    rows: list[IndexRow] = []
    texts: list[tuple[str, Words]] = []
    tally = ScanCounts()
    for group in _distinct_groups(data, tally):
        try:
            sample, target, query = _usable(data, group, mapper, media)
        except BadMedia as error:
            tally.reject(_printable(group.key), error)
            continue
        crc32 = zlib.crc32(data[group.offset : group.end])
        length = group.end - group.offset
        rows.append(IndexRow(group.key, group.offset, length, target, len(group.members), query, crc32))
        texts.append((target, words_of(f"{sample.query.text} {sample.positive.text}")))
    tally.accepted = len(rows)
    assert tally.seen == tally.accepted + sum(tally.rejected.values())
    return rows, tally, texts


def _distinct_groups(data: bytes | mmap.mmap, tally: ScanCounts) -> Iterator[Group]:
    """Yield the samples of a tar, one for each key. Count everything else."""
    keys: set[str] = set()
    for item in groups(entries(data)):
        if isinstance(item, Finding):
            tally.find(item)
            continue
        tally.seen += 1
        if item.key in keys:
            tally.reject(_printable(item.key), BadMedia("duplicate_key", "an earlier sample of the shard has it"))
            continue
        keys.add(item.key)
        yield item


def _usable(
    data: bytes | mmap.mmap, group: Group, mapper: SampleMapper, media: MediaConfig | None
) -> tuple[Sample, str, str]:
    """Return a sample, and the identities of its target and query. Raises `BadMedia`."""
    if group.problem:
        raise BadMedia(group.problem)
    if _printable(group.key) != group.key:
        raise BadMedia("not_utf8", "the names of its members")
    if len({name.lower() for name in group.members}) < len(group.members):
        raise BadMedia("duplicate_member", "extensions differ in case only")
    members = mapper.select(data, group)
    sample = mapper.sample(group.key, members)
    if media:
        _isolated_decoder(media).sample(sample, members, instructions=False)
    return sample, content_sha256(sample.positive, members), content_sha256(sample.query, members)


@cache
def _isolated_decoder(media: MediaConfig) -> Decoder:
    """Return the decoder of this process for these settings. Its child ends with the process."""
    return Decoder(media, isolated=True)


def _printable(key: str) -> str:
    return key.encode(errors="replace").decode()
