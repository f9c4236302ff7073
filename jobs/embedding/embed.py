"""Job of kind `embed`: the targets of a dataset become vectors in Parquet. It is incremental and resumable.

* `{out}/vectors.json`: parts, index, model and data of the live version. One write of it makes a version visible.
* `{out}/versions/{version}.json`: the same of each version that is kept.
* `{out}/index/`: what searches the vectors (`rzen/index`).
* `{out}/parts/{split}-{source}-{start}-{digest}.parquet`: one row a target, with place, title and vector.
* `{out}/queries/`: the same of the queries, with `queries: true`. A search does not read them.
* `{out}/parts/....ids`: ids of the vectors, for the next run and for a student that learns from them.
* `{out}/listings/`: what the shards hold.
* `{out}/unfinished/`: vectors of a run that has not ended.

The digest of a part is that of its rows' content. A part without a change keeps its file. Files of versions that are
kept stay.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.embedding.engine import BadItems, check_workers, embed_items
from jobs.embedding.listings import list_shards, samples_of
from jobs.embedding.settings import settings_of_job
from jobs.embedding.specs import EmbedSpec
from jobs.embedding.targets import ingest_targets
from jobs.embedding.vectors import VectorCache, config_digest
from jobs.embedding.versions import commit, delete_old, previous_of, version_of
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.items.listing import ListedShard, row_item
from pipelines.items.types import Item, Role, as_ids
from pipelines.samples import Modality, Rejected, Sample
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from rzen.embedding.corpus import VectorsFile, all_parts, read_vectors_file
from rzen.evaluation.vectors import FloatArray
from rzen.index.build import build_index, default_kind
from rzen.index.by_id import Ids, VectorIndex, ids_path
from rzen.index.parts import Parts

KIND = "vectors"
PARTS, QUERIES, LISTINGS, UNFINISHED = "parts", "queries", "listings", "unfinished"
_OURS = re.compile(rf"({PARTS}|{QUERIES})/.+-\d{{9}}-[0-9a-f]{{16}}\.(parquet|ids)|{LISTINGS}/[0-9a-f]{{32}}\.parquet")
_FOLDERS: dict[Role, str] = {"positive": PARTS, "query": QUERIES}
_ROWS_AT_ONCE = 500_000  # of new parts: their vectors lie in a temporary file, the rest in memory


@dataclass(frozen=True, slots=True)
class PartRow:
    """A row of a part, but for its vector; `id` is that of the vector.

    `modality` and `title` are those of the input. The other columns are those of its sample.
    """

    id: str
    split: str
    source: str
    index: int
    modality: Modality
    title: str
    origin: str
    target_sha256: str


@dataclass(slots=True)
class Part:
    """Adjacent targets or queries of a source, and how many were skipped, by reason."""

    role: Role
    split: str
    source: str
    start: int
    rows: list[PartRow] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def path(self, config: str) -> str:
        """Return the place of its rows, which names all that is in them but the last bits of the vectors."""
        content = json.dumps([config, [asdict(row) for row in self.rows]], ensure_ascii=False)
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return f"{_FOLDERS[self.role]}/{self.split}-{self.source}-{self.start:09d}-{digest}.parquet"


def run(spec: EmbedSpec) -> dict[str, Any]:
    """Embed the target of every sample that has no vector yet, and publish the vectors of all."""
    store = open_store(spec.out, spec.endpoint)
    with hold_output(store, KIND, "embeds") as lease, ray_cluster():
        check_workers(spec)
        unusable = ingest_targets(spec) if spec.input or spec.sources else {}
        result = _run(spec, store, lease)
    return result | ({"unusable": unusable} if unusable else {})


def _run(spec: EmbedSpec, store: Store, lease: Lease) -> dict[str, Any]:
    listings = store.child(LISTINGS)
    settings = settings_of_job("embed", spec, spec.model, spec.splits)
    config = config_digest(settings.config)
    old = _live_version(store)
    old_parts = all_parts(old) if old and old["config"] == config else []
    roles: list[Role] = ["positive", "query"] if spec.queries else ["positive"]
    vectors = VectorCache(store.child(UNFINISHED), settings.config)
    vectors.add(store, old_parts)
    with Bars() as bars:
        shards = list_shards(spec.data, spec.splits, listings, spec.cpus_per_task)
        num_samples = sum(shard.stop - shard.start for shard in shards)
        inputs, unit = ("pairs", "inputs") if spec.queries else ("targets", "targets")
        made_by = f"model {spec.model}, {spec.actors} actor(s)"
        say(f"  {num_samples:,} {inputs} of {spec.data.root}, {made_by} -> {store.url}")
        on_progress = partial(bars.update, "embed", unit=unit)
        (bad,) = embed_items(_items(shards, listings, roles), [(settings, vectors)], spec, on_progress)
    writer = _PartWriter(store, vectors, config)
    for role in roles:
        for part in _parts(shards, listings, role, bad, spec.samples_per_part):
            writer.add(part)
    writer.flush()
    num_embedded = writer.count_missing(store, old_parts)
    num_vectors = num_samples - writer.skipped["positive"].total()
    version = version_of(config, [path for paths in writer.paths.values() for path in paths])
    kind = default_kind(num_vectors) if spec.index == "auto" else spec.index
    parts = Parts(store, sorted(writer.paths["positive"]))
    if kind != "exact":
        say(f"  index: {kind} of {num_vectors:,} vectors")
    content = {
        "parts": parts.paths,
        "num_vectors": num_vectors,
        "num_embedded": num_embedded,
        "skipped": dict(writer.skipped["positive"]),
        **({"query_parts": sorted(writer.paths["query"])} if spec.queries else {}),
        "model": _absolute(spec.model),
        "config": config,
        "made_by": {name: settings.config[name] for name in ("base", "adapter", "identity")},
        "dtype": spec.dtype,
        "data": spec.data.model_dump(mode="json", exclude={"trusted"}) | {"root": _absolute(spec.data.root)},
        "fingerprints": settings.fingerprints,
        "version": version,
        "previous": previous_of(old, version, spec.keep_versions),
        "index": build_index(kind, parts, config, version, old.get("index") if old else None),
    }
    kept = commit(store, content, lease)
    kept_parts = {part for one in kept for part in all_parts(one)}
    _delete_all_but(store, [*kept_parts, *(f"{LISTINGS}/{shard.path}" for shard in shards)])
    delete_old(store, kept)
    say(f"  {num_embedded:,} {unit} went through the model; the others had their vector")
    for role in roles:
        for reason, count in writer.skipped[role].items():
            say(f"  skipped{' queries' if role == 'query' else ''}: {reason} {count:,}", "yellow")
    return {
        "outputs": [spec.out],
        "vectors": content["num_vectors"],
        "embedded": num_embedded,
        "skipped": dict(writer.skipped["positive"]),
        "version": version,
        "index": kind,
    }


def _absolute(url: str) -> str:
    """A local path as an absolute one, because whoever searches may be in another folder."""
    return str(Path(url).absolute()) if Path(url).exists() else url


def _live_version(store: Store) -> VectorsFile | None:
    """The version that an earlier job published, if there is one."""
    try:
        return read_vectors_file(store)
    except FileNotFoundError:
        return None


def _items(shards: Iterable[ListedShard], listings: Store, roles: Sequence[Role]) -> Iterator[Item]:
    for shard, index, sample in samples_of(shards, listings):
        if not isinstance(sample, Rejected):
            for role in roles:
                if role == "positive" or _asks(sample):
                    yield row_item(shard, index, sample, role)


def _asks(sample: Sample) -> bool:
    """Return whether the sample has a query. An uncaptioned medium has none."""
    return bool(sample.query.text or sample.query.media)


def _parts(
    shards: Sequence[ListedShard], listings: Store, role: Role, bad: BadItems, samples_per_part: int
) -> Iterator[Part]:
    part: Part | None = None
    for shard, index, sample in samples_of(shards, listings):
        start = index - index % samples_per_part
        if part is None or (part.split, part.source, part.start) != (shard.split, shard.source, start):
            if part is not None:
                yield part
            part = Part(role, shard.split, shard.source, start)
        if isinstance(sample, Rejected):
            part.skipped[sample.reason] += 1
            continue
        if role == "query" and not _asks(sample):
            continue
        item = row_item(shard, index, sample, role)
        if item.id in bad:
            part.skipped[bad[item.id].reason] += 1
            continue
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
        part.rows.append(row)
    if part is not None:
        yield part


class _PartWriter:
    """Writes the parts that are not there yet, many at a time, so that stored vectors are read in bulk."""

    def __init__(self, store: Store, vectors: VectorIndex, config: str) -> None:
        self._store, self._vectors, self._config = store, vectors, config
        self._there = {path for folder in _FOLDERS.values() for path in store.list(folder)}
        self._waiting: list[tuple[str, Part]] = []
        self._ids: list[Ids] = []
        self.paths: dict[Role, list[str]] = {"positive": [], "query": []}
        self.skipped: dict[Role, Counter[str]] = {"positive": Counter(), "query": Counter()}

    def add(self, part: Part) -> None:
        """Take the next part; one of which nothing is left has no file."""
        self.skipped[part.role] += part.skipped
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
        rows = [asdict(row) | {"vector": vector} for row, vector in zip(part.rows, vectors_ND, strict=True)]
        for row in rows:
            del row["id"]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
        self._store.write(path, sink.getvalue())
        self._store.write(ids_path(path), ids.tobytes())

    def count_missing(self, store: Store, parts: Sequence[str]) -> int:
        """Return how many distinct vectors of the new parts are not in these."""
        old = VectorIndex()
        old.add(store, parts)
        return int(old.missing(np.unique(np.concatenate([as_ids([]), *self._ids]))).sum())


def _delete_all_but(store: Store, kept: Iterable[str]) -> None:
    wanted = set(kept)
    wanted |= {ids_path(path) for path in wanted}
    for folder in (*_FOLDERS.values(), LISTINGS):
        for path in store.list(folder):
            if path not in wanted and _OURS.fullmatch(path):
                store.delete(path)
    store.delete_tree(UNFINISHED)
