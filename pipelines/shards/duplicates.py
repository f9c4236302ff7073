"""Samples of a source with a common target or query: in one batch, each target would be a false negative of the other.

`{split}/{source}/duplicates-{digest}.parquet` lists them, so that a plan starts without reading the index of every
shard. It is made from the indices when a split is published. Its hash is in the manifest.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.plan.types import NO_SAMPLES, SourceTable
from pipelines.shards.index import read_index_table
from pipelines.shards.manifest import Manifest, ShardInfo, SourceInfo, duplicates_path, manifest_path
from pipelines.storage.publish import read_published
from pipelines.storage.store import Store

_SCHEMA = pa.schema([("sample", pa.int64()), ("target", pa.uint64()), ("query", pa.uint64())])
_READERS = 16
_COLUMNS = ("target_sha256", "query_sha256")

Ids = npt.NDArray[np.uint64]


def with_duplicates(store: Store, manifest: Manifest) -> Manifest:
    """Write the duplicates of every source, and return the manifest that names them. The indices must be in place.

    Indices of a source that has the same shards as in the published manifest are not read again.
    """
    earlier = _published_sources(store, manifest.split)
    sources = {}
    for name, source in manifest.sources.items():
        sha256 = _known_duplicates(store, manifest.split, name, source, earlier.get(name))
        if sha256 is None:
            data = _duplicates_file(store, source)
            sha256 = hashlib.sha256(data).hexdigest()
            store.write(duplicates_path(manifest.split, name, sha256), data)
        sources[name] = replace(source, duplicates_sha256=sha256)
    return replace(manifest, sources=sources)


def _published_sources(store: Store, split: str) -> Mapping[str, SourceInfo]:
    try:
        return Manifest.from_json(read_published(store, manifest_path(split))).sources
    except (FileNotFoundError, ValueError):  # none yet, or a damaged one, which the job replaces
        return {}


def _known_duplicates(
    store: Store, split: str, name: str, source: SourceInfo, earlier: SourceInfo | None
) -> str | None:
    """Return the hash of the duplicates of an earlier source with the same shards. None if they are not there."""
    if earlier is None or earlier.duplicates_sha256 is None or earlier.shards != source.shards:
        return None
    try:
        data = store.read(duplicates_path(split, name, earlier.duplicates_sha256))
    except FileNotFoundError:
        return None
    return earlier.duplicates_sha256 if hashlib.sha256(data).hexdigest() == earlier.duplicates_sha256 else None


def _duplicates_file(store: Store, source: SourceInfo) -> bytes:
    targets_N, queries_N = _read_ids(store, source.shards)
    sample_D = np.flatnonzero(_is_shared(targets_N) | _is_shared(queries_N))
    sink = io.BytesIO()
    table = pa.table([sample_D, targets_N[sample_D], queries_N[sample_D]], schema=_SCHEMA)
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def source_table(store: Store, split: str, name: str, source: SourceInfo, *, merged: bool) -> SourceTable:
    """Return a source as a plan takes it. Queries of a dataset of format 2 are unknown.

    With `merged`, the table has all samples, because other sources may hold duplicates of theirs. Raises `UserError`
    for files that are missing or not the manifest's.
    """
    if merged or source.duplicates_sha256 is None:
        targets_N, queries_N = _read_ids(store, source.shards)
        return SourceTable(source.num_samples, np.arange(source.num_samples), targets_N, queries=queries_N)
    path = duplicates_path(split, name, source.duplicates_sha256)
    place, fix = f"{store.url}/{path}", "run the job again that wrote the dataset"
    try:
        data = store.read(path)
    except FileNotFoundError as error:
        raise UserError(place, "is named in the manifest but missing", fix) from error
    if hashlib.sha256(data).hexdigest() != source.duplicates_sha256:
        raise UserError(place, "is not the file that the manifest names", fix)
    # The file is small, and starting Arrow's threads takes longer than reading it. One that reads ahead runs Python
    # code, which can abort a process that ends meanwhile.
    with pq.ParquetFile(io.BytesIO(data), pre_buffer=False) as file:
        table = file.read(use_threads=False)
    queries = table["query"].to_numpy() if "query" in table.column_names else NO_SAMPLES
    return SourceTable(source.num_samples, table["sample"].to_numpy(), table["target"].to_numpy(), queries=queries)


def _is_shared(ids_N: Ids) -> npt.NDArray[np.bool_]:
    sorted_N = np.sort(ids_N)
    shared_D = np.unique(sorted_N[1:][sorted_N[1:] == sorted_N[:-1]])
    if not shared_D.size:
        return np.zeros(ids_N.size, np.bool_)
    place_N = np.searchsorted(shared_D, ids_N)
    return np.asarray(shared_D[np.minimum(place_N, shared_D.size - 1)] == ids_N)


def _read_ids(store: Store, shards: Sequence[ShardInfo]) -> tuple[Ids, Ids]:
    """Return the first 8 bytes of each sample's `target_sha256` and `query_sha256`, as the objective takes them.

    There are no queries where an index lacks them. Memory holds 16 bytes a sample, as each index is cut at once.
    """
    starts = [0, *accumulate(shard.num_samples for shard in shards)]
    ids = {column: np.zeros(starts[-1], np.uint64) for column in _COLUMNS}
    unknown: set[str] = set()

    def read(shard: ShardInfo, start: int) -> None:
        table = read_index_table(store, shard, _COLUMNS)
        for column, ids_N in ids.items():
            if column in table.column_names:
                ids_N[start : start + shard.num_samples] = _first_bytes(table[column])
            else:
                unknown.add(column)

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(read, shards, starts[:-1]):  # raises what a reader has raised
            pass
    targets_N, queries_N = (ids[column][: 0 if column in unknown else None] for column in _COLUMNS)
    return targets_N, queries_N


def _first_bytes(sha256: pa.ChunkedArray) -> Ids:
    # Big-endian, so that the order of the numbers is that of the hex digits.
    return np.frombuffer(b"".join(bytes.fromhex(text[:16]) for text in sha256.to_pylist()), ">u8").astype(np.uint64)
