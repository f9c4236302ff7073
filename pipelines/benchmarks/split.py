"""One task of a split as a retrieval dataset: every query once, every distinct target of a pool once.

Targets of equal content (`target_sha256`) are one. Where samples of a pool have equal targets, the first one is the
candidate of all, with its instruction.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.benchmarks.types import Dataset, Modality, Query, Row
from pipelines.items.listing import ListedShard, row_item
from pipelines.items.types import Item
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
    asked: list[tuple[Item, str, str]] = []
    for shard, index, sample in samples:
        pool = pools.setdefault(shard.source if pool_is_source else task, {})
        if sample.target_sha256 not in pool:
            target = row_item(shard, index, sample, "positive")
            pool[sample.target_sha256] = candidates.setdefault(target.id, target).id
        query = row_item(shard, index, sample, "query")
        asked.append((query, pool[sample.target_sha256], shard.source))
    ids_of = {source: tuple(pool.values()) for source, pool in pools.items()} if pool_is_source else {}
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
    queries = [Query(query, {target: 1.0}, ids_of.get(source)) for query, target, source in asked]
    return Dataset(row, queries, list(candidates.values()), f"{split} {task}")
