"""What a dataset holds, shard by shard: every sample without its files, kept so that a shard is read once.

    {store}/{digest}.parquet    of one shard: a row a sample, its JSON without negatives, or why it cannot be read

The digest is that of the shard's content and mapping, so that a listing never goes out of date.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.types import Item, Role, ShardRow, content_id, query_id, segment_sha256, target_id
from pipelines.samples import Rejected, Sample, TimeRange
from pipelines.storage.store import Store

_VERSION = 2  # of what a listing holds
_CONTENT_DIGITS = 32  # of `Item.content`
_SCHEMA = pa.schema(
    [("sample", pa.string()), ("origin", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


@dataclass(frozen=True, slots=True)
class ListedShard:
    """One shard of a split: samples `start` to `stop` of `source`.

    `digest` identifies the bytes and how they become samples, the index and the names in the samples.
    """

    split: str
    source: str
    task: str
    start: int
    stop: int
    digest: str

    @property
    def path(self) -> str:
        """The place of its listing."""
        return f"{self.digest}.parquet"


def shards_of(reader: Reader) -> list[ListedShard]:
    """Return the shards of the reader's split, source by source, in the order of their samples."""
    found = []
    for source in reader.sizes():
        info = reader.source(source)
        start = 0
        for shard in info.shards:
            stop = start + shard.num_samples
            digest = content_id([_VERSION, shard.sha256, info.mapping, shard.index_sha256, source, info.task])
            found.append(ListedShard(reader.data.split, source, info.task, start, stop, digest))
            start = stop
    return found


def write_listing(data: DataConfig, shard: ListedShard, store: Store) -> None:
    """Read a shard once and keep what it holds."""
    reader = Reader(data.model_copy(update={"split": shard.split}))
    rows: list[dict[str, Any]] = []
    for record in reader.records(shard.source, range(shard.start, shard.stop)):
        if isinstance(record, Rejected):
            rows.append({"sample": None, **asdict(record)})
        else:
            rows.append({"sample": replace(record, negatives=()).to_json().decode()})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    store.write(shard.path, sink.getvalue())


def read_listing(shard: ListedShard, store: Store) -> Iterator[Sample | Rejected]:
    """Yield the samples of a listed shard in order, without negatives, or why one cannot be read."""
    try:
        for row in pq.read_table(io.BytesIO(store.read(shard.path)), schema=_SCHEMA).to_pylist():
            if row["sample"] is None:
                yield Rejected(row["origin"], row["reason"], row["detail"])
            else:
                yield Sample.from_json(row["sample"])
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{store.url}/{shard.path}", f"cannot be read: {error}", "delete the file") from error


def row_item(shard: ListedShard, index: int, sample: Sample, role: Role, segment: TimeRange | None = None) -> Item:
    """Return one input of a sample as an item, or a segment of its target.

    Inputs of equal content and instruction have one id as targets and one as queries, wherever they are.
    """
    row = ShardRow(shard.split, shard.source, index, role)
    name = f"{shard.source}/{sample.key}"
    if role == "query":
        content = sample.query_sha256[:_CONTENT_DIGITS]
        return Item(query_id(sample), name, sample.query, content, sample.instruction, row=row)
    if segment is not None:
        sample = replace(sample, target_sha256=segment_sha256(sample.target_sha256, segment))
        name = f"{name} {segment}"
    content = sample.target_sha256[:_CONTENT_DIGITS]
    return Item(target_id(sample), name, sample.positive, content, sample.target_instruction, row=row, segment=segment)
