"""Job of kind `mine`: the nearest targets of each query become a candidate table. It is resumable part by part.

With `select`, this is all in `{out}/mined`, and `{out}` is the table of the chosen negatives.

* `{out}/candidates.json`, `{out}/parts/`: the table (`pipelines/candidates`).
* `{out}/vectors/`: vectors of queries and targets, by content and model, for the next run.
* `{out}/listings/`: what the shards hold.
* `{out}/unfinished/`: what a job has made that has not ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray.data

from jobs.embedding.engine import check_workers, embed_items
from jobs.embedding.listings import list_shards
from jobs.embedding.settings import EmbedderSettings, settings_of_job
from jobs.embedding.vectors import VectorCache, config_digest
from jobs.mining.approximate import NUM_MEASURED, ListsWork, build_lists
from jobs.mining.pools import Pool, Positives, SourceSamples, items_of, read_source
from jobs.mining.scratch import Scratch
from jobs.mining.search import Group, SearchGroups, SearchSettings
from jobs.mining.select import select_table
from jobs.mining.specs import MineSpec, PoolConfig, SelectSpec
from jobs.runtime.cluster import ray_cluster, ray_data
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.candidates.table import JOB, CandidateTable, finished_table, open_table
from pipelines.candidates.types import KIND, CandidateManifest, PartInfo, TableData
from pipelines.candidates.types import Pool as PoolInfo
from pipelines.candidates.write import PartWriter, Place, publish_table
from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
from pipelines.items.listing import ListedShard
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from rzen.neighbors.inverted_lists import import_faiss

VECTORS, LISTINGS, MINED = "vectors", "listings", "mined"
_VERSION = 1  # of what a part holds for equal samples and vectors


@dataclass(frozen=True, slots=True)
class SourceRef:
    """A source of a dataset, as a pool or as the samples that get candidates. `root` is None for that of `data`."""

    root: str | None
    split: str
    source: str


@dataclass(slots=True)
class Mining:
    """What is mined, from which pools, and what is known of the samples."""

    spec: MineSpec
    mined: list[SourceRef] = field(default_factory=list)
    pools: list[SourceRef] = field(default_factory=list)
    shards: dict[SourceRef, list[ListedShard]] = field(default_factory=dict)
    samples: dict[SourceRef, SourceSamples] = field(default_factory=dict)
    fingerprints: dict[SourceRef, str] = field(default_factory=dict)

    def data_of(self, root: str | None) -> DataConfig:
        """Return how a dataset is read."""
        return self.spec.data if root is None else self.spec.data.model_copy(update={"root": root})

    def reader(self, root: str | None, split: str) -> Reader:
        """Return the reader of a split."""
        return Reader(self.data_of(root).model_copy(update={"split": split}))

    @property
    def splits(self) -> dict[tuple[str | None, str], list[str]]:
        """Dataset and split -> the sources that are mined or pools, each once."""
        found: dict[tuple[str | None, str], list[str]] = {}
        for ref in dict.fromkeys([*self.mined, *self.pools]):
            found.setdefault((ref.root, ref.split), []).append(ref.source)
        return found

    def searched(self, ref: SourceRef) -> list[SourceRef]:
        """Return the pools in which the samples of a source are searched."""
        return [ref] if self.spec.pools == "own" else self.pools


def run(spec: MineSpec) -> dict[str, Any]:
    """Embed what has no vector, search, and publish the table. With `select`, choose negatives among the candidates."""
    store = open_store(spec.out, spec.endpoint)
    with hold_output(store, KIND, "mines") as lease:
        if spec.select is None:
            return _run(spec, store, lease)
        mined = f"{spec.out.rstrip('/')}/{MINED}"
        run(spec.model_copy(update={"out": mined, "select": None}))
        selecting = SelectSpec(
            kind="select",
            table=mined,
            out=spec.out,
            selection=spec.select,
            trusted=spec.data.trusted,
            endpoint=spec.endpoint,
        )
        return select_table(open_table(mined, spec.endpoint), selecting, store, lease)


def plan_mining(spec: MineSpec) -> Mining:
    """Return what a job mines. Raises `UserError` for sources and splits that there are not."""
    mining = Mining(spec)
    split = spec.data.split
    mined = spec.sources or [*mining.reader(None, split).sizes()]
    mining.mined = [SourceRef(None, split, source) for source in dict.fromkeys(mined)]
    if isinstance(spec.pools, str):
        mining.pools = [*mining.mined]
    else:
        mining.pools = [*dict.fromkeys(ref for pool in spec.pools for ref in _pool_refs(mining, pool))]
    for (root, name), sources in mining.splits.items():
        reader = mining.reader(root, name)
        for source in sources:
            mining.fingerprints[SourceRef(root, name, source)] = reader.source(source).fingerprint
    return mining


def _pool_refs(mining: Mining, pool: PoolConfig) -> Iterator[SourceRef]:
    root = None if pool.root == mining.spec.data.root else pool.root
    sources = pool.sources or [*mining.reader(root, pool.split).sizes()]
    yield from (SourceRef(root, pool.split, source) for source in sources)


def _run(spec: MineSpec, store: Store, lease: Lease) -> dict[str, Any]:
    mining = plan_mining(spec)
    settings = {root: _embedder(mining, root) for root in dict.fromkeys(root for root, _ in mining.splits)}
    config = next(iter(settings.values())).config
    identity = _identity(mining, config)
    writer = PartWriter.of(store, identity)
    if (table := finished_table(store, writer.job)) is not None:
        say(f"  {store.url} is up to date: nothing to mine")
        return _result(spec, table)
    if spec.search == "ivf":
        import_faiss()  # before hours of embedding
    listings = store.child(LISTINGS)
    cache = open_store(spec.vectors, spec.endpoint) if spec.vectors else store.child(VECTORS)
    cache.ensure_bucket()
    vectors = VectorCache(cache, config)
    with ray_cluster(), Bars() as bars:
        check_workers(spec)
        for (root, split), sources in mining.splits.items():
            shards = list_shards(mining.data_of(root), [split], listings, spec.cpus_per_task, sources)
            for source in sources:
                ref = SourceRef(root, split, source)
                mining.shards[ref] = [shard for shard in shards if shard.source == source]
        _say_plan(mining, store)
        for root, some in settings.items():
            on_progress = partial(bars.update, "embed", unit="inputs")
            embed_items(_items(mining, root, listings), [(some, vectors)], spec, on_progress)
        for ref, shards in mining.shards.items():
            mining.samples[ref] = read_source(shards, listings)
        recalls = _search(mining, writer, vectors, listings, bars)
    lease.check()
    manifest = _manifest(mining, config, identity, writer, recalls)
    table = publish_table(store, manifest, before_publish=lease.check)
    return _result(spec, table)


def _embedder(mining: Mining, root: str | None) -> EmbedderSettings:
    spec = mining.spec
    splits = [split for some, split in mining.splits if some == root]
    return settings_of_job("mine", spec, spec.model, splits, adapter=spec.adapter, data=mining.data_of(root))


def _identity(mining: Mining, config: dict[str, Any]) -> dict[str, Any]:
    """All that decides the table, but for where things are."""
    spec = mining.spec
    return {
        "version": _VERSION,
        "model": config,
        "mined": [[ref.source, mining.fingerprints[ref]] for ref in mining.mined],
        "pools": [mining.fingerprints[ref] for ref in mining.pools],
        "own": spec.pools == "own",
        "depth": spec.depth,
        "search": spec.search if spec.search == "exact" else spec.ivf.model_dump(),
        "owners": spec.owners,
    }


def _say_plan(mining: Mining, store: Store) -> None:
    spec = mining.spec
    sizes = {ref: sum(shard.stop - shard.start for shard in shards) for ref, shards in mining.shards.items()}
    num_queries, num_targets = (sum(sizes[ref] for ref in refs) for refs in (mining.mined, mining.pools))
    where = "their own source" if spec.pools == "own" else f"{len(mining.pools)} pool(s)"
    say(f"  {num_queries:,} queries of {spec.data.root}, {num_targets:,} targets of {where} -> {store.url}")


def _items(mining: Mining, root: str | None, listings: Store) -> Iterator[Any]:
    for ref, shards in mining.shards.items():
        if ref.root == root:
            is_mined = ref in mining.mined
            yield from items_of(shards, listings, queries=is_mined, targets=True)


def _search(mining: Mining, writer: PartWriter, vectors: VectorCache, listings: Store, bars: Bars) -> dict[str, float]:
    """Make the parts that are missing. Return the recall of approximate search by source, or none."""
    spec = mining.spec
    starts = np.cumsum([0, *(len(mining.samples[ref]) for ref in mining.pools)])
    first = dict(zip(mining.pools, starts.tolist(), strict=False))
    scopes = [[ref] for ref in mining.mined] if spec.pools == "own" else [mining.mined]
    pools = []
    for scope in scopes:
        parts = [(first[ref], mining.samples[ref]) for ref in mining.searched(scope[0])]
        pools.append(Pool.of(parts, vectors, spec.owners))
    done = writer.done()
    groups = [group for number, scope in enumerate(scopes) for group in _groups(mining, number, scope, done)]
    total = sum(len(mining.samples[ref]) for ref in mining.mined)
    num_done = total - sum(group.num_samples for group in groups)
    settings = SearchSettings(
        depth=spec.depth,
        job=writer.job,
        scratch=spec.scratch,
        listings=listings,
        writer=writer,
        probes=spec.ivf.probes if spec.search == "ivf" else None,
    )
    bars.update("search", num_done, total, unit="queries")
    positives = Positives.of([*mining.samples.values()])
    shared = [ray.put(pool) for pool in pools], ray.put(positives), ray.put(vectors)
    recalls = _build_lists(mining, scopes, settings, shared) if spec.search == "ivf" and groups else {}
    for row in _searched(groups, settings, spec, *shared) if groups else ():
        num_done += int(row["num_samples"])
        bars.update("search", num_done, total, unit="queries")
    Scratch(spec.scratch, writer.job).release()
    return recalls


def _build_lists(
    mining: Mining, scopes: list[list[SourceRef]], settings: SearchSettings, shared: tuple[list[Any], Any, Any]
) -> dict[str, float]:
    """Make inverted lists of the pools. Return the share of the exact candidates that they find, by sources."""
    pools, _, vectors = shared
    queries = [np.concatenate([mining.samples[ref].query_item for ref in scope]) for scope in scopes]
    works = [
        ListsWork(number, pool, some, vectors, settings, mining.spec.ivf)
        for number, (pool, some) in enumerate(zip(pools, queries, strict=True))
    ]
    recalls = {}
    for place, found in build_lists(works, mining.spec.cpus_per_actor):
        name = ", ".join(ref.source for ref in scopes[place])
        recalls[name] = found
        say(f"  {name}: inverted lists find {found:.1%} of the exact candidates of {NUM_MEASURED:,} queries")
    return dict(sorted(recalls.items()))


def _groups(mining: Mining, pool: int, scope: list[SourceRef], done: dict[Place, PartInfo]) -> Iterator[Group]:
    """Yield groups of adjacent shards whose parts are not all there. They do not depend on what is there."""
    shards: list[ListedShard] = []
    ordinals: list[int] = []
    for ref in scope:
        for ordinal, shard in enumerate(mining.shards[ref]):
            shards.append(shard)
            ordinals.append(ordinal)
            group = Group(pool, tuple(shards), tuple(ordinals))
            is_last = ref is scope[-1] and ordinal == len(mining.shards[ref]) - 1
            if group.num_samples >= mining.spec.queries_per_task or is_last:
                shards, ordinals = [], []
                if any(
                    (some.source, number) not in done for some, number in zip(group.shards, group.ordinals, strict=True)
                ):
                    yield group


def _searched(
    groups: list[Group], settings: SearchSettings, spec: MineSpec, pools: list[Any], positives: Any, vectors: Any
) -> Iterator[dict[str, Any]]:
    rows = [{"group": number} for number in range(len(groups))]
    with ray_data():
        found = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            SearchGroups,
            fn_constructor_args=(settings, groups, pools, positives, vectors),
            compute=ray.data.ActorPoolStrategy(size=min(spec.actors, len(rows))),
            num_cpus=spec.cpus_per_actor,
            num_gpus=spec.gpus_per_actor,
        )
        yield from found.iter_rows()


def _manifest(
    mining: Mining, config: dict[str, Any], identity: dict[str, Any], writer: PartWriter, recalls: dict[str, float]
) -> CandidateManifest:
    spec = mining.spec
    done = writer.done()
    parts = {
        ref.source: tuple(done[ref.source, ordinal] for ordinal in range(len(mining.shards[ref])))
        for ref in mining.mined
    }
    counts = {
        source: {
            "samples": sum(part.num_samples for part in some),
            "candidates": sum(part.num_candidates for part in some),
        }
        for source, some in parts.items()
    }
    return CandidateManifest(
        stage="mine",
        data=TableData(spec.data.root, spec.data.split, {ref.source: mining.fingerprints[ref] for ref in mining.mined}),
        pools=tuple(
            PoolInfo(ref.split, ref.source, mining.fingerprints[ref], len(mining.samples[ref]), ref.root)
            for ref in mining.pools
        ),
        parts=parts,
        settings={name: identity[name] for name in ("own", "depth", "search", "owners")} | {"model": spec.model},
        made_from={"model": config_digest(config), JOB: writer.job},
        counts=counts | ({"ivf_recall": recalls} if recalls else {}),
    )


def _result(spec: MineSpec, table: CandidateTable) -> dict[str, Any]:
    counts = table.manifest.counts
    for source, some in counts.items():
        if source != "ivf_recall":
            mean = some["candidates"] / max(1, some["samples"])
            say(f"  {source}: {some['samples']:,} samples with {mean:.1f} candidates on average")
    return {"outputs": [spec.out], "fingerprint": table.fingerprint, "counts": counts}
