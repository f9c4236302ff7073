"""One task of a split as a retrieval dataset: every distinct query and every distinct target of a pool once.

Targets of equal content (`target_sha256`) are one. Where samples of a pool have equal targets, the first one is the
candidate of all, with its instruction. Queries of equal content and instruction are one, with the targets of all its
samples as relevant candidates. A candidate that shows what the query shows is excluded, unless it is relevant. Graded
pairs are left out: a grade says how similar two inputs are, not which target answers a query.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pipelines.benchmarks.types import Dataset, Modality, Query, Row
from pipelines.items.listing import ListedShard, row_item
from pipelines.items.types import Item, content_id
from pipelines.samples import Sample, Split


def split_dataset(
    task: str,
    split: Split,
    samples: Iterable[tuple[ListedShard, int, Sample]],
    *,
    pool_is_source: bool,
    metric: str,
    modality: Modality,
) -> Dataset:
    """Return the dataset of a task. `samples` are those of all its sources, with their place, in order.

    The candidates of a query are the targets of all samples or, with `pool_is_source`, of its own source.
    """
    pools: dict[str, dict[str, str]] = {}  # pool -> target_sha256 -> id of the candidate
    candidates: dict[str, Item] = {}
    asked: dict[tuple[str, str], _Asked] = {}  # pool, id of the query
    num_graded = 0
    for shard, index, sample in samples:
        if sample.relevance is not None:
            num_graded += 1
            continue
        name = shard.source if pool_is_source else task
        pool = pools.setdefault(name, {})
        if sample.target_sha256 not in pool:
            target = row_item(shard, index, sample, "positive")
            pool[sample.target_sha256] = candidates.setdefault(target.id, target).id
        query = row_item(shard, index, sample, "query")
        if pool_is_source:  # an equal query of another source has other candidates
            query = replace(query, id=content_id([query.id, name]))
        same = asked.setdefault((name, query.id), _Asked(query, name, sample.query_sha256))
        same.relevance[pool[sample.target_sha256]] = 1.0
    ids_of = {name: tuple(pool.values()) for name, pool in pools.items()} if pool_is_source else {}
    row = Row(
        name=task,
        suite=split,
        modality=modality,
        meta_task=task,
        pool="local" if pool_is_source else "global",
        metric=metric,
        num_queries=None,
        layout="split",
        split=split,
    )
    queries = []
    for one in asked.values():
        itself = pools[one.pool].get(one.sha256)
        excluded = () if itself is None or itself in one.relevance else (itself,)
        queries.append(Query(one.item, one.relevance, ids_of.get(one.pool), excluded))
    notes = (f"{num_graded} graded pairs are left out",) if num_graded else ()
    return Dataset(row, queries, list(candidates.values()), f"{split} {task}", notes)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A query with its pool, its content, and the relevant candidates of all its samples."""

    item: Item
    pool: str
    sha256: str
    relevance: dict[str, float] = field(default_factory=dict)
