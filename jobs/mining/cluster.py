"""Job of kind `cluster`: samples that are hard negatives of each other get a common cluster, which shares a batch.

The new table has the candidates of the old one. It is written to another folder. A job that was killed resumes: the
clusters of a source are kept, and its parts are written once. Nothing is done if the table is there, of the same
candidates and settings.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from jobs.embedding.listings import list_shards, samples_of
from jobs.mining.specs import ClusterSpec
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.candidates.clusters import (
    Preferences,
    group_clusters,
    import_metis,
    kept_weight,
    partition,
    preferred_pairs,
)
from pipelines.candidates.table import CandidateTable, check_other, finished_table, open_table
from pipelines.candidates.types import KIND, NO_CLUSTER, BoolArray, CandidateRows, Int64Array, PartInfo
from pipelines.candidates.write import PartWriter, Place, publish_table
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.samples import Rejected
from pipelines.shards.manifest import read_manifest
from pipelines.storage.ahead import read_ahead
from pipelines.storage.location import open_store
from pipelines.storage.store import Store

LISTINGS = "listings"
_THREADS = 4
_VERSION = 1  # of what a part holds for equal candidates and settings
T = TypeVar("T")


def run(spec: ClusterSpec) -> dict[str, Any]:
    """Cluster the samples of a table, and publish the new table."""
    store = open_store(spec.out, spec.endpoint)
    check_other(spec.out, spec.table, spec.endpoint, "read")
    with hold_output(store, KIND, "clusters") as lease:
        return _run(open_table(spec.table, spec.endpoint), spec, store, lease)


def _run(table: CandidateTable, spec: ClusterSpec, store: Store, lease: Lease) -> dict[str, Any]:
    table.check_candidates()
    manifest = table.manifest
    settings = spec.model_dump(
        mode="json", include={"method", "first_rank", "num_ranks", "cluster_size", "seed", "origin"}
    )
    writer = PartWriter.of(store, {"version": _VERSION, "table": table.fingerprint, "settings": settings})
    if (finished := finished_table(store, writer.job)) is not None:
        say(f"  {store.url} is up to date: nothing to cluster")
        return _result(spec, finished)
    if spec.method == "preferences":
        import_metis()
    counts: dict[str, Any] = {}
    parts: dict[str, list[PartInfo]] = {}
    total = sum(part.num_samples for some in manifest.parts.values() for part in some)
    done = 0
    written = writer.done()
    clusterer = _Clusterer(table, spec, store, writer)
    with Bars() as bars:
        for source, old in manifest.parts.items():
            cluster, counts[source] = clusterer.clusters(source)
            parts[source] = [*_write(table, source, cluster, writer, written)]
            done += sum(part.num_samples for part in old)
            bars.update("cluster", done, total)
    _check_clusters(table, spec, counts)
    new = table.derived("cluster", writer.job, parts, settings, counts)
    return _result(spec, publish_table(store, new, before_publish=lease.check))


def _result(spec: ClusterSpec, table: CandidateTable) -> dict[str, Any]:
    counts = table.manifest.counts
    for source, some in counts.items():
        kept = "" if "kept_weight" not in some else f"; they keep {some['kept_weight']:.0%} of the preferences"
        say(f"  {source}: {some['clusters']:,} clusters of {some['samples']:,} samples{kept}")
    say(f"  to train with it: data: {{candidates: {spec.out}}}")
    return {"outputs": [spec.out], "fingerprint": table.fingerprint, "counts": counts}


def _check_clusters(table: CandidateTable, spec: ClusterSpec, counts: dict[str, Any]) -> None:
    """Name the sources without candidates of their own. Raises `UserError` if there are no others."""
    if spec.method != "preferences":
        return
    problem = (
        f"has no candidates of their own source at ranks {spec.first_rank} to {spec.first_rank + spec.num_ranks - 1}"
    )
    if not any(some["clusters"] for some in counts.values()):
        fix = "mine with pools: own and a larger depth, or set a smaller first_rank"
        raise UserError(table.store.url, problem, fix)
    for source, some in counts.items():
        if not some["clusters"]:
            say(f"  {source} {problem}: it has no clusters", "yellow")


@dataclass(frozen=True, slots=True)
class _Clusterer:
    """Finds the clusters of a source, once: they are kept until the table is published."""

    table: CandidateTable
    spec: ClusterSpec
    store: Store
    writer: PartWriter
    _origins: dict[str, list[str]] = field(default_factory=dict)

    def clusters(self, source: str) -> tuple[Int64Array, dict[str, Any]]:
        """Return the cluster of each sample, and what the manifest says of them."""
        name = f"{source}.npz"
        if (data := self.writer.kept(name)) is not None:
            return _kept_clusters(data, f"{self.store.url}/{self.writer.kept_path(name)}")
        cluster, extra = self._find(source)
        counts = _counts(cluster) | extra
        sink = io.BytesIO()
        np.savez(sink, cluster=cluster, counts=json.dumps(counts))
        self.writer.keep(name, sink.getvalue())
        return cluster, counts

    def _find(self, source: str) -> tuple[Int64Array, dict[str, Any]]:
        if self.spec.method == "preferences":
            return _by_preference(self.table, source, self.spec)
        if not self._origins:
            self._origins.update(_origins(self.table, self.spec, self.store))
        return _by_origin(self.table, source, self._origins[source]), {}


def _kept_clusters(data: bytes, place: str) -> tuple[Int64Array, dict[str, Any]]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return file["cluster"], json.loads(str(file["counts"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(place, f"cannot be read: {error}", "delete the file") from error


def _by_preference(table: CandidateTable, source: str, spec: ClusterSpec) -> tuple[Int64Array, dict[str, Any]]:
    starts = _starts(table, source)

    def read(rows: CandidateRows, number: int) -> tuple[BoolArray, Int64Array]:
        pairs = preferred_pairs(rows, table.manifest, source, starts[number], spec.first_rank, spec.num_ranks)
        return rows.keep, pairs

    found = [*_each_part(table, source, read)]
    keep = np.concatenate([np.zeros(0, np.bool_), *(some for some, _ in found)])
    edges = Preferences.of(np.concatenate([np.zeros((0, 2), np.int64), *(pairs for _, pairs in found)]))
    if not len(edges.one):
        return np.full(len(keep), NO_CLUSTER), {"kept_weight": 0.0}
    cluster = partition(edges, keep, spec.cluster_size, spec.seed)
    return cluster, {"kept_weight": round(kept_weight(edges, cluster), 4)}


def _by_origin(table: CandidateTable, source: str, origins: list[str]) -> Int64Array:
    keep = [*_each_part(table, source, lambda rows, _: rows.keep)]
    return group_clusters(origins, np.concatenate([np.zeros(0, np.bool_), *keep]))


def _counts(cluster: Int64Array) -> dict[str, Any]:
    sizes = np.bincount(cluster[cluster != NO_CLUSTER])
    smallest, largest = (int(sizes.min()), int(sizes.max())) if len(sizes) else (0, 0)
    return {"clusters": len(sizes), "samples": int(sizes.sum()), "smallest": smallest, "largest": largest}


def _origins(table: CandidateTable, spec: ClusterSpec, store: Store) -> dict[str, list[str]]:
    """Return the group of each sample of each source: what `origin` matches in its origin, else nothing."""
    known = table.manifest.data
    data = DataConfig(root=spec.root or known.root, endpoint=spec.endpoint)
    table.check_data(read_manifest(open_store(data.root, data.endpoint), known.split))
    listings = store.child(LISTINGS)
    with ray_cluster():
        shards = list_shards(data, [known.split], listings, 1.0, [*known.sources])
    pattern = re.compile(spec.origin)
    found: dict[str, list[str]] = {source: [] for source in known.sources}
    for shard, _, sample in samples_of(shards, listings):
        match = None if isinstance(sample, Rejected) else pattern.search(sample.origin)
        found[shard.source].append(match[1] if match else "")
    return found


def _starts(table: CandidateTable, source: str) -> list[int]:
    starts: list[int] = np.cumsum([0, *(part.num_samples for part in table.manifest.parts[source])]).tolist()
    return starts


def _write(
    table: CandidateTable, source: str, cluster: Int64Array, writer: PartWriter, written: Mapping[Place, PartInfo]
) -> Iterator[PartInfo]:
    """Yield the parts of a source. Those that an earlier try has written are not made again."""
    starts = _starts(table, source)
    missing = [number for number in range(len(starts) - 1) if (source, number) not in written]

    def make(rows: CandidateRows, number: int) -> PartInfo:
        mine = cluster[starts[number] : starts[number + 1]]
        return writer.write(source, number, replace(rows, cluster=mine))

    made = dict(zip(missing, _each_part(table, source, make, missing), strict=True))
    for number in range(len(starts) - 1):
        yield made[number] if number in made else written[source, number]


def _each_part(
    table: CandidateTable,
    source: str,
    function: Callable[[CandidateRows, int], T],
    numbers: Sequence[int] | None = None,
) -> Iterator[T]:
    """Yield what a function returns for the rows of each part, and its number, in order. A few are read ahead."""
    wanted = range(len(table.manifest.parts[source])) if numbers is None else numbers
    return read_ahead(lambda number: function(table.rows(source, number), number), wanted, _THREADS)
