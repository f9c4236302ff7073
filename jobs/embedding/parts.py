"""Parts of an embedded corpus: Parquet files of adjacent targets, each named by the content of its rows.

A part without a change keeps its file. It has a file next to it with the ids of its vectors (`rzen/index/by_id.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.embedding.engine import BadItems
from jobs.embedding.listings import samples_of
from jobs.embedding.segments import WHOLE, TargetSegments
from pipelines.items.listing import ListedShard, row_item
from pipelines.items.types import Item, Role, as_ids, segment_sha256
from pipelines.samples import Modality, Rejected, Sample, TimeRange
from pipelines.storage.store import Store
from rzen.evaluation.vectors import FloatArray
from rzen.index.by_id import Ids, VectorIndex, ids_path

FOLDERS: dict[Role, str] = {"positive": "parts", "query": "queries"}
"""Folder of the parts of targets, and of those of queries."""
_ROWS_AT_ONCE = 500_000  # of new parts: their vectors lie in a temporary file, the rest in memory
RANGE = ("start_s", "end_s")
"""Columns of a corpus whose long videos are divided."""


@dataclass(frozen=True, slots=True)
class PartRow:
    """A row of a part, but for its vector; `id` is that of the vector.

    `modality` and `title` are those of the input. `start_s` and `end_s` are those of a segment of a video, and
    `target_sha256` is then that of the segment. The other columns are those of its sample.
    """

    id: str
    split: str
    source: str
    index: int
    modality: Modality
    title: str
    origin: str
    target_sha256: str
    start_s: float | None = None
    end_s: float | None = None


@dataclass(slots=True)
class Part:
    """Adjacent targets or queries of a source, and how many were skipped, by reason.

    `has_ranges` says whether the rows have the columns `start_s` and `end_s`. `bad_segments` describes segments that
    were skipped.
    """

    role: Role
    split: str
    source: str
    start: int
    has_ranges: bool = False
    rows: list[PartRow] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    bad_segments: list[str] = field(default_factory=list)

    def path(self, config: str) -> str:
        """Return the place of its rows, which names all that is in them but the last bits of the vectors."""
        content = json.dumps([config, self.columns()], ensure_ascii=False)
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return f"{FOLDERS[self.role]}/{self.split}-{self.source}-{self.start:09d}-{digest}.parquet"

    def columns(self) -> list[dict[str, Any]]:
        """Return the rows with the columns that they have."""
        rows = [asdict(row) for row in self.rows]
        if not self.has_ranges:  # so that a corpus without segments has the files that it had before there were any
            rows = [{name: value for name, value in row.items() if name not in RANGE} for row in rows]
        return rows


def asks(sample: Sample) -> bool:
    """Return whether the sample has a query. An uncaptioned medium has none."""
    return bool(sample.query.text or sample.query.media)


def make_parts(
    shards: Sequence[ListedShard],
    listings: Store,
    role: Role,
    segments: TargetSegments,
    bad: BadItems,
    samples_per_part: int,
) -> Iterator[Part]:
    """Yield the parts of all targets or queries in order.

    A part ends before a multiple of `samples_per_part` samples, and before it would have more rows than that. All
    segments of a video are in one part.
    """
    part: Part | None = None
    has_ranges = segments.segmentation is not None
    for shard, index, sample in samples_of(shards, listings):
        block = index - index % samples_per_part
        if part is None or (part.split, part.source) != (shard.split, shard.source) or part.start < block:
            if part is not None:
                yield part
            part = Part(role, shard.split, shard.source, block, has_ranges)
        if isinstance(sample, Rejected):
            part.skipped[sample.reason] += 1
            continue
        if role == "query" and not asks(sample):
            continue
        found = segments.of(shard, index, sample) if role == "positive" else WHOLE
        if isinstance(found, Rejected):
            part.skipped[found.reason] += 1
            continue
        if part.rows and len(part.rows) + len(found) > samples_per_part:
            yield part
            part = Part(role, shard.split, shard.source, index, has_ranges)
        for segment in found:
            item = row_item(shard, index, sample, role, segment)
            if item.id in bad:
                reason = bad[item.id].reason
                part.skipped[reason] += 1
                if segment is not None:
                    part.bad_segments.append(f"{sample.origin} {segment}: {reason}")
                continue
            part.rows.append(_row(item, shard, index, sample, role, segment))
    if part is not None:
        yield part


def _row(item: Item, shard: ListedShard, index: int, sample: Sample, role: Role, segment: TimeRange | None) -> PartRow:
    row = PartRow(
        id=item.id,
        split=shard.split,
        source=shard.source,
        index=index,
        modality=item.input.modality,
        title=item.input.text if role == "query" or not item.input.media else sample.query.text,
        origin=sample.origin,
        target_sha256=sample.target_sha256,
    )
    if segment is None:
        return row
    sha256 = segment_sha256(sample.target_sha256, segment)
    return replace(row, target_sha256=sha256, start_s=segment.start_s, end_s=segment.end_s)


class PartWriter:
    """Writes the parts that are not there yet, many at a time, so that stored vectors are read in bulk."""

    def __init__(self, store: Store, vectors: VectorIndex, config: str) -> None:
        self._store, self._vectors, self._config = store, vectors, config
        self._there = {path for folder in FOLDERS.values() for path in store.list(folder)}
        self._waiting: list[tuple[str, Part]] = []
        self._ids: list[Ids] = []
        self.paths: dict[Role, list[str]] = {"positive": [], "query": []}
        self.skipped: dict[Role, Counter[str]] = {"positive": Counter(), "query": Counter()}
        self.num_rows: Counter[Role] = Counter()
        self.divided: Counter[str] = Counter()
        """Number of `videos` that were divided, and of their `segments`."""
        self.bad_segments: list[str] = []

    def add(self, part: Part) -> None:
        """Take the next part; a part without rows has no file."""
        self.skipped[part.role] += part.skipped
        self.bad_segments += part.bad_segments
        self.num_rows[part.role] += len(part.rows)
        divided = [row.index for row in part.rows if row.start_s is not None]
        self.divided += Counter(segments=len(divided), videos=len(set(divided)))
        if not part.rows:
            return
        path = part.path(self._config)
        self.paths[part.role].append(path)
        self._ids.append(as_ids(row.id for row in part.rows))
        # The ids are written last: a part is whole if they are there.
        if ids_path(path) not in self._there or path not in self._there:
            self._waiting.append((path, part))
        if sum(len(part.rows) for _, part in self._waiting) >= _ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the parts that wait."""
        waiting, self._waiting = self._waiting, []
        wanted = [row.id for _, part in waiting for row in part.rows]
        if not wanted:
            return
        ids = np.unique(as_ids(wanted))
        with tempfile.TemporaryDirectory(prefix="rzen-vectors-") as scratch:
            loaded = self._vectors.load(ids, Path(scratch) / "vectors.npy")
            for path, part in waiting:
                mine = as_ids(row.id for row in part.rows)
                self._write(path, part, mine, loaded.rows[np.searchsorted(ids, mine)])

    def _write(self, path: str, part: Part, ids: Ids, vectors_ND: FloatArray) -> None:
        rows = [row | {"vector": vector} for row, vector in zip(part.columns(), vectors_ND, strict=True)]
        for row in rows:
            del row["id"]
        table = pa.Table.from_pylist(rows)
        for name in RANGE if part.has_ranges else ():  # of a part without segments, the type would not be known
            column = table.column_names.index(name)
            table = table.set_column(column, name, table[name].cast(pa.float64()))
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self._store.write(path, sink.getvalue())
        self._store.write(ids_path(path), ids.tobytes())

    def count_missing(self, store: Store, parts: Sequence[str]) -> int:
        """Return how many distinct vectors of the new parts are not in these."""
        old = VectorIndex()
        old.add(store, parts)
        return int(old.missing(np.unique(np.concatenate([as_ids([]), *self._ids]))).sum())
