"""Samples of a source with a common target: in one batch, each would be a false negative of the other.

`{split}/{source}/duplicates.parquet` lists them, so that a plan starts without reading the index of every shard. It is
made from the indices when a split is published. Its hash is in the manifest.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.plan.types import SourceTable
from pipelines.shards.index import read_index_table
from pipelines.shards.manifest import Manifest, ShardInfo, SourceInfo, duplicates_path
from pipelines.storage.store import Store

_SCHEMA = pa.schema([("sample", pa.int64()), ("target", pa.uint64())])
_READERS = 16

Targets = npt.NDArray[np.uint64]


def with_duplicates(store: Store, manifest: Manifest) -> Manifest:
    """Write the duplicates of every source, and return the manifest that names them. The indices must be in place."""
    sources = {}
    for name, source in manifest.sources.items():
        targets_N = _read_targets(store, source.shards)
        sample_D = np.flatnonzero(_has_duplicate(targets_N))
        sink = io.BytesIO()
        pq.write_table(pa.table([sample_D, targets_N[sample_D]], schema=_SCHEMA), sink, compression="zstd")
        data = sink.getvalue()
        store.write(duplicates_path(manifest.split, name), data)
        sources[name] = replace(source, duplicates_sha256=hashlib.sha256(data).hexdigest())
    return replace(manifest, sources=sources)


def source_table(store: Store, split: str, name: str, source: SourceInfo, *, merged: bool) -> SourceTable:
    """Return a source as a plan takes it.

    With `merged`, the table has all targets, because other sources may hold duplicates of them. Raises `UserError` for
    files that are missing or not the manifest's.
    """
    if merged or source.duplicates_sha256 is None:
        return SourceTable(source.num_samples, np.arange(source.num_samples), _read_targets(store, source.shards))
    path = duplicates_path(split, name)
    place, fix = f"{store.url}/{path}", "run the job again that wrote the dataset"
    try:
        data = store.read(path)
    except FileNotFoundError as error:
        raise UserError(place, "is named in the manifest but missing", fix) from error
    if hashlib.sha256(data).hexdigest() != source.duplicates_sha256:
        raise UserError(place, "is not the file that the manifest names", fix)
    table = pq.read_table(io.BytesIO(data), schema=_SCHEMA)
    return SourceTable(source.num_samples, table["sample"].to_numpy(), table["target"].to_numpy())


def _has_duplicate(targets_N: Targets) -> npt.NDArray[np.bool_]:
    _, inverse, counts = np.unique(targets_N, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] > 1)


def _read_targets(store: Store, shards: Sequence[ShardInfo]) -> Targets:
    """Return the first 8 bytes of each sample's `target_sha256`, by which the objective identifies targets."""
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda shard: _targets_of(store, shard), shards))
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _targets_of(store: Store, shard: ShardInfo) -> Targets:
    hexadecimal = read_index_table(store, shard, ["target_sha256"])["target_sha256"].to_pylist()
    # Big-endian, so that the order of the numbers is that of the hex digits.
    return np.frombuffer(b"".join(bytes.fromhex(text[:16]) for text in hexadecimal), ">u8").astype(np.uint64)
