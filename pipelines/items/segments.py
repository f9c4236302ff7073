"""Long videos as segments, which are embedded one by one: their ranges, and the lengths of the videos of a shard.

    {store}/{digest}.parquet    of one shard: the length of each target that is a video, or why it has none

The digest is that of the shard's listing and of the settings that open a video.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.listing import ListedShard, read_listing
from pipelines.items.types import content_id
from pipelines.samples import Rejected, Sample, TimeRange
from pipelines.storage.store import Store

_VERSION = 1  # of what a file of lengths holds
_LEAST_LAST = 0.5  # of a segment: a shorter last one is part of the one before
_LIMITS = {name for name in MediaConfig.model_fields if name.startswith("max_")}
_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("length_s", pa.float64()),
        ("origin", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Segmentation:
    """How long videos are divided: segments of `seconds`, each beginning `overlap_s` before the end of the last one."""

    seconds: float
    overlap_s: float = 0.0

    def divide(self, length_s: float) -> tuple[TimeRange, ...]:
        """Return the segments of a video in order. There are none for a video that is embedded whole.

        The last one ends with the video. If it would be shorter than half a segment, the one before lasts until the
        end instead.
        """
        if length_s <= self.seconds:
            return ()
        step_s = self.seconds - self.overlap_s
        count = 1
        while (count - 1) * step_s + self.seconds < length_s:
            count += 1
        if length_s - (count - 1) * step_s < _LEAST_LAST * self.seconds:
            count -= 1
        if count == 1:
            return ()
        starts = [round(number * step_s, 3) for number in range(count)]
        ends = [round(start_s + self.seconds, 3) for start_s in starts[:-1]]
        return tuple(TimeRange(*pair) for pair in zip(starts, [*ends, round(length_s, 3)], strict=True))


def is_divisible(sample: Sample) -> bool:
    """Return whether a target is one video, with or without text."""
    return [media.kind for media in sample.positive.media] == ["video"]


def lengths_path(data: DataConfig, shard: ListedShard) -> str:
    """Return the place of the lengths of a shard's videos."""
    limits = data.media.model_dump(mode="json", include=_LIMITS)
    return f"{content_id([_VERSION, 'lengths', shard.digest, limits])}.parquet"


def write_lengths(data: DataConfig, shard: ListedShard, store: Store) -> None:
    """Read the videos of a listed shard once, and keep their lengths."""
    listed = enumerate(read_listing(shard, store), start=shard.start)
    indices = [index for index, sample in listed if isinstance(sample, Sample) and is_divisible(sample)]
    rows = []
    reader = Reader(data.model_copy(update={"split": shard.split}))
    for index, found in zip(indices, reader.video_lengths(shard.source, indices), strict=True):
        if isinstance(found, Rejected):
            rows.append({"index": index, "origin": found.origin, "reason": found.reason, "detail": found.detail})
        else:
            rows.append({"index": index, "length_s": found})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    store.write(lengths_path(data, shard), sink.getvalue())


def read_lengths(data: DataConfig, shard: ListedShard, store: Store) -> dict[int, float | Rejected]:
    """Return index in the source -> length in seconds of each target that is a video, or why it has none."""
    path = lengths_path(data, shard)
    try:
        rows = pq.read_table(io.BytesIO(store.read(path)), schema=_SCHEMA).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{store.url}/{path}", f"cannot be read: {error}", "delete the file") from error
    return {row["index"]: _length(row) for row in rows}


def has_videos(shard: ListedShard, store: Store) -> bool:
    """Return whether a listed shard has a target that is a video."""
    return any(isinstance(sample, Sample) and is_divisible(sample) for sample in read_listing(shard, store))


def _length(row: dict[str, Any]) -> float | Rejected:
    if row["reason"] is not None:
        return Rejected(row["origin"], row["reason"], row["detail"])
    length_s: float = row["length_s"]
    return length_s
