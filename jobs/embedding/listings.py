"""The samples of a split without their files: shards are read once, by Ray tasks, and what they hold is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray.data

from jobs.runtime.cluster import ray_data
from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
from pipelines.items.listing import ListedShard, read_listing, shards_of, write_listing
from pipelines.samples import Rejected, Sample
from pipelines.storage.location import resolve_endpoint
from pipelines.storage.store import Store

_FEW = 8


def list_shards(
    data: DataConfig,
    splits: Iterable[str],
    store: Store,
    cpus_per_task: float,
    sources: Sequence[str] | None = None,
    *,
    on_cluster: bool = True,
) -> list[ListedShard]:
    """Make the listings that `store` lacks, and return all shards of the splits in order.

    Needs Ray if `on_cluster`. Otherwise this process reads one shard after the other.
    """
    shards = []
    for split in splits:
        found = shards_of(Reader(data.model_copy(update={"split": split})))
        shards += [shard for shard in found if sources is None or shard.source in sources]
    kept = set(store.list())
    lacking = [shard for shard in shards if shard.path not in kept]
    if not on_cluster or len(lacking) <= _FEW:  # sooner read than a task is started
        for shard in lacking:
            write_listing(data, shard, store)
    else:
        data = data.model_copy(update={"endpoint": resolve_endpoint(data.endpoint)})
        rows = [{"number": number} for number in range(len(lacking))]
        with ray_data():
            listed = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                _list, fn_args=(data, lacking, store), num_cpus=cpus_per_task
            )
            for _ in listed.iter_rows():
                pass
    return shards


def samples_of(shards: Iterable[ListedShard], store: Store) -> Iterator[tuple[ListedShard, int, Sample | Rejected]]:
    """Yield shard, index in the source, and sample (or why it cannot be read) in order."""
    for shard in shards:
        for index, sample in enumerate(read_listing(shard, store), start=shard.start):
            yield shard, index, sample


def _list(row: dict[str, Any], data: DataConfig, shards: list[ListedShard], store: Store) -> dict[str, Any]:
    write_listing(data, shards[int(row["number"])], store)
    return row
